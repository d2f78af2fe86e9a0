"""Order preservation: pushes that are carried through, shares that a network without an order has, probes against scipy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Evaluate, Monotone
from tests.architectures import VOCABULARY, architecture
from utils.data.ordered_texts import DEGREES, FRAMES, ordered_pairs
from utils.evaluation.order import RIDGE, fit_probes, held_out, intervention, last_hidden, probe
from utils.models.convert import convert
from utils.models.ffn import feed_forward
from utils.models.orders import Order, choose_order

IDS = torch.randint(0, VOCABULARY, (8, 20), generator=torch.Generator().manual_seed(0))
SPEC = Evaluate(context=9, stride=4, batch_size=2, order_null_fits=6)


def balanced(**settings: object) -> Monotone:
    return Monotone.model_validate({"order": "balanced", "norm_gain": "fold", **settings})


def without_norms_and_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Only the residual stream and the sublayers, which read it as it is: monotone all the way if they are."""
    for ffn in feed_forward(model):
        ffn.norm.forward = lambda hidden: hidden
        with torch.no_grad():
            ffn.attention_out.weight.zero_()
    return model


def test_a_network_that_is_monotone_all_the_way_never_falls() -> None:
    model, order, _ = convert(architecture("gpt2"), balanced(), IDS)
    found = intervention(without_norms_and_attention(model), order, IDS, 0.1)
    json.dumps(found, allow_nan=False)
    for shares in found["by_block"].values():
        assert shares["others"] == shares["pushed"] == 1.0
        assert shares["null"] < 0.95 and shares["null_se"] > 0
    broken = feed_forward(model)[1].out
    with torch.no_grad():
        broken.weight.mul_(-1.0)  # planted: the sublayer falls in the order
    assert intervention(model, order, IDS, 0.1)["by_block"]["1"]["others"] < 0.7


def test_a_converted_model_preserves_more_than_its_base_and_the_null_is_chance() -> None:
    base = architecture("gpt_neox", positive_gains=True)
    model, order, _ = convert(base, balanced(), IDS)
    both = {name: intervention(network, order, IDS, 0.1)["by_block"] for name, network in (("base", base), ("model", model))}
    for place in ("0", "1"):
        assert both["model"][place]["others"] > 0.75
        assert 0.3 < both["base"][place]["others"] < 0.7 and 0.3 < both["base"][place]["null"] < 0.7
        assert both["model"][place]["pushed"] > both["model"][place]["others"]


def test_the_share_is_what_counting_by_hand_gives() -> None:
    model = without_norms_and_attention(architecture("opt"))
    order, _ = choose_order(model, balanced())
    pushed_axes: list[set[int]] = []
    changes: list[Tensor] = []

    class Counted(Order):
        def readout(self, x: Tensor) -> Tensor:
            changes.append(super().readout(x))
            return changes[-1]

        def cone(self, u: Tensor) -> Tensor:
            pushed_axes.extend(set(row.nonzero().flatten().tolist()) for row in u[:, 0])
            return super().cone(u)

    found = intervention(model, Counted(order.kind, order.axes, order.units), IDS[:2], 0.1)["by_block"]["0"]
    kept = []
    for row in range(2):
        assert len(pushed_axes[row]) == 2  # a tenth of 16, rounded
        rest = [axis for axis in range(16) if axis not in pushed_axes[row]]
        low = -1e-5 * changes[0][row].abs().amax(dim=-1, keepdim=True)
        kept.append(float((changes[0][row] >= low)[:, rest].double().mean()))
    assert found["others"] == pytest.approx(sum(kept) / 2)
    assert found["others_se"] == pytest.approx(np.std(kept, ddof=1) / 2**0.5)


def test_pairs_are_ordered_and_no_text_or_frame_is_used_twice() -> None:
    pairs = ordered_pairs()
    assert len(pairs) == len(DEGREES) * 3 * 6 == 180
    assert all(len(set(degrees)) == 4 for degrees in DEGREES.values())
    assert max(Counter(frame for frames in FRAMES.values() for frame in frames).values()) == 1
    assert all(pair.weaker != pair.stronger and pair.chain.startswith(pair.axis) for pair in pairs)
    for pair in pairs:
        degrees = DEGREES[pair.axis]
        frame = FRAMES[pair.axis][int(pair.chain.split("/")[1])]
        low, high = (degrees.index(text.removeprefix(frame + " ")) for text in (pair.weaker, pair.stronger))
        assert low < high


