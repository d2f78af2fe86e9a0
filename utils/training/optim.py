"""AdamW (Loshchilov and Hutter 2019) with decay only where it is harmless, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.schema import Training
from utils.training.distributed import spread

MOMENTS = ("exp_avg", "exp_avg_sq")


def build(model: nn.Module, constrained: Sequence[Tensor], spec: Training) -> torch.optim.AdamW:
    """Decay unconstrained matrices only: on a constrained parameter decay pulls against the constraint, and biases and norms
    are never decayed. The learning rate is set before every step."""
    exempt = {id(parameter) for parameter in constrained}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2 and id(parameter) not in exempt]
    kept = {id(parameter) for parameter in decayed}
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": [parameter for parameter in parameters if id(parameter) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, spec.beta2), fused=True)


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
