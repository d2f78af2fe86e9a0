"""The certificate holds where monotonicity does, and nowhere else."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from configs.schema import Monotone
from tests.architectures import GATED, PLAIN, VOCABULARY, architecture
from tests.builders import small_model
from utils.models.activations import Annealed
from utils.models.certificate import certify
from utils.models.constraints import Constraint
from utils.models.convert import convert
from utils.models.falsify import falsify
from utils.models.ffn import feed_forward, set_activation
from utils.models.orders import Order
from utils.run.errors import InputError

CALIBRATION = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(2))
IDS = torch.randint(0, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
FIRST = "gpt_neox.layers.1.mlp.dense_4h_to_h"


def converted(**options: object) -> PreTrainedModel:
    return convert(small_model(), Monotone.model_validate(options), CALIBRATION)[0]


def violations(model: PreTrainedModel, pairs: int = 4000) -> int:
    """Ordered pairs x <= y of inputs, drawn at several scales, for which a sublayer in fp64 gives a smaller output for y."""
    generator, found = torch.Generator().manual_seed(3), 0
    for layer in copy.deepcopy(model).double().gpt_neox.layers:
        scale = 10 ** (torch.rand(pairs, 1, generator=generator, dtype=torch.float64) * 4 - 3)
        x = torch.randn(pairs, 16, generator=generator, dtype=torch.float64) * scale
        some = torch.rand(pairs, 16, generator=generator, dtype=torch.float64) < 0.3
        y = x + scale * some * torch.rand(pairs, 16, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            rise = layer.mlp(y) - layer.mlp(x)
        found += int((rise < -1e-9 * scale).any(dim=1).sum())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "clamped_gelu"])
@pytest.mark.parametrize("parametrisation", ["projected", "softplus"])
def test_a_converted_model_is_certified_and_no_pair_contradicts(parametrisation: str, activation: str, dtype: torch.dtype) -> None:
    model = converted(parametrisation=parametrisation, activation=activation)
    certificate = certify(model, "mlp_both", dtype)
    assert certificate["constraint_holds"] and certificate["ffn_monotone"]
    assert certificate["reasons"] == [] and certificate["negative_entries"] == 0 and certificate["minimum"] >= 0
    assert certificate["entries"] == sum(facts["entries"] for facts in certificate["matrices"].values()) == 4 * 16 * 24
    assert violations(model.to(dtype)) == 0


def test_an_unconstrained_model_is_not_certified_and_pairs_contradict() -> None:
    model = small_model()
    certificate = certify(model, "mlp_both", torch.float32)
    assert not certificate["constraint_holds"] and not certificate["ffn_monotone"]
    weights = [chosen.weight for ffn in feed_forward(model) for chosen in ffn.maps]
    assert certificate["negative_entries"] == sum(int((weight < 0).sum()) for weight in weights)
    assert certificate["minimum"] == pytest.approx(min(float(weight.detach().min()) for weight in weights))
    assert violations(model) > 1000


@pytest.mark.parametrize("planted", [-1e-3, -1e-30, float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_planted_entry_is_found(planted: float, dtype: torch.dtype) -> None:
    model = converted()
    with torch.no_grad():
        model.get_submodule(FIRST).weight[3, 5] = planted
    certificate = certify(model, "mlp_both", dtype)
    assert not certificate["constraint_holds"] and not certificate["ffn_monotone"]
    assert certificate["negative_entries"] == certificate["matrices"][FIRST]["negative"] == 1
    assert [layer["monotone"] for layer in certificate["layers"]] == [True, False]
    assert certificate["not_finite_entries"] == (not math.isfinite(planted))
    found = "negative entries" if math.isfinite(planted) else "entries that are NaN or infinite"
    assert certificate["reasons"] == [f"the map out of the hidden layer has {found}"]
    json.dumps(certificate, allow_nan=False)


def test_a_weight_that_only_the_cast_makes_infinite_is_found() -> None:
    model = converted()
    with torch.no_grad():
        model.get_submodule(FIRST).weight[3, 5] = 3.4e38
    assert certify(model, "mlp_both", torch.float32)["ffn_monotone"]
    certificate = certify(model, "mlp_both", torch.bfloat16)
    assert not certificate["constraint_holds"] and not certificate["ffn_monotone"] and not certificate["monotone_before_gain"]
    assert certificate["negative_entries"] == certificate["not_finite_entries"] == 1


@pytest.mark.parametrize("planted", [float("nan"), float("inf"), float("-inf"), 3.4e38])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (f"{FIRST}.bias", "the bias of the map out of the hidden layer"),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h.bias", "the bias of the map into the hidden layer"),
        ("gpt_neox.layers.1.post_attention_layernorm.weight", "the norm's gain"),
        ("gpt_neox.layers.1.post_attention_layernorm.bias", "the norm's shift"),
    ],
)
def test_a_bias_or_a_norm_that_is_not_finite_is_found(part: str, name: str, planted: float) -> None:
    model = converted()
    with torch.no_grad():
        model.get_parameter(part)[3] = planted
    certificate = certify(model, "mlp_both", torch.bfloat16)
    finite = math.isfinite(planted) and "norm" in name  # norms run in fp32
    assert certificate["constraint_holds"] and certificate["ffn_monotone"] is finite
    assert certificate["reasons"] == ([] if finite else [f"{name} has entries that are NaN or infinite"])
    assert finite or not certificate["monotone_before_gain"]
    json.dumps(certificate, allow_nan=False)


def test_what_is_still_annealed_is_not_certified() -> None:
    """With weights within the constraint and activations that do not fall, so that nothing else denies it."""
    model = converted()
    model.gpt_neox.layers[1].mlp.act = Annealed(torch.nn.ReLU(), torch.nn.ReLU())
    certificate = certify(model, "mlp_both", torch.float32)
    assert certificate["constraint_holds"] and not certificate["ffn_monotone"]
    assert certificate["reasons"] == ["the activation is still being annealed"]
    gated, order, _ = convert(architecture("llama"), _spec("unit_signs", "llama"), IDS)
    assert certify(gated, "gated_all", torch.float32, order)["ffn_monotone"]
    feed_forward(gated)[0].into[1].module.slope = torch.ones(())
    certificate = certify(gated, "gated_all", torch.float32, order)
    assert certificate["constraint_holds"] and not certificate["ffn_monotone"]
    assert certificate["reasons"] == ["the relu beside the gate is still being annealed, and may give negative numbers"]


@pytest.mark.parametrize("kind", ["all_plus", "unit_signs"])
def test_an_order_whose_axes_are_not_of_its_kind_is_refused(kind: str) -> None:
    model, order, _ = convert(small_model(), _spec(kind, "gpt_neox"), CALIBRATION)
    order.axes[4] = -1.0
    with pytest.raises(InputError, match=rf"order: found 1 axes of '{kind}' that are not \+1, expected none; .*run stage 1 again"):
        certify(model, "mlp_both", torch.float32, order)


def test_the_weight_that_runs_is_inspected_not_its_parameter() -> None:
    model = converted(parametrisation="softplus")
    constraint = Constraint(model, Monotone.model_validate({"parametrisation": "softplus"}))
    assert min(float(parameter.detach().min()) for parameter in constraint.parameters) < 0
    assert certify(model, "mlp_both", torch.float32)["ffn_monotone"]


def test_gelu_is_not_monotone_whatever_the_weights() -> None:
    model = converted(activation="keep")
    certificate = certify(model, "mlp_both", torch.float32)
    assert certificate["constraint_holds"]
    assert not certificate["ffn_monotone"]
    assert len(certificate["reasons"]) == 1 and "GELU" in certificate["reasons"][0] and "decreases" in certificate["reasons"][0]
    assert violations(model) > 0


@pytest.mark.parametrize("scope", ["mlp_in", "mlp_in_attn_out"])
def test_a_scope_without_the_output_map_is_not_monotone(scope: str) -> None:
    model = converted(scope=scope)
    certificate = certify(model, scope, torch.float32)
    assert certificate["constraint_holds"] and certificate["scope"] == scope
    assert not certificate["ffn_monotone"]
    assert certificate["reasons"] == ["the map out of the hidden layer has negative entries"]
    assert violations(model) > 0


@pytest.mark.parametrize("order", ["all_plus", "unit_signs", "balanced", "directions"])
@pytest.mark.parametrize("kind", [*PLAIN, "llama", "gemma"])
def test_vacuous_is_what_the_lifted_base_passes(order: str, kind: str) -> None:
    """Decided by doing it, whatever the signs of the gains: the product order behind a LayerNorm, and no other."""
    base = architecture(kind)
    spec = _spec(order, kind)
    model, chosen, _ = convert(base, spec, IDS)
    for dtype in (torch.float32, torch.bfloat16):
        certificate = certify(model, spec.scope, dtype, chosen, base)
        assert certificate["ffn_monotone"] and certificate["smallest_margin"] >= 0
        assert certificate["vacuous"] is (order in ("all_plus", "unit_signs") and kind in PLAIN)
        assert certificate["lifted_base"]["same_function"] is (kind in PLAIN or order == "directions")
        json.dumps(certificate, allow_nan=False)
    assert certify(model, spec.scope, torch.float32, chosen)["vacuous"] is None  # not decided without the base


def test_where_nothing_holds_nothing_is_called_vacuous() -> None:
    base = architecture("qwen2")
    certificate = certify(base, "gated_all", torch.float32, base=base)
    assert certificate["lifted_base"]["constraint_holds"] and not certificate["lifted_base"]["same_function"]
    assert certificate["vacuous"] is None


@pytest.mark.parametrize("order", ["all_plus", "unit_signs", "balanced", "directions"])
@pytest.mark.parametrize("kind", [*PLAIN, "llama", "gemma"])
@pytest.mark.parametrize("part", [0, -1])
def test_one_planted_entry_is_found_in_every_order_and_architecture(order: str, kind: str, part: int) -> None:
    spec = _spec(order, kind)
    model, chosen, _ = convert(architecture(kind), spec, IDS)
    planted = feed_forward(model)[1].maps[part]
    axis = chosen.axes[:, 2] if chosen.rotated else torch.nn.functional.one_hot(torch.tensor(2), 16) * chosen.axes
    with torch.no_grad():
        sign = float(chosen.sign(planted)[7])
        along = float(planted.by_unit[7].double() @ axis.double())
        planted.by_unit[7] -= ((along + sign * 1e-3) * axis).float()
    certificate = certify(model, spec.scope, torch.float32, chosen)
    assert certificate["negative_entries"] == certificate["matrices"][planted.name]["negative"] == 1
    assert certificate["minimum"] == pytest.approx(-1e-3, abs=1e-6)
    assert not certificate["constraint_holds"] and not certificate["ffn_monotone"]
    assert [layer["units_without_a_sign"] for layer in certificate["layers"]] == [0, 1]
    assert [layer["monotone"] for layer in certificate["layers"]] == [True, False]


@pytest.mark.parametrize("order", ["all_plus", "balanced", "directions"])
def test_gains_decide_about_the_vector_before_them(order: str) -> None:
    spec = _spec(order, "gpt_neox", norm_gain="positive")
    model, chosen, _ = convert(architecture("gpt_neox"), spec, IDS)
    certificate = certify(model, "mlp_both", torch.float32, chosen)
    assert certificate["ffn_monotone"] and certificate["monotone_before_gain"] is (order != "directions")
    assert certificate["monotone_before_norm"] is False
    assert (falsify(model, chosen)["pairs_behind_norm"]["violated"] > 0) is (order == "directions")
    folded, chosen, _ = convert(architecture("gpt_neox"), _spec(order, "gpt_neox", norm_gain="fold"), IDS)
    assert certify(folded, "mlp_both", torch.float32, chosen)["monotone_before_gain"]
    with torch.no_grad():
        feed_forward(folded)[0].norm.weight[3] = -0.5
    assert not certify(folded, "mlp_both", torch.float32, chosen)["monotone_before_gain"]


def test_rounding_to_bf16_breaks_directions_and_the_margin_repairs_them() -> None:
    without = convert(architecture("gpt_neox"), _spec("directions", "gpt_neox", margin=0.0), IDS)
    assert certify(without[0], "mlp_both", torch.bfloat16, without[1])["negative_entries"] > 0
    for start in ("clamp", "abs", "least_squares"):  # the default margin suffices for weights of any size
        model, order, _ = convert(architecture("gpt_neox"), _spec("directions", "gpt_neox", start=start), IDS)
        certificate = certify(model, "mlp_both", torch.bfloat16, order)
        assert certificate["negative_entries"] == 0 and certificate["ffn_monotone"] and 0 <= certificate["smallest_margin"] < 0.01


@pytest.mark.parametrize("activation", ["relu", "clamped_gelu", "keep"])
@pytest.mark.parametrize("signs", [(1.0, 1.0), (1.0, -1.0)])
def test_exhaustive_pairs_of_a_tiny_sublayer_agree_with_the_certificate(activation: str, signs: tuple[float, float]) -> None:
    """Width two, four units: every comparable pair of a grid of 41 x 41 points, for many random weights, certified or not."""
    config = GPTNeoXConfig(hidden_size=2, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4, vocab_size=9, rotary_pct=1.0)
    order = Order("balanced", torch.tensor(signs), {"gpt_neox.layers.0.mlp": torch.tensor([1.0, -1.0, 1.0, -1.0])})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    if activation != "keep":
        set_activation(model, activation)
    ffn = feed_forward(model)[0]
    side = torch.linspace(-4, 4, 41, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    agreed = {True: 0, False: 0}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for chosen in ffn.maps:
                chosen.by_unit.copy_(torch.randn(4, 2, generator=generator))
                if seed % 2:
                    order.project(chosen)
                chosen.bias.copy_(torch.randn(chosen.bias.shape, generator=generator))
            values = order.readout(ffn(points)).reshape(41, 41, 2)
        rising = values if signs[1] > 0 else values.flip(1)  # along the second axis the order runs the other way
        falls = min(float(rising.diff(dim=0).min()), float(rising.diff(dim=1).min())) < -1e-12  # the order is transitive
        certified = certify(model, "mlp_both", torch.float64, order)["ffn_monotone"]
        assert not (certified and falls)
        agreed[certified] += certified or falls
    assert agreed[True] == (0 if activation == "keep" else 20)
    assert agreed[False] >= (30 if activation == "keep" else 15)


def _spec(order: str, kind: str, **settings: object) -> Monotone:
    options = {"order": order, "sign_restarts": 8} | ({"directions": 5} if order == "directions" else {})
    options |= {"scope": "gated_all", "activation": "drelu", "recentre": False} if kind in GATED else {}
    return Monotone.model_validate(options | settings)
