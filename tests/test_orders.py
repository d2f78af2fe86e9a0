"""Orders: exact projections, signs that keep the most energy, directions that LayerNorm can see, and files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from configs.schema import Monotone
from tests.architectures import architecture
from tests.builders import small_model
from utils.models.convert import convert
from utils.models.ffn import feed_forward
from utils.models.orders import Order, all_plus, check_order, choose_order, principal_directions, projected, search_signs
from utils.run.errors import InputError

ORDERS = ("all_plus", "unit_signs", "balanced", "directions")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def an_order(kind: str, width: int = 6) -> Order:
    signs = torch.tensor([1.0, -1.0]).repeat(width // 2)
    axes = {"balanced": signs, "directions": principal_directions(drawn(width, width) @ drawn(width, width).T, 3)}
    return Order(kind, axes.get(kind, torch.ones(width)), {"layer": torch.tensor([1.0, -1.0, 1.0, -1.0])})


def spec(order: str, **settings: object) -> Monotone:
    return Monotone.model_validate({"order": order, **({"directions": 5} if order == "directions" else {}), **settings})


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_the_projection_is_the_nearest_point_that_scipy_finds(kind: str, floor: float) -> None:
    order, weight = an_order(kind), drawn(4, 6, seed=3)
    sign = torch.ones(4, 1) if kind == "all_plus" else order.units["layer"][:, None]
    found = projected(order, weight, sign, floor)
    for row, nearest, t in zip(weight, found, sign, strict=True):
        axes = order.axes.double() if order.rotated else torch.diag(order.axes.double())
        constraint = (t * axes).T.numpy()
        best = minimize(
            lambda w, row=row: ((w - row.numpy()) ** 2).sum(),
            row.numpy(),
            jac=lambda w, row=row: 2 * (w - row.numpy()),
            constraints={"type": "ineq", "fun": lambda w, a=constraint: a @ w - floor, "jac": lambda w, a=constraint: a},
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        assert best.success
        assert torch.allclose(nearest, torch.as_tensor(best.x), atol=1e-6)
        multipliers = axes.T @ (nearest - row) * t  # KKT: what pushes into the set is non-negative, and zero where it is not needed
        assert bool((multipliers > -1e-12).all())
        assert float((multipliers * (t * (nearest @ axes) - floor)).abs().max()) < 1e-12
        assert torch.allclose(axes @ (axes.T @ (nearest - row)), nearest - row)  # nothing orthogonal to the axes changes


@pytest.mark.parametrize("kind", ORDERS)
def test_a_floor_for_each_entry_is_kept_and_projecting_twice_changes_nothing(kind: str) -> None:
    order, weight = an_order(kind), drawn(4, 6, seed=5)
    sign = torch.ones(4, 1, dtype=torch.float64) if kind == "all_plus" else order.units["layer"][:, None].double()
    floor = 0.3 * (sign * order.entries(weight)).clamp(max=0.0)
    found = projected(order, weight, sign, floor)
    entries = sign * order.entries(found)
    assert bool((entries >= floor - 1e-12).all())
    inside = sign * order.entries(weight) >= floor
    assert torch.allclose(entries[inside], (sign * order.entries(weight))[inside])
    assert torch.allclose(projected(order, found, sign, floor), found, atol=1e-12)
    assert float((found - weight).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["balanced", "unit_signs"])
def test_the_fast_way_of_clipping_equals_the_plain_one(kind: str) -> None:
    order, weight = an_order(kind), drawn(4, 6, dtype=torch.float32)
    weight[0, 0], weight[1, 1] = 0.0, -0.0
    sign = order.units["layer"][:, None]
    pattern = sign * order.axes
    expected = torch.where(pattern * weight > 0, weight, 0.0)
    assert torch.equal(projected(order, weight, sign), expected)


@pytest.mark.parametrize("balanced", [False, True])
def test_sign_search_finds_the_maximum_that_trying_all_finds(balanced: bool) -> None:
    squares = [drawn(5, 8, seed=seed, dtype=torch.float32) for seed in (1, 2, 3)]
    axes, units = search_signs(squares, restarts=64, balanced=balanced, seed=0)
    found = sum(float(t @ square @ axes) for square, t in zip(squares, units, strict=True))
    every = torch.tensor(list(itertools.product([1.0, -1.0], repeat=8)))
    every = every[every.sum(dim=1) == 0] if balanced else every
    best = sum((square @ every.T).abs().sum(dim=0) for square in squares).max()  # the best t for s is the sign of S s
    assert found == pytest.approx(float(best), rel=1e-6)
    assert not balanced or float(axes.sum()) == 0
    assert all(bool((t.abs() == 1).all()) for t in units)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_each_order_keeps_the_energy_that_it_says(kind: str) -> None:
    model, kept = architecture(kind), {}
    scope = {"scope": "gated_all"} if kind == "llama" else {}
    for name in ORDERS:
        order, kept[name] = choose_order(model, spec(name, **scope), drawn(16, 16) @ drawn(16, 16).T)
        shares = []
        for ffn in feed_forward(model):
            for chosen in ffn.maps:
                squares = order.constrained(chosen).detach().double()
                shares.append(float((squares.clamp(min=0) ** 2).sum() / (squares**2).sum()))
        assert kept[name] == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert kept["all_plus"] < kept["unit_signs"] < kept["balanced"]
    assert 0.4 < kept["all_plus"] < 0.6


def test_directions_are_the_leading_ones_without_the_mean() -> None:
    x = drawn(400, 9) * torch.logspace(0, 1, 9, dtype=torch.float64) + 50.0  # a large common part that must not win
    x = x + 30 * drawn(400, 1, seed=8)
    covariance = (x - x.mean(dim=0)).T @ (x - x.mean(dim=0)) / 400
    found = principal_directions(covariance, 4)
    assert float((found.T @ found - torch.eye(4, dtype=torch.float64)).abs().max()) < 1e-12
    assert float(found.sum(dim=0).abs().max()) < 1e-12
    centred = x - x.mean(dim=1, keepdim=True)
    centred = centred - centred.mean(dim=0)
    vectors = torch.linalg.svd(centred, full_matrices=False).Vh[:4]
    assert torch.allclose((vectors @ found).abs(), torch.eye(4, dtype=torch.float64), atol=1e-8)
    full = principal_directions(torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0])), 5)  # of rank one: the rest is still mean-free
    assert float((full.T @ full - torch.eye(5, dtype=torch.float64)).abs().max()) < 1e-12
    assert float(full.sum(dim=0).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ORDERS)
def test_an_order_survives_its_file(kind: str, tmp_path: Path) -> None:
    order, _ = choose_order(small_model(), spec(kind), drawn(16, 16) @ drawn(16, 16).T)
    order.save(tmp_path / "order.safetensors")
    again = Order.load(tmp_path / "order.safetensors")
    assert again.kind == kind and torch.equal(again.axes, order.axes)
    assert again.units.keys() == order.units.keys()
    assert all(torch.equal(again.units[name], signs) for name, signs in order.units.items())
    check_order(again, small_model(), spec(kind))


def test_a_file_that_is_no_order_is_refused(tmp_path: Path) -> None:
    (tmp_path / "order.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"order.safetensors: expected the order that stage 1 wrote.*run stage 1 again"):
        Order.load(tmp_path / "order.safetensors")
    with pytest.raises(InputError, match=r"missing.safetensors: expected the order"):
        Order.load(tmp_path / "missing.safetensors")


def test_an_order_of_another_variant_is_refused() -> None:
    model = small_model()
    balanced, _ = choose_order(model, spec("balanced"))
    with pytest.raises(InputError, match=r"monotone.order: found a model converted to 'balanced', expected 'unit_signs'; run stage 1"):
        check_order(balanced, model, spec("unit_signs"))
    wide = Order("balanced", torch.ones(18), balanced.units)
    with pytest.raises(InputError, match=r"order: found axes of shape \(18,\) and 2 sublayers, expected \(16,\) and the 2"):
        check_order(wide, model, spec("balanced"))
    short = Order("balanced", balanced.axes, {name: signs[1:] for name, signs in balanced.units.items()})
    with pytest.raises(InputError, match=r"it belongs to another variant"):
        check_order(short, model, spec("balanced"))
    check_order(all_plus(model), model, spec("all_plus"))


@pytest.mark.parametrize(
    ("kind", "change", "found"),
    [
        ("all_plus", lambda axes, units: axes[2:4].neg_(), r"found 2 axes of 'all_plus' that are not \+1, expected"),
        ("unit_signs", lambda axes, units: axes[2].neg_(), r"found 1 axes of 'unit_signs' that are not \+1, expected"),
        ("unit_signs", lambda axes, units: units[3].zero_(), r"found 1 units of 'unit_signs' that are not \+1 or -1"),
        ("balanced", lambda axes, units: axes[2].mul_(2), r"found 1 axes of 'balanced' that are not \+1 or -1"),
        ("balanced", lambda axes, units: units[:5].fill_(torch.nan), r"found 5 units of 'balanced' that are not \+1 or -1"),
        ("directions", lambda axes, units: axes[3, 1].fill_(torch.nan), r"found directions whose lengths, .* are off by nan, expected"),
        ("directions", lambda axes, units: axes[:, 1].copy_(axes[:, 0]), r"found directions whose lengths, .* are off by 1, expected"),
        ("directions", lambda axes, units: axes.mul_(0.5), r"found directions whose lengths, .* are off by 0.75, expected"),
        ("directions", lambda axes, units: axes[:, 2].fill_(0.25), r"found directions whose lengths, .* are off by 4, expected"),
        ("directions", lambda axes, units: units[1].zero_(), r"found 1 units of 'directions' that are not \+1 or -1"),
    ],
)
def test_an_order_that_is_none_is_refused(kind: str, change: Callable[[Tensor, Tensor], None], found: str) -> None:
    model = small_model()
    order, _ = choose_order(model, spec(kind), drawn(16, 16) @ drawn(16, 16).T)
    check_order(order, model, spec(kind))
    change(order.axes, next(iter(order.units.values()), order.axes))
    with pytest.raises(InputError, match=rf"order: {found}.*run stage 1 again"):
        check_order(order, model, spec(kind))


def test_directions_of_a_model_whose_activations_overflow_are_refused() -> None:
    """Its weights are finite, so nothing before refuses it."""
    model = small_model()
    with torch.no_grad():
        for chosen in (chosen for ffn in feed_forward(model) for chosen in ffn.maps):
            chosen.weight.mul_(1e15)
    with pytest.raises(InputError, match=r"monotone.order: found sublayer inputs whose covariance is NaN or infinite, expected .*check"):
        convert(model, spec("directions"), torch.arange(64).reshape(2, 32))
