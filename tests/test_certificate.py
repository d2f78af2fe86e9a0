"""The certificate holds where monotonicity does, and nowhere else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import Monotone
from tests.builders import small_model
from utils.models.certificate import certify
from utils.models.constraints import Constraint
from utils.models.convert import convert
from utils.models.ffn import feed_forward

CALIBRATION = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(2))
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
    weights = [ffn_map.weight for ffn in feed_forward(model) for ffn_map in (ffn.linear_in, ffn.linear_out)]
    assert certificate["negative_entries"] == sum(int((weight < 0).sum()) for weight in weights)
    assert certificate["minimum"] == pytest.approx(min(float(weight.detach().min()) for weight in weights))
    assert violations(model) > 1000


@pytest.mark.parametrize("planted", [-1e-3, -1e-30, float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_planted_entry_is_found(planted: float, dtype: torch.dtype) -> None:
    model = converted()
    with torch.no_grad():
        model.get_submodule(FIRST).weight[3, 5] = planted
    certificate = certify(model, "mlp_both", dtype)
    assert not certificate["constraint_holds"] and not certificate["ffn_monotone"]
    assert certificate["negative_entries"] == certificate["matrices"][FIRST]["negative"] == 1
    assert [layer["monotone"] for layer in certificate["layers"]] == [True, False]
    assert certificate["reasons"] == ["the map out of the hidden layer has negative entries"]
    json.dumps(certificate, allow_nan=False)


def test_the_weight_that_runs_is_inspected_not_its_parameter() -> None:
    model = converted(parametrisation="softplus")
    constraint = Constraint(model, Monotone(parametrisation="softplus"))
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


def test_the_norm_in_front_makes_the_order_vacuous_and_is_said() -> None:
    model = converted()
    certificate = certify(model, "mlp_both", torch.float32)
    assert certificate["vacuous"]
    for ffn, layer in zip(feed_forward(model), certificate["layers"], strict=True):
        assert layer["smallest_norm_gain"] == float(ffn.norm.weight.detach().min())
        with torch.no_grad():
            ffn.norm.bias.zero_()
            ffn.norm.weight.abs_()
            outputs = ffn.norm(torch.randn(200, 16, generator=torch.Generator().manual_seed(4))).double()
        differences = (outputs[:, None] - outputs[None]) / ffn.norm.weight.double()
        off_diagonal = differences[~torch.eye(200, dtype=torch.bool)]
        assert bool((off_diagonal.min(dim=1).values < 0).all())  # no two outputs are comparable


def test_an_order_behind_a_negative_gain_is_not_called_vacuous() -> None:
    model = small_model()
    assert certify(model, "mlp_both", torch.float32)["vacuous"] is True
    with torch.no_grad():
        feed_forward(model)[1].norm.weight[3] = -0.5
    assert certify(model, "mlp_both", torch.float32)["vacuous"] is False
