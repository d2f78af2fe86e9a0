"""Falsifiers: pairs that are what they claim to be, none against a guarantee, and planted faults found."""

from __future__ import annotations

import json

import pytest
import torch

from configs.schema import Monotone
from tests.architectures import GATED, PLAIN, VOCABULARY, architecture
from utils.models.convert import convert
from utils.models.falsify import Draw, falsify, norm_pairs, pushed
from utils.models.ffn import feed_forward
from utils.models.orders import all_plus, choose_order

IDS = torch.randint(0, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
ORDERS = ("all_plus", "unit_signs", "balanced", "directions")


def spec(order: str, kind: str, **settings: object) -> Monotone:
    options = {"order": order, "norm_gain": "fold", "sign_restarts": 8} | ({"directions": 5} if order == "directions" else {})
    options |= {"scope": "gated_all", "activation": "drelu", "recentre": False} if kind in GATED else {}
    return Monotone.model_validate(options | settings)


@pytest.mark.parametrize("order_name", ORDERS)
@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_pairs_behind_the_norm_are_outputs_of_it_and_ordered(order_name: str, kind: str) -> None:
    model = architecture(kind).double()
    order, _ = choose_order(model, spec(order_name, kind), torch.eye(16))
    ffn = feed_forward(model)[0]
    low, high, comparable = norm_pairs(ffn, order, Draw(order, torch.device("cpu"), torch.float64, 0))
    vacuous = kind == "gpt_neox" and order_name in ("all_plus", "unit_signs")
    assert int(comparable.sum()) == 0 if vacuous else int(comparable.sum()) > 0.7 * len(comparable)
    with torch.no_grad():
        ffn.gain_parameter.fill_(1.0)
        if ffn.shift_parameter is not None:
            ffn.shift_parameter.zero_()
        for side in (low, high):
            assert torch.allclose(ffn.norm(side), side, atol=1e-4)  # a fixed point: the norm gives it out
    step = (high - low)[comparable]
    weights = order.readout(step)  # the axes are orthonormal: the coefficients of the step
    assert vacuous or (float(weights.min()) > -1e-9 and float((order.cone(weights) - step).abs().max()) < 1e-9)
    assert vacuous or float(step.norm(dim=1).min()) > 1e-6


@pytest.mark.parametrize("order_name", ORDERS)
@pytest.mark.parametrize("kind", PLAIN + GATED)
def test_a_guarantee_is_never_refuted(order_name: str, kind: str) -> None:
    model, order, _ = convert(architecture(kind), spec(order_name, kind), IDS)
    found = falsify(model, order)
    for name in ("derivative", "pairs_anywhere", "pairs_behind_norm"):
        assert found[name]["violated"] == 0 and found[name]["deepest"] == 0.0
        assert found[name]["tried"] > 300 or (name == "pairs_behind_norm" and order_name in ("all_plus", "unit_signs") and kind in PLAIN)
    assert found["block"]["violated"] > 0 and found["depth"]["violated"] > 0  # norms and attention are not monotone
    assert found["format"] == "float64"
    assert falsify(model, order) == found
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("order_name", ORDERS)
def test_planted_faults_are_found(order_name: str) -> None:
    model, order, _ = convert(architecture("gpt2"), spec(order_name, "gpt2"), IDS)
    planted = feed_forward(model)[1].out
    with torch.no_grad():
        planted.by_unit[:4] *= -1.0
    found = falsify(model, order)
    assert found["derivative"]["violated"] > 20 and found["pairs_anywhere"]["violated"] > 100
    assert 0.0 < found["derivative"]["deepest"] <= 1.0
    kept, order, _ = convert(architecture("gpt2"), spec(order_name, "gpt2", activation="keep"), IDS)
    assert falsify(kept, order)["pairs_anywhere"]["violated"] > 0
    with torch.no_grad():
        planted.weight[0, 0] = float("nan")
    assert falsify(model, order)["derivative"]["deepest"] == 1.0


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_model_that_is_monotone_all_the_way_passes_block_and_depth(kind: str) -> None:
    """Without attention and sublayers only the residual stream is left, to which each adds a constant: a push goes through unchanged."""
    model = architecture(kind).double()
    order, last = all_plus(model), feed_forward(model)[-1]
    with torch.no_grad():
        for place, ffn in enumerate(feed_forward(model)):
            for chosen in (ffn.out, ffn.attention_out):
                chosen.weight.zero_()
                if chosen.bias is not None:
                    chosen.bias.fill_(10.0 * (-1) ** place)
    change = pushed(
        model.requires_grad_(False),
        IDS,
        feed_forward(model)[0].block,
        last.block,
        Draw(order, torch.device("cpu"), torch.float64, 1).push(0.1),
    )
    assert float(change.min()) >= 0 and float(change.max()) > 0.1
    found = falsify(model, order)
    assert found["block"]["violated"] == found["depth"]["violated"] == 0
    assert (found["block"]["tried"], found["depth"]["tried"]) == (2 * 5 * 64, 5 * 64)


def test_hooks_are_gone_afterwards() -> None:
    model = architecture("opt")
    falsify(model, all_plus(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
