"""Keep chosen matrices non-negative while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from configs.schema import Monotone
from utils.models.ffn import constrained_weights

SMALLEST = 1e-6  # softplus cannot reach zero; about the weight below which a product no longer matters


class Softplus(nn.Module):
    """W = log(1 + exp V), the parametrisation of arXiv 2602.02686, with a start that is exact and cannot overflow."""

    def forward(self, v: Tensor) -> Tensor:
        return nn.functional.softplus(v, threshold=30.0)

    def right_inverse(self, w: Tensor) -> Tensor:
        """V with softplus(V) = W: W + log(1 - exp(-W)), finite for every W > 0; entries below SMALLEST are raised to it."""
        w = w.clamp(min=SMALLEST)
        return w + torch.log(-torch.expm1(-w))


class Constraint:
    """The constraint on one model: installed when made; call `project` after every optimiser step."""

    def __init__(self, model: PreTrainedModel, spec: Monotone) -> None:
        self.spec = spec
        self.linears = constrained_weights(model, spec.scope)
        if spec.parametrisation == "softplus":
            linears = list(self.linears.values())
            for linear in linears:
                parametrize.register_parametrization(linear, "weight", Softplus())
                linear.__class__ = linears[0].__class__  # PyTorch makes a class for each, and compiled code is specific to a class

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves: V for softplus, W for projected. It must not be decayed (decay on V pulls W to ln 2)."""
        if self.spec.parametrisation == "softplus":
            return [linear.parametrizations.weight.original for linear in self.linears.values()]  # type: ignore[union-attr, misc]
        return [linear.weight for linear in self.linears.values()]

    @torch.no_grad()
    def project(self) -> None:
        """W <- max(W, 0), the Euclidean projection on the constraint. Softplus needs none."""
        if self.spec.parametrisation == "projected":
            torch._foreach_clamp_min_([w.to_local() if isinstance(w, DTensor) else w for w in self.parameters], 0.0)


@torch.no_grad()
def non_negative_start(model: PreTrainedModel, spec: Monotone) -> dict[str, float]:
    """Make the chosen matrices non-negative in place; return for each the share of entries that were negative."""
    changed = {}
    for name, linear in constrained_weights(model, spec.scope).items():
        changed[name] = float((linear.weight < 0).double().mean())
        linear.weight.copy_(linear.weight.abs() if spec.start == "abs" else linear.weight.clamp(min=0.0))
        if spec.parametrisation == "softplus":
            softplus = Softplus()
            linear.weight.copy_(softplus(softplus.right_inverse(linear.weight)))
    return changed
