"""Each sign of a weak attack is said in words when it is there, and not when it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from utils.attacks.flags import flip_flags, trigger_flags

FLIPS: dict[str, Any] = {
    "results": {"a": {"avg_degradation": 1.0, "flat": True, "last_flip_share": 0.02}, "b": {"avg_degradation": 2.0, "flat": True}},
    "controls": {
        name: {
            "random_rise": 0.1,
            "query_greedy_rise": 0.6,
            "longer": {"texts": 8, "rise": 1.03, "hotflip_rise": 1.0, "further_share": 0.03},
            "rank_correlation": {"candidates": 0.4, "random": 0.5},
            "zero_gradient_share": 0.01,
            "bf16_cosine": 0.99,
            "largest_leak": 1e-6,
        }
        for name in ("a", "b")
    },
    "transfer": {"a": {"b": 1.04}, "b": {"a": 0.7}},
    "budget": {"by_model": {"a": {"forwards": 1000, "backwards": 10, "flops": 7}, "b": {"forwards": 1040, "backwards": 10, "flops": 7}}},
}
TRIGGERS: dict[str, Any] = {
    "results": {
        name: {"nll_increase": 1.0, "neutral_increase": 0.1, "random_increase": 0.2, "survives_retokenisation": 1.0} for name in ("a", "b")
    },
    "controls": {name: {"query_greedy_increase": 0.7, "last_sweep_share": 0.01} for name in ("a", "b")},
    "transfer": {"a": {"a": 1.0, "b": 0.9}, "b": {"a": 1.04, "b": 1.0}},
    "budget": {"by_model": {"a": {"forwards": 1000, "backwards": 10, "flops": 7}, "b": {"forwards": 1000, "backwards": 10, "flops": 7}}},
}


def changed(facts: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    facts = copy.deepcopy(facts)
    inner = facts
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return facts


def test_a_sound_attack_has_no_flags() -> None:
    assert flip_flags(**FLIPS) == []
    assert trigger_flags(**TRIGGERS) == []
    unknown = changed(changed(FLIPS, ("controls", "a", "bf16_cosine"), None), ("controls", "a", "rank_correlation", "candidates"), None)
    assert flip_flags(**unknown) == []


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (
            ("controls", "a", "random_rise"),
            1.0,
            "a: random flips raise the loss by 1.000 nats, HotFlip by 1.000; its gradient",
        ),
        (("controls", "a", "query_greedy_rise"), 1.1, "a: a search without gradient raises the loss by 1.100 nats, HotFlip by 1.000"),
        (("controls", "b", "zero_gradient_share"), 0.5, "b: 50.0 % of the prefix tokens have a gradient of exactly zero"),
        (
            ("controls", "a", "rank_correlation", "candidates"),
            0.02,
            "a: foretold and true gains of scored candidates correlate by 0.02",
        ),
        (("controls", "a", "rank_correlation", "random"), -0.2, "gains of random substitutions correlate by -0.20 only (Spearman)"),
        (("controls", "a", "bf16_cosine"), 0.5, "a: gradients in bf16 and fp32 agree by a cosine of 0.50 only"),
        (("controls", "a", "longer"), {"texts": 8, "rise": 1.2, "hotflip_rise": 1.0, "further_share": 0.2}, "(+20.0 %); the budget of"),
        (("results", "a", "flat"), False, "a: the last flip still brings 2.0 % of the whole rise; the curve has not flattened"),
        (("controls", "b", "largest_leak"), 0.01, "b: tokens before the first flip changed by up to 0.01 nats; the model is not causal"),
        (("transfer", "a", "b"), 1.06, "a: the flips found on b raised its loss by 1.060 nats, its own by 1.000; the search on it is weak"),
        (("budget", "by_model", "b", "forwards"), 1100, "the searches cost 1,100 forwards on b and 1,000 on a"),
    ],
)
def test_each_sign_of_weak_flips(place: tuple[str, ...], value: Any, words: str) -> None:
    (flag,) = flip_flags(**changed(FLIPS, place, value))
    assert words in flag


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("results", "a", "neutral_increase"), 1.0, "a: a neutral trigger raises the loss by 1.000 nats, the trigger by 1.000"),
        (("results", "a", "random_increase"), 1.5, "a: random triggers raise the loss by 1.500 nats"),
        (("controls", "b", "query_greedy_increase"), 1.5, "b: a search without gradient raises the loss by 1.500 nats"),
        (("controls", "b", "last_sweep_share"), 0.2, "b: the last sweep still brings 20.0 % of the rise on the search texts"),
        (("results", "a", "survives_retokenisation"), 0.5, "a: on 50 % of the texts the trigger does not survive decoding and encoding"),
        (("transfer", "b", "a"), 1.5, "b: the trigger found on a raised its loss by 1.500 nats, its own by 1.000"),
        (("budget", "by_model", "b", "backwards"), 20, "the searches cost 20 backwards on b and 10 on a"),
    ],
)
def test_each_sign_of_weak_triggers(place: tuple[str, ...], value: Any, words: str) -> None:
    (flag,) = trigger_flags(**changed(TRIGGERS, place, value))
    assert words in flag
