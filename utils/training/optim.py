"""AdamW (Loshchilov and Hutter 2019) with decay only where it is harmless, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Training
from utils.models.ffn import feed_forward
from utils.training.distributed import spread

MOMENTS = ("exp_avg", "exp_avg_sq")


def build(model: PreTrainedModel, constrained: Sequence[Tensor], spec: Training) -> torch.optim.AdamW:
    """Decay unconstrained matrices only: on a constrained parameter decay pulls against the constraint, and biases and norms
    are never decayed. `set_rate` sets the learning rate before every step; outside the feed-forward sublayers it may be lower."""
    exempt = {id(parameter) for parameter in constrained}
    slow: set[int] = set()
    if spec.rate_outside_ffn != 1.0:
        inside = {id(parameter) for ffn in feed_forward(model) for chosen in ffn.maps for parameter in chosen.module.parameters()}
        slow = {id(parameter) for parameter in model.parameters()} - inside
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = spec.weight_decay if parameter.ndim >= 2 and id(parameter) not in exempt else 0.0
            groups.setdefault((decay, spec.rate_outside_ffn if id(parameter) in slow else 1.0), []).append(parameter)
    chosen = [{"params": members, "weight_decay": decay, "share": share} for (decay, share), members in groups.items()]
    return torch.optim.AdamW(chosen, lr=0.0, betas=(0.9, spec.beta2), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the coming step; each group takes its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """{parameter name + "." + moment: tensor} of everything AdamW remembers but its step."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter in optimizer.state}
    return {f"{name}.{moment}": optimizer.state[parameter][moment] for name, parameter in named.items() for moment in MOMENTS}


def shapes(model: nn.Module) -> dict[str, Tensor]:
    """For every name of a moment a tensor that lies on the processes as the moment does."""
    return {f"{name}.{moment}": parameter for name, parameter in model.named_parameters() for moment in MOMENTS}


def restore(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], updates: int) -> None:
    """Put back what `state_tensors` gave after so many updates (steps that were not skipped)."""
    for name, parameter in model.named_parameters():
        if f"{name}.exp_avg" in tensors:
            stored = {moment: spread(tensors[f"{name}.{moment}"], parameter) for moment in MOMENTS}
            moments = {moment: torch.empty_like(parameter).detach().copy_(tensor) for moment, tensor in stored.items()}
            count = torch.tensor(float(updates), device=parameter.device)
            optimizer.state[parameter] = {"step": count, **moments}
