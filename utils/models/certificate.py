"""What can be said for certain about monotonicity, computed from the weights that run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Monotone
from utils.models.activations import Annealed, decreases, negative_outputs
from utils.models.ffn import FFN, Map, activation_name, constrained_weights, feed_forward
from utils.models.gated import Rectified
from utils.models.lift import lifted_control
from utils.models.orders import Order, all_plus, check_axes

Range = tuple[Tensor, Tensor]
WORST = -3e38  # stands for NaN and infinite entries, which no comparison would find
WORDS = {
    "all_plus": "product order: every residual coordinate",
    "unit_signs": "product order: every residual coordinate (a sign for each hidden unit)",
    "balanced": "every residual coordinate, half of them reversed",
    "directions": "mean-free directions of the residual stream",
}


@torch.no_grad()
def certify(
    model: PreTrainedModel, scope: str, dtype: torch.dtype, order: Order | None = None, base: PreTrainedModel | None = None
) -> dict[str, Any]:
    """Certificate in `order` (None: the product order) of a model whose matrix products run in `dtype`.

    `constraint_holds`: every matrix in the scope, cast to `dtype`, is finite and has no entry against the order's and its unit's sign.
    `ffn_monotone`: every sublayer N is non-decreasing in the order on all of R^d, its own input x (behind the norm and its gain).
    Sufficient and checked exactly: each hidden unit has a sign t for which t times what it reads and t times what it writes is nowhere
    negative along the order's axes, and the activation is non-decreasing in the implementation that runs. With a gate also: up is
    constrained, and neither factor is ever negative. Weights, biases and the norm are finite, and nothing is being annealed.
    `monotone_before_gain`: the same for the normalised vector, before the norm's gain. `monotone_before_norm` is never claimed.
    `vacuous`: the unconstrained `base`, given the same activation and rewritten without a change of its function (`lift`), passes the
    same test, so that the test by itself restricts nothing. None where no base was given, or nothing holds that could be vacuous.
    Raises InputError if the order is none (`check_axes`).
    """
    order = (order or all_plus(model)).to(model.device)
    check_axes(order)
    own = _tests(model, scope, dtype, order)
    found: dict[str, Any] = {
        "constraint_holds": own["constraint_holds"],
        "ffn_monotone": own["ffn_monotone"],
        "vacuous": None,
        "monotone_before_gain": all(layer["monotone_before_gain"] for layer in own["layers"]),
        "monotone_before_norm": False,
        "order": WORDS[order.kind] + (f" ({order.size} of {order.axes.shape[0]})" if order.rotated else ""),
        "order_kind": order.kind,
        "input_space": "each sublayer's own input, behind its norm",
        "set": "all of R^d",
        "method": f"signs of all entries along the order's axes, weights cast to {str(dtype).removeprefix('torch.')}; activation on all "
        "finite bf16 numbers",
        "covers": "the feed-forward sublayers only; norms and attention are not monotone",
        "scope": scope,
        "dtype": str(dtype).removeprefix("torch."),
        "smallest_margin": min(layer["smallest_margin"] for layer in own["layers"]),
    }
    if base is not None:
        found |= _control(base, model, scope, dtype, order, own)
    return found | own


def _control(
    base: PreTrainedModel, model: PreTrainedModel, scope: str, dtype: torch.dtype, order: Order, own: dict[str, Any]
) -> dict[str, Any]:
    control, facts = lifted_control(base, activation_name(model), scope, order)
    theirs = _tests(control, scope, dtype, order)
    passes = {key: bool(theirs[key]) for key in ("constraint_holds", "ffn_monotone")}
    same_test = all(passes[key] or not own[key] for key in passes)
    vacuous = (bool(facts["same_function"]) and same_test) if any(own[key] for key in passes) else None
    return {"vacuous": vacuous, "lifted_base": facts | passes | {"minimum": theirs["minimum"]}}


def outside(certificate: dict[str, Any], spec: Monotone) -> str:
    """What is wrong with a model whose constraint does not hold, and what to do."""
    if broken := certificate["not_finite_entries"]:
        return (
            f"{broken} constrained entries are not finite in {certificate['dtype']}, expected none; look for huge weights in the base model"
        )
    cure = (
        f"raise monotone.margin (now {spec.margin:g})" if spec.order == "directions" else "this is a fault of the program, please report it"
    )
    return (
        f"{certificate['negative_entries']} constrained entries are outside (smallest margin {certificate['minimum']:.3g}), expected none; "
        f"{cure}"
    )


def _tests(model: PreTrainedModel, scope: str, dtype: torch.dtype, order: Order) -> dict[str, Any]:
    falls, scope_maps, ranges = _Falls(dtype), constrained_weights(model, scope), dict[str, Range]()
    layers = []
    for ffn in feed_forward(model):
        own = {chosen.name: _range(chosen, dtype, order) for chosen in ffn.maps}
        layers.append(_layer(ffn, dtype, order, falls, list(own.values())))
        ranges |= own
    scoped = {}
    for name, chosen in scope_maps.items():
        scoped[name] = _facts(chosen, dtype, order, ranges[name] if name in ranges else _range(chosen, dtype, order))
    return {
        "constraint_holds": all(facts["negative"] == 0 for facts in scoped.values()),
        "ffn_monotone": all(layer["monotone"] for layer in layers),
        "minimum": min(facts["minimum"] for facts in scoped.values()),
        "negative_entries": sum(facts["negative"] for facts in scoped.values()),
        "not_finite_entries": sum(facts["not_finite"] for facts in scoped.values()),
        "entries": sum(facts["entries"] for facts in scoped.values()),
        "reasons": sorted({reason for layer in layers for reason in layer["reasons"]}),
        "matrices": scoped,
        "layers": layers,
    }


class _Falls:
    """How an activation falls on the whole grid; computed once for each kind."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.known = dtype, dict[str, tuple[int, float, bool]]()

    def __call__(self, activation: nn.Module, device: torch.device) -> tuple[int, float, bool]:
        if repr(activation) not in self.known:
            facts = *decreases(activation, self.dtype, device), negative_outputs(activation, self.dtype, device)
            self.known[repr(activation)] = facts
        return self.known[repr(activation)]


