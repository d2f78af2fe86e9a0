"""Keep chosen matrices within an order's constraint while they are trained: by projection, by annealing, or by a parametrisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from configs.schema import Monotone
from utils.models.activations import Annealed
from utils.models.ffn import FFN, constrained_weights, feed_forward, set_activation
from utils.models.gated import Rectified
from utils.models.orders import Order, all_plus, check_order
from utils.run.errors import InputError

SMALLEST = 1e-6  # softplus and exp cannot reach zero; about the weight below which a product no longer matters


class Positive(nn.Module):
    """W = sign * f(V) with f(V) >= 0; sign is the order's, +1 or -1 for each entry, in the shape of the stored weight."""

    sign: Tensor | None

    def __init__(self, sign: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        return self.value(v) if self.sign is None else self.sign * self.value(v)

    def right_inverse(self, w: Tensor) -> Tensor:
        return self.inverse(w if self.sign is None else self.sign * w)

    def value(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, w: Tensor) -> Tensor:
        raise NotImplementedError


class Softplus(Positive):
    """W = log(1 + exp V), the parametrisation of arXiv 2602.02686, with a start that is exact and cannot overflow."""

    def value(self, v: Tensor) -> Tensor:
        return nn.functional.softplus(v, threshold=30.0)

    def inverse(self, w: Tensor) -> Tensor:
        """V with softplus(V) = W: W + log(1 - exp(-W)), finite for every W > 0; entries below SMALLEST are raised to it."""
        w = w.clamp(min=SMALLEST)
        return w + torch.log(-torch.expm1(-w))


class Exponential(Positive):
    """W = exp V: a step on V is a relative step on W (exponentiated gradient). Entries below SMALLEST are raised to it."""

    def value(self, v: Tensor) -> Tensor:
        return v.exp()

    def inverse(self, w: Tensor) -> Tensor:
        return w.clamp(min=SMALLEST).log()


class Absolute(Positive):
    """W = |V| (Runje and Shankaranarayana 2023, arXiv 2205.11775): the scale of W, and a reflection at zero."""

    def value(self, v: Tensor) -> Tensor:
        return v.abs()

    def inverse(self, w: Tensor) -> Tensor:
        return w.clamp(min=0.0)


PARAMETRISATIONS: dict[str, type[Positive]] = {"softplus": Softplus, "exp": Exponential, "abs": Absolute}


class Constraint:
    """The constraint on one model: installed when made (on the start, before a checkpoint is loaded); call `project` after every step.

    With `annealed` the bound starts at the violations that the model has now, so that the first step leaves its function as it is, and
    moves linearly to the constraint; the activation does the same at the same time. Until then nothing is certified.
    """

    formulas: ClassVar[dict[str, str]] = {
        "projected": "W >= 0 by projection after every step",
        "softplus": "W = log(1 + exp V)",
        "exp": "W = exp V",
        "abs": "W = |V|",
        "annealed": "W >= a min(W_0, 0) by projection after every step, a from 1 to 0",
    }

    def __init__(self, model: PreTrainedModel, spec: Monotone, order: Order | None = None) -> None:
        if order is None and spec.order != "all_plus":
            raise InputError(f"monotone.order={spec.order!r}: found no stored order, expected the one that stage 1 wrote; run stage 1")
        self.spec, self.model = spec, model
        self.sublayers = feed_forward(model)
        self.order = (order or all_plus(model)).to(self.sublayers[0].out.weight.device)
        check_order(self.order, model, spec)
        self.maps = constrained_weights(model, spec.scope)
        self.share, self.bounds = 0.0, {}
        if spec.parametrisation in PARAMETRISATIONS:
            self._parametrise(PARAMETRISATIONS[spec.parametrisation])
        self.gains = [ffn for ffn in self.sublayers if ffn.gain_parameter is not None]
        if spec.norm_gain == "fold":
            for ffn in self.gains:
                ffn.gain_parameter.requires_grad_(False)  # type: ignore[union-attr]
        if spec.parametrisation == "annealed":
            self.share = 1.0
            self.bounds = {name: self.order.constrained(chosen).detach().clamp(max=0.0).float() for name, chosen in self.maps.items()}
            if spec.activation != "keep":
                self._anneal_activations()

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves: V, or W where it is projected. It must not be decayed (decay on V pulls W away from zero)."""
        modules = [chosen.module for chosen in self.maps.values()]
        if self.spec.parametrisation in PARAMETRISATIONS:
            return [module.parametrizations.weight.original for module in modules]  # type: ignore[union-attr, misc]
        return [module.weight for module in modules]  # type: ignore[misc]

    @property
    def complete(self) -> bool:
        """Whether the bound has arrived: before, an annealed model is not within the constraint and must not be chosen as the best."""
        return self.share == 0.0

    def resume(self, step: int, steps: int) -> None:
        """Stand where `step` steps of `steps` have led, without touching a weight; called after a checkpoint is loaded."""
        if self.spec.parametrisation == "annealed":
            self._move_to(max(0.0, 1.0 - step / (self.spec.anneal_share * steps)))

    @torch.no_grad()
    def project(self, step: int | None = None, steps: int | None = None) -> None:
        """The Euclidean projection on the constraint, or on its annealed bound after the 0-based `step` of `steps`.

        Without arguments the bound is the constraint itself. A parametrisation needs no projection. Nothing waits for the device.
        """
        if self.spec.parametrisation == "annealed":
            self._move_to(0.0 if step is None or steps is None else max(0.0, 1.0 - (step + 1) / (self.spec.anneal_share * steps)))
        if self.spec.parametrisation in ("projected", "annealed"):
            self._project()
        if self.spec.norm_gain == "positive":
            for ffn in self.gains:
                ffn.gain_parameter.clamp_(min=-ffn.gain_offset)  # type: ignore[union-attr]

    def _project(self) -> None:
        if self.share == 0.0 and self.order.kind == "all_plus":
            torch._foreach_clamp_min_([w.to_local() if isinstance(w, DTensor) else w for w in self.parameters], 0.0)
            return
        for name, chosen in self.maps.items():
            floor = self.share * self.bounds[name] if self.share > 0.0 else 0.0
            self.order.project(chosen, floor, (1.0 - self.share) * self.spec.margin)

    def _move_to(self, share: float) -> None:
        if share == self.share:
            return
        self.share = share
        for ffn in self.sublayers:
            if isinstance(ffn.activation, Annealed):
                ffn.activation.share.fill_(share)
            up = ffn.into[-1].module
            if isinstance(up, Rectified) and up.slope is not None:
                up.slope.fill_(share)
        if share == 0.0:
            self.bounds = {}
            if self.spec.activation != "keep":
                for ffn in self.sublayers:
                    _arrive(ffn)

    def _anneal_activations(self) -> None:
        """The configuration of the model names the final activation from here on; it is stored no sooner than it has arrived."""
        old = [ffn.activation for ffn in self.sublayers]
        set_activation(self.model, self.spec.activation)
        name = "relu" if self.spec.activation == "drelu" else self.spec.activation
        for ffn, before in zip(self.sublayers, old, strict=True):
            device = ffn.out.weight.device
            setattr(ffn.holder, ffn.field, Annealed(before, ACT2FN[name]).to(device))
            if self.spec.activation == "drelu":
                ffn.into[1].module.slope = torch.ones((), device=device)

    def _parametrise(self, kind: type[Positive]) -> None:
        first: dict[type, type] = {}
        for chosen in self.maps.values():
            plain, sign = type(chosen.module), None
            if self.order.kind != "all_plus":
                pattern = self.order.sign(chosen) * self.order.axes.to(chosen.by_unit)
                sign = (pattern if chosen.by_unit.is_contiguous() else pattern.T).contiguous()  # in the layout of the stored weight
            parametrize.register_parametrization(chosen.module, "weight", kind(sign))
            # PyTorch makes a class for each, and compiled code is specific to a class
            chosen.module.__class__ = first.setdefault(plain, type(chosen.module))


def _arrive(ffn: FFN) -> None:
    if isinstance(ffn.activation, Annealed):
        setattr(ffn.holder, ffn.field, ffn.activation.new)
    up = ffn.into[-1].module
    if isinstance(up, Rectified):
        up.slope = None
