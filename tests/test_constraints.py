"""Softplus and projection: exact starts, weights that stay non-negative, parameters that can move."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Experiment, Monotone
from tests.architectures import architecture
from tests.builders import VOCABULARY, non_negative_start, small_model
from utils.models.activations import Annealed
from utils.models.certificate import certify
from utils.models.constraints import SMALLEST, Absolute, Constraint, Exponential, Positive, Softplus
from utils.models.convert import convert
from utils.models.ffn import constrained_weights, feed_forward
from utils.models.loading import plain_state
from utils.models.orders import choose_order
from utils.models.starts import start_within
from utils.run.errors import InputError
from utils.training import optim

IDS = torch.randint(0, 53, (4, 20), generator=torch.Generator().manual_seed(0))
SCOPES = ("mlp_in", "mlp_both", "mlp_in_attn_out")
OPTIMISERS: list[Callable[[list[Tensor]], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=3.0, momentum=0.9),
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
]


def spec(parametrisation: str, scope: str = "mlp_both", **settings: str) -> Monotone:
    return Monotone.model_validate({"parametrisation": parametrisation, "scope": scope, **settings})


def loss(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (4, 13), generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())


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


@pytest.mark.parametrize("kind", [Exponential, Absolute, Softplus])
@pytest.mark.parametrize("sign", [None, -1.0])
def test_every_parametrisation_gives_back_what_it_was_given(kind: type[Positive], sign: float | None) -> None:
    w = torch.cat([torch.logspace(-5, 3, 50), torch.tensor([1.0, 20.0])]) * (sign or 1.0)
    function = kind(None if sign is None else torch.full_like(w, sign))
    assert torch.allclose(function(function.right_inverse(w)), w, rtol=1e-5)
    assert bool((function(torch.randn(100) if sign is None else torch.randn_like(w)) * (sign or 1.0) >= 0).all())


@pytest.mark.parametrize("parametrisation", ["softplus", "exp", "abs", "projected"])
@pytest.mark.parametrize("order", ["all_plus", "unit_signs", "balanced"])
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_weights_stay_within_every_order_of_coordinates(parametrisation: str, order: str, kind: str) -> None:
    scope = "gated_all" if kind == "llama" else "mlp_both"
    model, settings = architecture(kind), spec(parametrisation, scope, order=order)
    chosen_order, _ = choose_order(model, settings)
    start_within(model, settings, chosen_order, IDS, None)
    before = {name: chosen.by_unit.detach().clone() for name, chosen in constrained_weights(model, scope).items()}
    constraint = Constraint(model, settings, chosen_order)
    names = {name for name, _ in model.named_parameters()}
    for name, chosen in constraint.maps.items():
        assert torch.allclose(chosen.by_unit, before[name], rtol=1e-4, atol=1e-7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        constraint.project(step, 2)
    assert {name for name, _ in model.named_parameters()} == names
    for name, chosen in constraint.maps.items():
        assert not torch.allclose(chosen.by_unit, before[name], atol=0.02)
        assert float(chosen_order.constrained(chosen).detach().min()) >= 0
    state = plain_state(model)
    assert set(state) == set(architecture(kind).state_dict())
    stored = architecture(kind)
    stored.load_state_dict(state)
    assert torch.allclose(stored(IDS).logits, model(IDS).logits, atol=1e-5)


ANNEALED = [
    ("all_plus", "clamped_gelu"),
    ("unit_signs", "relu"),
    ("balanced", "clamped_gelu"),
    ("directions", "clamped_gelu"),
    ("balanced", "keep"),
]


def annealed(order: str, activation: str, kind: str = "gpt_neox") -> tuple[PreTrainedModel, Constraint]:
    options = {"scope": "gated_all", "recentre": False} if kind == "llama" else {}
    options |= {"directions": 5, "norm_gain": "free"} if order == "directions" else {}
    settings = Monotone.model_validate({"parametrisation": "annealed", "order": order, "activation": activation, **options})
    model = architecture(kind)
    chosen, _ = choose_order(model, settings, torch.eye(16))
    return model, Constraint(model, settings, chosen)


@pytest.mark.parametrize(("order", "activation"), [*ANNEALED, ("unit_signs", "drelu")])
def test_annealing_starts_at_the_base_and_arrives_at_the_constraint(order: str, activation: str) -> None:
    kind = "llama" if activation == "drelu" else "gpt_neox"
    model, constraint = annealed(order, activation, kind)
    base = architecture(kind)
    assert not constraint.complete
    assert torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-5)  # at the start the function is the base's
    worst = {name: float(constraint.order.constrained(chosen).detach().min()) for name, chosen in constraint.maps.items()}
    for step in range(10):  # anneal_share is 0.4: the bound arrives after four steps of ten
        for parameter in constraint.parameters:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        constraint.project(step, 10)
        share = max(0.0, 1 - (step + 1) / 4)
        for name, chosen in constraint.maps.items():
            low = float(constraint.order.constrained(chosen).detach().min())
            assert low >= share * worst[name] - (1e-6 if share else 0.0)
        assert constraint.complete == (step >= 3)
        inner = feed_forward(model)[0].activation
        if activation == "keep":
            assert type(inner) is type(feed_forward(base)[0].activation)
        elif share:
            assert isinstance(inner, Annealed) and float(inner.share) == pytest.approx(share)
        else:
            assert not isinstance(inner, Annealed)
            assert certify(model, constraint.spec.scope, torch.float32, constraint.order)["ffn_monotone"]
    assert all("share" not in name and "slope" not in name for name in model.state_dict())


def test_each_entry_is_held_by_its_own_bound() -> None:
    _, constraint = annealed("balanced", "clamped_gelu")
    before = {name: constraint.order.constrained(chosen).detach().clone() for name, chosen in constraint.maps.items()}
    constraint.project(1, 10)  # half of the way
    for name, chosen in constraint.maps.items():
        assert torch.allclose(constraint.order.constrained(chosen), torch.maximum(before[name], 0.5 * before[name]), atol=1e-6)


def test_resuming_stands_where_the_steps_have_led() -> None:
    straight, one = annealed("balanced", "clamped_gelu")
    for step in range(3):
        one.project(step, 10)
    resumed, other = annealed("balanced", "clamped_gelu")
    resumed.load_state_dict(straight.state_dict())
    other.resume(3, 10)
    assert other.share == one.share == pytest.approx(0.25)
    assert torch.equal(resumed(IDS).logits, straight(IDS).logits)
    one.project(3, 10)
    other.project(3, 10)
    assert torch.equal(resumed(IDS).logits, straight(IDS).logits) and other.complete
    third, late = annealed("balanced", "clamped_gelu")
    third.load_state_dict(straight.state_dict())
    late.resume(9, 10)
    assert late.complete and torch.equal(third(IDS).logits, straight(IDS).logits)


def test_gains_are_frozen_or_kept_positive() -> None:
    model = architecture("gpt_neox")
    Constraint(model, spec("projected", norm_gain="fold"))
    assert not any(ffn.norm.weight.requires_grad for ffn in feed_forward(model))
    for kind, scope in (("gpt_neox", "mlp_both"), ("gemma", "gated_all")):
        other = architecture(kind)
        constraint = Constraint(other, spec("projected", scope, norm_gain="positive"))
        assert min(float(ffn.gain().detach().min()) for ffn in feed_forward(other)) < 0 or kind == "gemma"
        with torch.no_grad():
            feed_forward(other)[1].norm.weight[2] = -3.0
        constraint.project()
        assert float(feed_forward(other)[1].gain().detach()[2]) == 0.0
        assert min(float(ffn.gain().detach().min()) for ffn in feed_forward(other)) >= 0


def test_an_order_must_be_given_unless_it_is_the_product_order() -> None:
    with pytest.raises(InputError, match=r"monotone.order='balanced': found no stored order, expected the one that stage 1 wrote"):
        Constraint(architecture("gpt_neox"), spec("projected", order="balanced"))


def test_the_start_suits_the_parametrisation() -> None:
    assert [spec(kind).start for kind in ("projected", "softplus", "exp", "abs", "annealed")] == ["clamp", "abs", "abs", "abs", "base"]
    with pytest.raises(ValueError, match=r"start='clamp' freezes every clamped entry under softplus .*; expected start='abs'"):
        spec("softplus", start="clamp")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parametrisation": "abs", "start": "least_squares"}, "freezes every clamped entry under abs \\(its gradient is 0 there\\)"),
        ({"parametrisation": "annealed", "start": "clamp"}, "start='clamp' with parametrisation='annealed'; expected start='base'"),
        ({"start": "base"}, "start='base' with parametrisation='projected'; expected"),
        ({"order": "directions"}, "directions=0 with order='directions'; expected a number above 0"),
        ({"directions": 3}, "directions=3 with order='all_plus'; expected .* else 0"),
        ({"order": "directions", "directions": 3, "parametrisation": "exp"}, "order='directions' with parametrisation='exp'; expected"),
        ({"margin": 0.1}, "margin=0.1 with order='all_plus'; expected 0"),
        ({"start": "lift", "order": "balanced"}, "start='lift' with order='balanced', which no rewriting reaches; expected 'all_plus'"),
        ({"start": "lift", "scope": "gated_all"}, "start='lift' with scope='gated_all': RMSNorm removes no mean"),
        ({"scope": "mlp_in_attn_out", "order": "unit_signs"}, "scope='mlp_in_attn_out' with order='unit_signs'; expected 'all_plus'"),
        ({"activation": "drelu"}, "activation='drelu' with scope='mlp_both'; expected scope='gated_updown' or 'gated_all'"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Monotone.model_validate(settings)


def test_every_other_combination_converts() -> None:
    """All 5 x 5 x 4 x 4 x 5 x 3 combinations: refused by the schema, refused for the model by name, or converted and constrained."""
    made, refused = 0, 0
    kinds = {False: architecture("gpt_neox"), True: architecture("llama")}
    fields = {
        key: get_args(Monotone.model_fields[key].annotation)
        for key in ("scope", "parametrisation", "order", "activation", "start", "norm_gain")
    }
    random = Random(0)
    combinations = list(itertools.product(*fields.values()))
    for values in random.sample(combinations, 500):
        named = dict(zip(fields, values, strict=True))
        gated = named["scope"].startswith("gated")
        try:
            settings = Monotone.model_validate(
                {**named, "recentre": not gated, "directions": 3 * (named["order"] == "directions"), "sign_restarts": 4}
            )
        except ValueError:
            refused += 1
            continue
        model, order, _ = convert(kinds[gated], settings, IDS)
        constraint = Constraint(model, settings, order)
        constraint.project()
        assert all(float(order.constrained(chosen).detach().min()) >= 0 for chosen in constraint.maps.values()), named
        assert bool(torch.isfinite(model(IDS).logits).all())
        made += 1
    assert made > 60 and refused > 100
