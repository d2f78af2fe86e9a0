"""Where a constrained model starts: weights within the constraint, from the pretrained ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Monotone
from utils.models.constraints import PARAMETRISATIONS
from utils.models.ffn import FFN, Map, constrained_weights, feed_forward
from utils.models.lift import lift
from utils.models.orders import Order, projected

ITERATIONS = 300  # of accelerated projected gradient
NEGLIGIBLE = 1e-30  # variance of all inputs together below which they count as constant: rounding of means in fp64 leaves as much


@torch.no_grad()
def visit_inputs(model: PreTrainedModel, ids: Tensor, visit: Callable[[FFN, Tensor], None]) -> None:
    """Run the model on ids (B, T) and call `visit` with each sublayer and its inputs x (B*T, d), bottom to top."""

    def seen(ffn: FFN) -> Callable[..., None]:
        return lambda module, inputs, output: visit(ffn, output.flatten(0, -2))

    handles = [ffn.norm.register_forward_hook(seen(ffn)) for ffn in feed_forward(model)]
    try:
        model.base_model(ids)
    finally:
        for handle in handles:
            handle.remove()


def input_covariance(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(d, d) in fp64: covariance of the sublayers' inputs over tokens, centred in each layer, summed over layers."""
    sums: list[Tensor] = []
    visit_inputs(model, ids, lambda ffn, x: sums.append(_cross(x, x)))
    return torch.stack(sums).sum(dim=0)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """x (n, p), y (n, q) -> (p, q) covariance, fp64."""
    x, y = x.double(), y.double()
    return (x - x.mean(dim=0)).T @ (y - y.mean(dim=0)) / len(x)


@torch.no_grad()
def start_within(model: PreTrainedModel, spec: Monotone, order: Order, ids: Tensor, activation: nn.Module | None) -> dict[str, float]:
    """Put the scope's matrices within the constraint, in place; returns for each the share of constrained entries that were outside.

    ids (B, T): calibration tokens for least_squares. activation: the one that will run (None: the model's own).
    """
    maps = constrained_weights(model, spec.scope)
    outside = {name: float((order.constrained(chosen) < 0).double().mean()) for name, chosen in maps.items()}
    if spec.start == "lift":
        lift(model, spec.scope, order)
    elif spec.start == "least_squares":
        _least_squares(model, spec, order, ids, activation)
    elif spec.start == "abs":
        for chosen in maps.values():
            _absolute(chosen, order)
    if spec.start != "base":
        for chosen in maps.values():
            order.project(chosen, margin=spec.margin)
            if kind := PARAMETRISATIONS.get(spec.parametrisation):
                _raise_to_smallest(chosen, order, kind())
    return outside


def _absolute(chosen: Map, order: Order) -> None:
    """Every constrained entry takes the order's sign and keeps its size."""
    by_unit, entries, sign = chosen.by_unit, order.entries(chosen.by_unit), order.sign(chosen).to(torch.float64)
    change = sign * entries.double().abs() - entries.double()
    by_unit.add_((change @ order.axes.to(change).T if order.rotated else change * order.axes.to(change)).to(by_unit.dtype))


def _raise_to_smallest(chosen: Map, order: Order, kind: nn.Module) -> None:
    """The weights that the parametrisation will start with: it cannot reach zero."""
    signs = order.sign(chosen) * order.axes.to(chosen.by_unit)
    entries = chosen.by_unit * signs
    chosen.by_unit.copy_(signs * kind.value(kind.inverse(entries)))  # type: ignore[operator]


def _least_squares(model: PreTrainedModel, spec: Monotone, order: Order, ids: Tensor, activation: nn.Module | None) -> None:
    """Each sublayer's constrained maps imitate the pretrained ones on the pretrained model's own inputs, as far as biases and the mean
    over coordinates, which they and LayerNorm take care of, leave anything to imitate. The output map sees the new hidden units."""
    chosen = set(constrained_weights(model, spec.scope))
    solved: dict[str, Tensor] = {}

    def visit(ffn: FFN, x: Tensor) -> None:
        own = ffn.hidden(x)
        target = own @ ffn.out.weight.T
        inner = _cross(x, x)
        for read in ffn.into:
            if read.name in chosen:
                weight = read.by_unit.double()
                solved[read.name] = nearest(inner, inner @ weight.T, order, order.sign(read), weight, spec.margin)
        if ffn.out.name in chosen:
            weight, centred = ffn.out.by_unit.double(), isinstance(ffn.norm, nn.LayerNorm)
            hidden = _hidden_with(ffn, solved, x, activation, spec.activation == "drelu")
            solved[ffn.out.name] = nearest(
                _cross(hidden, hidden),
                _cross(hidden, target),
                order,
                order.sign(ffn.out),
                weight,
                spec.margin,
                to_outputs=True,
                centred=centred,
            )

    visit_inputs(model, ids, visit)
    for name, solution in solved.items():
        constrained_weights(model, spec.scope)[name].by_unit.copy_(solution)


def _hidden_with(ffn: FFN, solved: dict[str, Tensor], x: Tensor, activation: nn.Module | None, rectified: bool) -> Tensor:
    """What the hidden units will be with the solved matrices, biases re-centred to the old mean pre-activations."""
    branches = []
    for read in ffn.into:
        before = read.module(x)
        after = x @ solved[read.name].to(x).T if read.name in solved else before
        branches.append(after + (before - after).mean(dim=0))
    units = (activation or ffn.activation)(branches[0])
    return units * (branches[1].relu() if rectified else branches[1]) if ffn.gated else units


def nearest(
    inner: Tensor,
    cross: Tensor,
    order: Order,
    sign: Tensor,
    start: Tensor,
    margin: float = 0.0,
    *,
    to_outputs: bool = False,
    centred: bool = False,
) -> Tensor:
    """The matrix by unit, within the constraint, with the least mean square error; by accelerated projected gradient (FISTA, Beck and
    Teboulle 2009), from `start` (m, d), in fp64.

    An into-map reads x: inner = E x x^T (d, d), cross = E x z^T (d, m), z the wanted pre-activations. An out-map (`to_outputs`) reads
    the hidden units a: inner = E a a^T (m, m), cross = E a y^T (m, d); with `centred` errors along all-ones do not count. Inputs that
    do not vary say nothing: the projected start is returned.
    """
    weight = projected(order, start, sign.double(), margin=margin)
    if inner.trace() <= NEGLIGIBLE:
        return weight
    step = 1.0 / _largest_eigenvalue(inner)
    ahead, momentum = weight, 1.0
    for _ in range(ITERATIONS):
        error = inner @ ahead - cross if to_outputs else ahead @ inner - cross.T
        if centred:
            error = error - error.mean(dim=1, keepdim=True)
        better = projected(order, ahead - step * error, sign.double(), margin=margin)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = better + (momentum - 1) / following * (better - weight)
        weight, momentum = better, following
    return weight


def _largest_eigenvalue(inner: Tensor) -> Tensor:
    """Of a positive semidefinite matrix (n, n), not zero, a little above: power iteration, since a decomposition of 8192 x 8192 takes
    minutes."""
    vector = torch.randn(len(inner), 1, generator=torch.Generator().manual_seed(0), dtype=inner.dtype).to(inner.device)
    for _ in range(100):
        vector = inner @ vector
        vector = vector / torch.linalg.vector_norm(vector)  # normalize() would shrink a vector below its eps to nothing
    return 1.05 * torch.linalg.vector_norm(inner @ vector)
