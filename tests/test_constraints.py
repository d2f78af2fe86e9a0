"""Softplus and projection: exact starts, weights that stay non-negative, parameters that can move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Experiment, Monotone
from tests.builders import VOCABULARY, small_model
from utils.models.constraints import SMALLEST, Constraint, Softplus
from utils.models.ffn import constrained_weights
from utils.models.likelihood import cross_entropy_sum
from utils.models.orders import all_plus
from utils.models.starts import start_within
from utils.training import optim

SCOPES = ("mlp_in", "mlp_both", "mlp_in_attn_out")
OPTIMISERS: list[Callable[[list[Tensor]], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=3.0, momentum=0.9),
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
]


def spec(parametrisation: str, scope: str = "mlp_both", **settings: str) -> Monotone:
    return Monotone.model_validate({"parametrisation": parametrisation, "scope": scope, **settings})


def non_negative_start(model: PreTrainedModel, settings: Monotone) -> dict[str, float]:
    return start_within(model, settings, all_plus(model), torch.zeros(1, 1, dtype=torch.long), None)


def loss(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (4, 13), generator=torch.Generator().manual_seed(1))
    return cross_entropy_sum(model(ids[:, :-1]).logits, ids[:, 1:]) / 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_softplus_is_exact_and_never_overflows(dtype: torch.dtype) -> None:
    w = torch.cat([torch.logspace(-6, 4, 1001, dtype=torch.float64), torch.tensor([0.6931, 1.0, 29.99, 30.01, 88.0, 89.0, 100.0, 1e30])])
    softplus = Softplus()
    v = softplus.right_inverse(w.to(dtype))
    assert bool(torch.isfinite(v).all())
    back = softplus(v).double()
    assert float(((back - w) / w).abs().max()) < (2e-6 if dtype == torch.float32 else 1e-9)
    exact = torch.log(torch.expm1(w[w < 500]))  # the textbook inverse, which overflows beyond
    assert torch.allclose(v[: len(w)][w < 500].double(), exact, rtol=1e-5, atol=1e-6)


def test_zero_and_negative_weights_start_at_the_smallest() -> None:
    softplus = Softplus()
    v = softplus.right_inverse(torch.tensor([0.0, -1.0, SMALLEST]))
    assert torch.allclose(softplus(v), torch.full((3,), SMALLEST), rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_softplus_starts_where_the_weights_are(scope: str) -> None:
    model = small_model()
    shares = non_negative_start(model, spec("softplus", scope))
    before = {name: linear.weight.clone() for name, linear in constrained_weights(model, scope).items()}
    constraint = Constraint(model, spec("softplus", scope))
    assert before.keys() == constraint.maps.keys() == shares.keys()
    for name, linear in constraint.maps.items():
        assert torch.allclose(linear.weight, before[name], rtol=3e-6, atol=0)
        assert bool((linear.weight > 0).all())
    trained = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in trained for parameter in constraint.parameters)


@pytest.mark.parametrize(("parametrisation", "start"), [("projected", "clamp"), ("projected", "abs"), ("softplus", "abs")])
def test_the_non_negative_start(parametrisation: str, start: str) -> None:
    model, base = small_model(), small_model()
    shares = non_negative_start(model, spec(parametrisation, start=start))
    originals = dict(base.named_parameters())
    for name, linear in constrained_weights(model, "mlp_both").items():
        old = originals.pop(f"{name}.weight").detach()
        expected = [[abs(w) if start == "abs" else max(w, 0.0) for w in row] for row in old.tolist()]
        assert torch.allclose(linear.weight, torch.tensor(expected), rtol=1e-5, atol=1.1 * SMALLEST if parametrisation == "softplus" else 0)
        assert shares[name] == pytest.approx(sum(w < 0 for row in old.tolist() for w in row) / old.numel())
        assert 0.3 < shares[name] < 0.7
    untouched = dict(model.named_parameters())
    assert all(torch.equal(old, untouched[name]) for name, old in originals.items())


def test_fp32_masters_move_at_a_small_rate_and_bf16_ones_cannot(tiny: Experiment) -> None:
    def moved(dtype: torch.dtype) -> list[float]:
        model = small_model()
        non_negative_start(model, spec("softplus", start="abs"))
        constraint = Constraint(model, spec("softplus"))
        model.to(dtype)
        optimizer = optim.build(model, constraint.parameters, tiny.training)
        for group in optimizer.param_groups:
            group["lr"] = 5e-5
        before = [parameter.detach().clone() for parameter in constraint.parameters]
        loss(model).backward()
        optimizer.step()
        pairs = zip(constraint.parameters, before, strict=True)
        return [float((parameter != old)[old.abs() > 0.5].double().mean()) for parameter, old in pairs]

    assert min(moved(torch.float32)) > 0.99
    assert max(moved(torch.bfloat16)) == 0.0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("make", OPTIMISERS)
def test_projection_keeps_weights_non_negative_whatever_the_optimiser(make: Callable, scope: str) -> None:
    model = small_model()
    non_negative_start(model, spec("projected", scope))
    constraint = Constraint(model, spec("projected", scope))
    optimizer = make(list(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        stepped = [parameter.detach().clone() for parameter in constraint.parameters]
        assert min(float(weight.min()) for weight in stepped) < 0  # the step alone leaves the set
        constraint.project()
        for parameter, weight in zip(constraint.parameters, stepped, strict=True):
            assert torch.equal(parameter, torch.maximum(weight, torch.zeros(())))
    assert all(float(linear.weight.detach().min()) >= 0 for linear in constrained_weights(model, scope).values())


def test_softplus_stays_non_negative_under_large_steps() -> None:
    model = small_model()
    non_negative_start(model, spec("softplus"))
    constraint = Constraint(model, spec("softplus"))
    optimizer = torch.optim.SGD(constraint.parameters, lr=1000.0)
    loss(model).backward()
    optimizer.step()
    before = [parameter.detach().clone() for parameter in constraint.parameters]
    constraint.project()
    assert all(torch.equal(parameter, old) for parameter, old in zip(constraint.parameters, before, strict=True))
    assert all(float(linear.weight.detach().min()) >= 0 for linear in constraint.maps.values())


def test_the_start_suits_the_parametrisation() -> None:
    assert (spec("projected").start, spec("softplus").start) == ("clamp", "abs")
    with pytest.raises(ValueError, match=r"start='clamp' freezes every clamped entry under softplus .*; expected start='abs'"):
        spec("softplus", start="clamp")
