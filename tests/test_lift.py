"""The gauge lift: an exact rewriting in the product order, and no way around the others."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import Monotone
from tests.architectures import GATED, PLAIN, VOCABULARY, architecture
from utils.models.certificate import certify
from utils.models.convert import convert
from utils.models.ffn import check_fits, constrained_weights, feed_forward, set_activation
from utils.models.lift import fold_gain, lift, lifted_control
from utils.models.orders import Order, all_plus, choose_order
from utils.run.errors import InputError

IDS = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))


def log_probabilities(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.log_softmax(dim=-1)


def outside(model: PreTrainedModel, scope: str, order: Order) -> int:
    return sum(int((order.constrained(chosen) < 0).sum()) for chosen in constrained_weights(model, scope).values())


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("scope", ["mlp_in", "mlp_both", "mlp_in_attn_out"])
@pytest.mark.parametrize("name", ["all_plus", "unit_signs"])
def test_any_layernorm_model_is_rewritten_with_its_function(kind: str, scope: str, name: str) -> None:
    """Gains of both signs, biases, parallel and sequential residuals."""
    model = architecture(kind, **({"use_parallel_residual": scope == "mlp_both"} if kind == "gpt_neox" else {})).double()
    order, _ = choose_order(model, Monotone.model_validate({"order": name}))
    before, violations = log_probabilities(model), outside(model, scope, order)
    lift(model, scope, order)
    assert violations > 100 and outside(model, scope, order) == 0
    assert float((log_probabilities(model) - before).abs().max()) < 1e-9
    if name == "all_plus":
        assert min(float(chosen.weight.detach().min()) for chosen in constrained_weights(model, scope).values()) == 0.0


@pytest.mark.parametrize("kind", PLAIN)
def test_balanced_signs_cannot_be_reached(kind: str) -> None:
    model = architecture(kind)
    order, _ = choose_order(model, Monotone.model_validate({"order": "balanced"}))
    control, facts = lifted_control(model, "relu", "mlp_both", order)
    assert facts["same_function"] and facts["largest_change_nats"] < 1e-9
    rows_in_reach = 0
    for chosen in constrained_weights(control, "mlp_both").values():
        rows_in_reach += int((order.constrained(chosen) >= 0).all(dim=1).sum())
    assert rows_in_reach < 5  # of 96; by chance only
    assert outside(control, "mlp_both", order) > 300


def test_a_unit_that_a_shift_can_bring_to_mixed_signs_is_brought_there() -> None:
    model = architecture("gpt_neox", positive_gains=True).double()
    width = 16
    order = Order("balanced", torch.tensor([1.0, -1.0] * 8), {ffn.name: torch.ones(24) for ffn in feed_forward(model)})
    first = feed_forward(model)[0].into[0]
    with torch.no_grad():
        fold_gain(feed_forward(model)[0])
        first.weight[0] = 5.0 + order.axes.double() * torch.linspace(0.1, 1.0, width, dtype=torch.float64)
        first.weight[1] = -5.0 + order.axes.double() * torch.linspace(0.1, 1.0, width, dtype=torch.float64)
    before = log_probabilities(model)
    lift(model, "mlp_both", order)
    assert bool((order.constrained(first)[:2] >= 0).all())
    assert float((log_probabilities(model) - before).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", GATED)
def test_rmsnorm_has_no_such_way_out(kind: str) -> None:
    model = architecture(kind)
    _, facts = lifted_control(model, "drelu", "gated_all", all_plus(model))
    assert facts["same_function"] is False and facts["largest_change_nats"] > 0.5


@pytest.mark.parametrize("kind", PLAIN + GATED)
def test_folding_a_gain_changes_nothing_but_the_gain(kind: str) -> None:
    model = architecture(kind).double()
    before = log_probabilities(model)
    for ffn in feed_forward(model):
        fold_gain(ffn)
        assert torch.equal(ffn.gain(), torch.ones_like(ffn.gain()))
        assert ffn.shift_parameter is None or not bool(ffn.shift_parameter.any())
    assert float((log_probabilities(model) - before).abs().max()) < (1e-9 if kind in PLAIN else 1e-5)  # RMSNorms compute in fp32


def test_a_shift_without_a_bias_to_take_it_is_refused() -> None:
    model = architecture("opt", enable_bias=False)
    with pytest.raises(
        InputError, match=r"monotone.norm_gain: model.decoder.layers.0.fc1 has no bias to fold .*expected 'free' or 'positive'"
    ):
        fold_gain(feed_forward(model)[0])


@pytest.mark.parametrize("name", ["all_plus", "balanced"])
def test_the_control_of_a_model_without_biases_is_lifted_all_the_same(name: str) -> None:
    base = architecture("opt", enable_bias=False)
    assert all(ffn.into[0].bias is None and bool(ffn.shift_parameter.any()) for ffn in feed_forward(base))
    model, order, _ = convert(base, Monotone.model_validate({"order": name, "recentre": False, "norm_gain": "free"}), IDS)
    certificate = certify(model, "mlp_both", torch.float32, order, base)
    assert certificate["ffn_monotone"] and certificate["vacuous"] is (name == "all_plus")
    assert certificate["lifted_base"]["same_function"] and certificate["lifted_base"]["largest_change_nats"] < 1e-9
    assert all(ffn.into[0].bias is None for network in (base, model) for ffn in feed_forward(network))


def test_the_control_is_a_copy_with_the_activation_asked_for() -> None:
    model = architecture("gpt2")
    state = copy.deepcopy(model.state_dict())
    control, facts = lifted_control(model, "clamped_gelu", "mlp_both", all_plus(model))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    swapped = copy.deepcopy(model).double()
    set_activation(swapped, "clamped_gelu")
    assert float((log_probabilities(control) - log_probabilities(swapped)).abs().max()) < 1e-9
    assert facts["format"] == "float64"


def test_a_start_from_the_lift_needs_a_layernorm() -> None:
    spec = Monotone.model_validate({"scope": "mlp_both", "start": "lift"})
    check_fits(architecture("opt"), spec)
    with pytest.raises(InputError, match=r"monotone.scope"):
        check_fits(architecture("llama"), spec)
