"""The orders in which a feed-forward sublayer is made monotone, and the exact projection onto each.

x <= y means that y - x lies in a cone. d is the width, m the hidden units of a sublayer, W (m, d) a matrix by unit (`Map.by_unit`:
W1 as it is, W2 transposed). With a sign t_j for each unit, the sublayer is monotone if

* coordinates, signs s (d,): cone {s * u, u >= 0}, and t_j s_k W[j, k] >= 0 for both maps;
* directions, B (d, k) orthonormal: cone {B u, u >= 0}, and t_j (W B)[j, l] >= 0 for both; what is orthogonal to B is free. Outputs are
  compared along B: B^T N(x) <= B^T N(y).

A unit with t_j = -1 gives -s(b - ...): falling in each coordinate, written with a minus. Signs are chosen to keep the most energy
(sum of squares) of the pretrained entries, by alternating between s and t over all layers. Half of the signs of `balanced` are minus and
directions have mean zero: then the all-ones vector, along which LayerNorm sees nothing, is no way around the constraint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Monotone
from utils.models.ffn import FFN, Map, feed_forward
from utils.run.artifacts import published
from utils.run.errors import InputError

BF16_ROUNDING = 2.0**-9  # largest relative error of rounding to the nearest bf16 number
ROUNDS = 50  # of the alternation; it stops by itself after about ten
ORTHONORMAL = 1e-6  # largest error of lengths, angles and sums of directions, which are computed in fp64
_AGAIN = "its file is damaged, run stage 1 again"


@dataclass(frozen=True)
class Order:
    """`axes`: signs (d,), or orthonormal directions (d, k) in fp64. `units`: {sublayer: signs t (m,)}."""

    kind: str
    axes: Tensor
    units: Mapping[str, Tensor]

    @property
    def rotated(self) -> bool:
        return self.axes.ndim == 2

    def entries(self, by_unit: Tensor) -> Tensor:
        """(m, d) -> (m, d) or (m, k): how each unit and each axis act on one another, before the unit's sign. Rotated ones in fp64."""
        return by_unit.double() @ self.axes.to(by_unit.device) if self.rotated else by_unit * self.axes.to(by_unit)

    def sign(self, chosen: Map) -> Tensor:
        """(m, 1) signs of the units of a map; plus for attention's inner coordinates."""
        weight = chosen.by_unit
        if chosen.sublayer not in self.units:
            return weight.new_ones(len(weight), 1)
        return self.units[chosen.sublayer].to(weight)[:, None]

    def constrained(self, chosen: Map) -> Tensor:
        """(m, d) or (m, k): what must not be negative."""
        entries = self.entries(chosen.by_unit)
        return entries if self.kind == "all_plus" else self.sign(chosen).to(entries.dtype) * entries

    @torch.no_grad()
    def project(self, chosen: Map, floor: Tensor | float = 0.0, margin: float = 0.0) -> None:
        """Replace the map's weight in place by the nearest (Euclidean) one with `constrained` >= floor + margin (see `projected`)."""
        projected(self, chosen.by_unit, self.sign(chosen), floor, margin, out=chosen.by_unit)

    def readout(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d) or (..., k): coordinates in which the order is compared."""
        return x @ self.axes.to(x) if self.rotated else x * self.axes.to(x)

    def cone(self, u: Tensor) -> Tensor:
        """u (..., d or k) >= 0 -> the vector (..., d) of the cone that it stands for."""
        return u @ self.axes.to(u).T if self.rotated else u * self.axes.to(u)

    def to(self, device: torch.device) -> Order:
        """The same order on a device, where its tensors are needed at every step."""
        return Order(self.kind, self.axes.to(device), {name: signs.to(device) for name, signs in self.units.items()})

    @property
    def size(self) -> int:
        """Number of axes."""
        return self.axes.shape[-1]

    def save(self, path: Path) -> None:
        tensors = {"axes": self.axes.cpu().contiguous()} | {f"units.{name}": signs.cpu().contiguous() for name, signs in self.units.items()}
        with published(path) as aside:
            save_file(tensors, aside, metadata={"kind": self.kind})

    @classmethod
    def load(cls, path: Path) -> Order:
        try:
            with safe_open(path, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
                kind = stored.metadata()["kind"]
            return cls(kind, tensors.pop("axes"), {name.removeprefix("units."): signs for name, signs in tensors.items()})
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expected the order that stage 1 wrote: {error}; run stage 1 again") from None


@torch.no_grad()
def projected(
    order: Order, by_unit: Tensor, sign: Tensor, floor: Tensor | float = 0.0, margin: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """by_unit (m, d), sign (m, 1), floor broadcastable to the constrained entries -> the nearest matrix within the constraint.

    Coordinates are clipped. For directions W + (clip(U) - U) B^T with U = W B: it changes U to clip(U), since B^T B = 1, and nothing
    orthogonal to B; computed in fp64, so that only the rounding of W to the format that runs is left. For that is the margin, in units
    of BF16_ROUNDING |w| for a row w: since each entry is rounded by a share of itself and each column of B has length 1, no entry of
    W B moves by more.
    """
    out = by_unit.clone() if out is None else out
    if order.rotated:
        entries, sign = order.entries(by_unit), sign.double()
        if margin:
            floor = floor + margin * BF16_ROUNDING * torch.linalg.vector_norm(by_unit, dim=1, keepdim=True, dtype=torch.float64)
        excess = sign * torch.clamp(floor - sign * entries, min=0.0)
        return out.add_((excess @ order.axes.to(excess).T).to(out.dtype))
    if order.kind == "all_plus":
        return out.copy_(by_unit.clamp(min=floor) if isinstance(floor, float) else torch.maximum(by_unit, floor))
    if isinstance(floor, float) and floor == 0.0:
        wrong = torch.signbit(by_unit) ^ (sign < 0) ^ (order.axes.to(by_unit) < 0)
        return out.copy_(by_unit).masked_fill_(wrong, 0.0)
    signs = sign * order.axes.to(by_unit)
    return out.copy_(signs * torch.clamp(signs * by_unit, min=floor))


def check_order(order: Order, model: PreTrainedModel, spec: Monotone) -> None:
    """Raise InputError if an order is not the configured one, is for a model of another shape, or is none (`check_axes`)."""
    if order.kind != spec.order:
        raise InputError(f"monotone.order: found a model converted to {order.kind!r}, expected {spec.order!r}; run stage 1 again")
    sublayers = feed_forward(model)
    shape = (sublayers[0].width, *((spec.directions,) if spec.order == "directions" else ()))
    units = {ffn.name: len(ffn.out.by_unit) for ffn in sublayers}
    stored = {name: len(signs) for name, signs in order.units.items()}
    if tuple(order.axes.shape) != shape or (order.kind != "all_plus" and stored != units):
        raise InputError(
            f"order: found axes of shape {tuple(order.axes.shape)} and {len(stored)} sublayers, expected {shape} and the {len(units)} "
            "sublayers of the model; it belongs to another variant, run stage 1 again"
        )
    check_axes(order)


@torch.no_grad()
def check_axes(order: Order) -> None:
    """Raise InputError if the axes and units of an order are not what its kind says: signs +1 or -1 (+1 for all axes of `all_plus` and
    `unit_signs`, and for units of `all_plus`), or directions that are orthonormal and have mean zero."""
    axes, kind, units = order.axes, order.kind, list(order.units.values())
    if order.rotated != (kind == "directions"):
        raise InputError(
            f"order: found axes of shape {tuple(axes.shape)} for {kind!r}, expected (d, k) for 'directions' and else (d,); {_AGAIN}"
        )
    if order.rotated:
        error = max(float((axes.T @ axes - torch.eye(order.size).to(axes)).abs().max()), float(axes.sum(dim=0).abs().max()))
        if not error <= ORTHONORMAL:
            raise InputError(
                f"order: found directions whose lengths, angles or sums are off by {error:.3g}, expected finite orthonormal ones of mean "
                f"zero, to {ORTHONORMAL:g}; {_AGAIN}"
            )
    else:
        _check_signs("axes", axes, plus=kind in ("all_plus", "unit_signs"), kind=kind)
    if units:
        _check_signs("units", torch.cat(units), plus=kind == "all_plus", kind=kind)


def _check_signs(what: str, signs: Tensor, *, plus: bool, kind: str) -> None:
    if wrong := int(((signs if plus else signs.abs()) != 1).sum()):
        raise InputError(f"order: found {wrong} {what} of {kind!r} that are not {'+1' if plus else '+1 or -1'}, expected none; {_AGAIN}")


def all_plus(model: PreTrainedModel) -> Order:
    """The product order: W >= 0."""
    width = feed_forward(model)[0].width
    return Order("all_plus", torch.ones(width), {})


@torch.no_grad()
def choose_order(model: PreTrainedModel, spec: Monotone, covariance: Tensor | None = None, seed: int = 0) -> tuple[Order, float]:
    """The configured order for the weights of `model`, and the share of their energy that it keeps.

    covariance (d, d): of the sublayers' inputs, centred by layer and summed over layers; needed by `directions` alone.
    """
    sublayers = feed_forward(model)
    device, width = sublayers[0].out.weight.device, sublayers[0].width
    if spec.order == "all_plus":
        squares = [_signed_squares(ffn, None) for ffn in sublayers]
        kept = _kept(squares, torch.ones(width, device=device), [torch.ones(len(square), device=device) for square in squares])
        return all_plus(model), kept
    basis = None if spec.order != "directions" else principal_directions(_needed(covariance), spec.directions)
    squares = [_signed_squares(ffn, basis) for ffn in sublayers]
    if spec.order == "unit_signs":
        axes = torch.ones(width, device=device)
        units = [_signs(square @ axes) for square in squares]
    else:
        axes, units = search_signs(squares, spec.sign_restarts, spec.order == "balanced", seed)
    kept = _kept(squares, axes, units)
    named = {ffn.name: signs.cpu().float() for ffn, signs in zip(sublayers, units, strict=True)}
    chosen = axes.cpu().float() if basis is None else (basis * axes.to(basis)).cpu()
    return Order(spec.order, chosen, named), kept


def principal_directions(covariance: Tensor, count: int) -> Tensor:
    """covariance (d, d) -> (d, count) orthonormal in fp64, each with mean zero: the leading ones of what is orthogonal to all-ones.
    Raises InputError if the covariance is not finite."""
    covariance, width = covariance.double(), len(covariance)
    mean = torch.full_like(covariance, 1.0 / width)
    centre = torch.eye(width, dtype=torch.float64, device=covariance.device) - mean
    centred = centre @ covariance @ centre - (1.0 + covariance.trace()) * mean  # all-ones comes last, whatever the rank
    if not bool(centred.isfinite().all()):
        raise InputError(
            "monotone.order: found sublayer inputs whose covariance is NaN or infinite, expected finite ones to take directions from; the "
            "base model's activations overflow: check its weights for huge entries, or choose another order"
        )
    leading = centre @ torch.linalg.eigh((centred + centred.T) / 2).eigenvectors.flip(1)[:, :count]
    return torch.linalg.qr(leading).Q


@torch.no_grad()
def search_signs(squares: list[Tensor], restarts: int, balanced: bool, seed: int) -> tuple[Tensor, list[Tensor]]:
    """squares: signed squares S (m, d) by layer -> axes s (d,) and units t, a (m,) by layer, that make the sum of t^T S s large.

    Alternating maximisation from random starts, all at once: the best t for s is sign(S s), the best s for t the sign of S^T t, or for
    `balanced` plus for the larger half of it. Each round can only raise the sum. The global maximum is hard (bipartite max-cut).
    """
    device, width = squares[0].device, squares[0].shape[1]
    draws = torch.rand(width, restarts, generator=torch.Generator().manual_seed(seed)).to(device)
    axes = _best_axes(draws - 0.5, balanced)
    for _ in range(ROUNDS):
        pulls = sum(square.T @ _signs(square @ axes) for square in squares)
        better = _best_axes(torch.as_tensor(pulls), balanced)
        if torch.equal(better, axes):
            break
        axes = better
    totals = torch.stack([(square @ axes).abs().sum(dim=0) for square in squares]).sum(dim=0)
    best = axes[:, int(totals.argmax())]
    return best, [_signs(square @ best) for square in squares]


def _best_axes(pulls: Tensor, balanced: bool) -> Tensor:
    """pulls (d, R) -> signs (d, R)."""
    if not balanced:
        return _signs(pulls)
    plus = pulls.argsort(dim=0, descending=True, stable=True)[: len(pulls) // 2]
    return torch.full_like(pulls, -1.0).scatter_(0, plus, 1.0)


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def _signed_squares(ffn: FFN, basis: Tensor | None) -> Tensor:
    """(m, d) or (m, k): e |e| of the entries, each map divided by its energy so that all count alike, summed over the maps."""
    total: Tensor | None = None
    for chosen in ffn.maps:
        entries = chosen.by_unit.float() if basis is None else (chosen.by_unit.double() @ basis).float()
        squares = entries * entries.abs() / entries.square().sum().clamp(min=1e-30)
        total = squares if total is None else total + squares
    return _needed(total) / len(ffn.maps)


def _kept(squares: list[Tensor], axes: Tensor, units: list[Tensor]) -> float:
    """Share of the energy of entries whose sign is right: kept - lost = t^T S s, kept + lost = 1 for each layer."""
    excess = sum(float(sign @ square @ axes) for square, sign in zip(squares, units, strict=True))
    return (1 + excess / len(squares)) / 2


def _needed(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("order='directions' needs the covariance of the sublayers' inputs")
    return value