def _range(chosen: Map, dtype: torch.dtype, order: Order, gain: Tensor | None = None) -> Range:
    """(m,), (m,): for each unit the margin of its entries along the order's axes with sign plus (their minimum) and with minus; both
    NaN where an entry is NaN or infinite. From the weight that runs."""
    entries = _cast(chosen, dtype, order, gain)
    plus, minus = entries.amin(dim=1).double(), -entries.amax(dim=1).double()  # five times as fast as torch.aminmax on a CPU
    broken = 0.0 * plus + 0.0 * minus  # zero, or NaN: zero times infinity
    return plus + broken, minus + broken


def _cast(chosen: Map, dtype: torch.dtype, order: Order, gain: Tensor | None = None) -> Tensor:
    """(m, d or k): the map's entries along the order's axes, from the weight that runs (times the gain in front of it)."""
    by_unit = chosen.by_unit.to(dtype)
    if gain is not None:
        by_unit = by_unit.double() * gain.double()
    return by_unit if order.kind in ("all_plus", "unit_signs") else order.entries(by_unit)


def _facts(chosen: Map, dtype: torch.dtype, order: Order, own: Range) -> dict[str, Any]:
    """Entries, how many are against the order's and their unit's sign or not finite, how many the latter, and the smallest one, with
    the sign plus for right (WORST if one is not finite)."""
    sign = order.sign(chosen)
    margins = torch.where(sign[:, 0] > 0, *own)
    entries, negative, not_finite = len(margins) * order.size, 0, 0
    if not bool((margins >= 0).all()):
        signed = _cast(chosen, dtype, order) * sign.to(dtype)
        finite = signed.isfinite()
        negative, not_finite = entries - int(((signed >= 0) & finite).sum()), entries - int(finite.sum())
    return {"entries": entries, "negative": negative, "not_finite": not_finite, "minimum": _smallest(margins)}


def _smallest(entries: Tensor) -> float:
    return float(torch.nan_to_num(entries.amin(), nan=WORST, neginf=WORST)) + 0.0  # no minus zero