def test_the_probe_is_the_logistic_regression_that_scipy_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64) + 0.3
    best = minimize(lambda w: np.logaddexp(0, -x.numpy() @ w).mean() + RIDGE * (w @ w) / 2, np.zeros(6), tol=1e-12)
    everything = torch.ones(1, len(x), dtype=x.dtype)
    assert torch.allclose(fit_probes(x, everything)[0], torch.as_tensor(best.x), atol=1e-5)
    wide = torch.randn(10, 40, generator=generator, dtype=torch.float64)  # more coordinates than pairs
    best = minimize(lambda w: np.logaddexp(0, -wide.numpy() @ w).mean() + RIDGE * (w @ w) / 2, np.zeros(40), tol=1e-12)
    assert torch.allclose(fit_probes(wide, everything[:, :10])[0], torch.as_tensor(best.x), atol=1e-4)
    signs = torch.ones(2, 30, dtype=x.dtype)
    signs[1, 20:] = 0.0  # left out
    signs[1, :5] = -1.0  # turned round
    turned = signs[1, :20, None].numpy() * x[:20].numpy()
    best = minimize(lambda w: np.logaddexp(0, -turned @ w).mean() + RIDGE * (w @ w) / 2, np.zeros(6), tol=1e-12)
    assert torch.allclose(fit_probes(x, signs)[1], torch.as_tensor(best.x), atol=1e-5)


def test_a_degree_that_is_there_is_decoded_and_noise_is_not() -> None:
    pairs, generator = ordered_pairs(), torch.Generator().manual_seed(0)
    texts = {text for pair in pairs for text in (pair.weaker, pair.stronger)}
    degree = {f"{frame} {word}": place for axis, words in DEGREES.items() for frame in FRAMES[axis] for place, word in enumerate(words)}
    noise = {text: torch.randn(24, generator=generator, dtype=torch.float64) for text in sorted(texts)}
    direction = torch.randn(24, generator=generator, dtype=torch.float64)
    there = probe(pairs, {text: noise[text] + 2.0 * degree[text] * direction for text in texts}, SPEC, 0)
    assert there["accuracy"] > 0.95 and there["chains"] == 30 and there["pairs"] == 180
    assert there["null_range"][0] <= there["null_mean"] <= there["null_range"][1] and 0.2 < there["null_mean"] < 0.8
    absent = probe(pairs, noise, SPEC, 0)
    assert 0.3 < absent["accuracy"] < 0.7
    assert set(absent["by_axis"]) == set(DEGREES)


def test_an_axis_is_never_in_its_own_fit() -> None:
    """An axis in which stronger means the opposite of what it means elsewhere must be wrong, not learnt."""
    axes = np.repeat(["a", "b", "c"], 20)
    differences = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    differences[axes == "b"] *= -1.0
    assert held_out(differences, axes, torch.ones(1, 60))[0]["b"] == 0.0


def test_the_hidden_state_is_that_of_the_last_token_behind_end_of_text() -> None:
    model = architecture("gpt_neox")
    with torch.no_grad():
        expected = model(torch.tensor([[0, 5, 9]]), output_hidden_states=True).hidden_states[-1][0, 2]
    found = last_hidden(model, [[5, 9], [7, 8, 9, 3, 1]]).float()  # the shorter one is padded
    assert torch.allclose(found[0], expected, atol=1e-5) and found.shape == (2, 16)


@pytest.mark.integration
def test_the_evaluation_results_of_a_run_hold_it(finished: Path, stage_folder) -> None:  # type: ignore[no-untyped-def]
    results = json.loads((stage_folder(finished, 4) / "evaluation_results.json").read_text())["order_preservation"]
    assert set(results) == {"base", "converted", "baseline", "monotonic"}
    for found in results.values():
        assert set(found["intervention"]["by_block"]) == {"0", "1"} and 0.0 <= found["probe"]["accuracy"] <= 1.0
