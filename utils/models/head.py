"""The unembedding and its losses, a chunk of tokens at a time: the logits of all tokens never exist together.

n tokens, width d, vocabulary V. A step of 16,384 tokens of Pythia has 3.3 GB of fp32 logits; with their softmax and gradient,
twice when distilling, they would be the largest tensors of the run. Here the gradients of the hidden states and of the
unembedding are formed while a chunk's logits are at hand, so the backward pass keeps no logits either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from utils.models.loading import autocast
from utils.run.errors import InputError

CHUNK = 4096  # tokens whose logits exist at a time: large enough for full matrix units
Rows = tuple[Tensor, Tensor, Tensor]


def token_nll(hidden: Tensor, head: nn.Linear, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden (n, d), targets (n,) -> (n,) nats of each token in fp32, without gradient; matrix products in `dtype`."""
    weight, bias = _cast(head, dtype)
    logits = ((F.linear(hidden[near].to(dtype), weight, bias).float(), targets[near]) for near in _spans(len(hidden)))
    return torch.cat([F.cross_entropy(scores, wanted, reduction="none") for scores, wanted in logits])


def hidden_slope(hidden: Tensor, head: nn.Linear, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden (n, d), targets (n,) -> (n, d) gradient of the summed nats with respect to `hidden`; weights get none. Products in `dtype`."""
    weight, bias = _cast(head, dtype)
    logits = ((F.linear(hidden[near].to(dtype), weight, bias), targets[near]) for near in _spans(len(hidden)))
    return torch.cat([_rows(scores, wanted, None, 0.0)[2] @ weight for scores, wanted in logits])


def mixed_loss(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    dtype: torch.dtype,
    teacher: tuple[Tensor, nn.Linear] | None = None,
    share: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """((1 - share) * cross-entropy + share * KL(teacher || model), and (2,) the two parts), nats summed over tokens.

    hidden (n, d) of the model, targets (n,), teacher: its hidden states (n, d') and unembedding. KL is over the whole vocabulary
    at temperature 1 (Hinton et al. 2015). Products run in `dtype`, softmax and sums in fp32. Only the first result has a gradient.
    """
    goal = None if teacher is None else (teacher[0], *_cast(teacher[1], dtype))
    return _Mixed.apply(hidden, head.weight, head.bias, targets, dtype, goal, share, compiled)


def check_head(model: PreTrainedModel, precision: str) -> None:
    """Raise InputError if the model's logits are not its unembedding applied to its last hidden state (scaled or capped logits)."""
    ids = torch.arange(8, device=model.device)[None]
    with torch.no_grad(), autocast(model.device, precision):
        logits = model(ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, ours, rtol=1e-4, atol=1e-4, equal_nan=True):  # who computes with the model sees NaN
        raise InputError(
            f"model: the logits of architecture {model.config.model_type!r} differ from its unembedding of the last hidden state, "
            "expected them equal; such a model is not supported"
        )


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        goal: tuple[Tensor, Tensor, Tensor | None] | None,
        share: float,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = _fused() if compiled else _rows
        cast, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        to_hidden, to_weight = torch.empty_like(hidden, dtype=dtype), torch.zeros_like(weight, dtype=torch.float32)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        parts = torch.zeros(2, device=hidden.device)
        for near in _spans(len(hidden)):
            states = hidden[near].to(dtype)
            wanted = None if goal is None else F.linear(goal[0][near].to(dtype), goal[1], goal[2])
            cross_entropy, divergence, gradient = rows(F.linear(states, cast, offset), targets[near], wanted, share)
            parts += torch.stack([cross_entropy, divergence])
            torch.mm(gradient, cast, out=to_hidden[near])
            to_weight += gradient.T @ states
            if to_bias is not None:
                to_bias += gradient.sum(dim=0, dtype=torch.float32)
        ctx.save_for_backward(to_hidden.to(hidden.dtype), to_weight, to_bias)
        ctx.mark_non_differentiable(parts)
        return torch.lerp(parts[0], parts[1], share), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _parts: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if one is None else one * scale for one in ctx.saved_tensors]
        return (*found, None, None, None, None, None)


def _rows(logits: Tensor, targets: Tensor, wanted: Tensor | None, share: float) -> Rows:
    """logits and the teacher's (n, V), targets (n,) -> sums of cross-entropy and divergence, gradient of their mixture (n, V).

    With p, t the two distributions and y the one-hot target: d/dlogits = p - (1 - share) y - share t.
    """
    log_model = logits.float().log_softmax(dim=-1)
    cross_entropy = -log_model.gather(1, targets[:, None]).sum()
    gradient = log_model.exp()
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = torch.where(hit, gradient - (1.0 - share if wanted is not None else 1.0), gradient)
    if wanted is None:
        return cross_entropy, torch.zeros_like(cross_entropy), gradient.to(logits.dtype)
    log_teacher = wanted.float().log_softmax(dim=-1)
    teacher = log_teacher.exp()
    divergence = (teacher * (log_teacher - log_model)).sum()
    return cross_entropy, divergence, (gradient - share * teacher).to(logits.dtype)


@functools.cache
def _fused() -> Callable[..., Rows]:
    """The same in two passes over the logits."""
    return torch.compile(_rows, dynamic=False)


def _spans(count: int) -> list[slice]:
    """Cut `count` tokens into parts of equal length (the last may be shorter), at most CHUNK each."""
    parts = max(1, math.ceil(count / CHUNK))
    size = math.ceil(count / parts)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _cast(head: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().to(dtype)