def _layer(ffn: FFN, dtype: torch.dtype, order: Order, activation_falls: _Falls, ranges: list[Range]) -> dict[str, Any]:
    falls, deepest, negative = activation_falls(ffn.activation, ffn.out.weight.device)
    reasons, gain = _not_finite(ffn, dtype), ffn.gain().detach()
    if isinstance(ffn.activation, Annealed):
        reasons.append("the activation is still being annealed")
    if falls:
        reasons.append(f"the activation {type(ffn.activation).__name__} decreases ({falls} places, by up to {deepest:.3g})")
    if ffn.gated and negative:
        reasons.append(f"the gate {type(ffn.activation).__name__} may be negative, which reverses what it multiplies")
    if ffn.gated and not isinstance(ffn.into[1].module, Rectified):
        reasons.append("the map beside the gate may give negative numbers, which reverses the gate")
    elif ffn.gated and ffn.into[1].module.slope is not None:
        reasons.append("the relu beside the gate is still being annealed, and may give negative numbers")
    plus, minus = (torch.stack(side, dim=1) for side in zip(*ranges, strict=True))  # (m, maps): margins of the units, t = +1 and t = -1
    margins = torch.maximum(plus.amin(dim=1), minus.amin(dim=1))
    wrong = int((~(margins >= 0)).sum())
    if wrong:
        reasons += _where(ffn, plus, minus)
    before_gain = not reasons and _holds_before_gain(ffn, dtype, order, gain, ranges[-1])
    return {
        "name": ffn.name,
        "monotone": not reasons,
        "monotone_before_gain": before_gain,
        "reasons": reasons,
        "units": len(margins),
        "units_without_a_sign": wrong,
        "smallest_margin": _smallest(margins),
        "activation_decreases": falls,
        "mean_subtracting_norm": isinstance(ffn.norm, nn.LayerNorm),
        "smallest_norm_gain": _smallest(gain),
    }


def _places(ffn: FFN) -> list[str]:
    """Words for `ffn.maps`."""
    places = ["into", "out of"] if not ffn.gated else ["into the gate of", "beside the gate into", "out of"]
    return [f"the map {place} the hidden layer" for place in places]


def _not_finite(ffn: FFN, dtype: torch.dtype) -> list[str]:
    """Which biases (cast to `dtype`), and whether the norm's gain or shift, have entries that are NaN or infinite."""
    names, vectors = [], []
    for place, chosen in zip(_places(ffn), ffn.maps, strict=True):
        if chosen.bias is not None:
            names.append(f"the bias of {place}")
            vectors.append(chosen.bias.to(dtype))
    for name, vector in (("gain", ffn.gain_parameter), ("shift", ffn.shift_parameter)):
        if vector is not None:
            names.append(f"the norm's {name}")
            vectors.append(vector)
    if not vectors:
        return []
    finite = torch.stack([vector.isfinite().all() for vector in vectors]).tolist()  # the device is waited for once
    return [f"{name} has entries that are NaN or infinite" for name, fine in zip(names, finite, strict=True) if not fine]


def _where(ffn: FFN, plus: Tensor, minus: Tensor) -> list[str]:
    """Which maps have entries that are not finite or of both signs in one unit; if none has, the maps of a unit contradict each other."""
    best, named = torch.maximum(plus, minus), []
    broken, mixed = best.isnan().any(dim=0).tolist(), (best < 0).any(dim=0).tolist()
    for place, is_broken, is_mixed in zip(_places(ffn), broken, mixed, strict=True):
        if is_broken:
            named.append(f"{place} has entries that are NaN or infinite")
        if is_mixed:
            named.append(f"{place} has negative entries")
    return named or ["the maps into and out of the hidden layer have negative entries: opposite signs in one unit"]


def _holds_before_gain(ffn: FFN, dtype: torch.dtype, order: Order, gain: Tensor, out: Range) -> bool:
    """The unit test once more, with the gain multiplied into what is read, in fp64. A gain that is nowhere negative keeps all signs."""
    if not order.rotated and bool((gain >= 0).all()):
        return True
    ranges = [*(_range(chosen, dtype, order, gain) for chosen in ffn.into), out]
    plus, minus = (torch.stack(side).amin(dim=0) for side in zip(*ranges, strict=True))
    return bool((torch.maximum(plus, minus) >= 0).all())
