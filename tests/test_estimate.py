"""Words that follow from intervals, and functions of estimates."""

from __future__ import annotations

import math

import pytest

from utils.statistics.estimate import Estimate, perplexity, reduction_percent


@pytest.mark.parametrize(
    ("low", "high", "words"), [(-0.2, -0.1, "below"), (0.1, 0.2, "above"), (-0.1, 0.2, "unclear"), (0.0, 0.2, "unclear")]
)
def test_words_follow_the_interval(low: float, high: float, words: str) -> None:
    assert Estimate(-5.0, low, high, 9).verdict("below", "above", "unclear") == words


@pytest.mark.parametrize(("high", "below"), [(0.0676, True), (0.0677, False), (0.2, False), (None, None)])
def test_non_inferior_means_that_the_whole_interval_is_below_the_margin(high: float | None, below: bool | None) -> None:
    assert Estimate(0.0, -0.1, high, 9).below(0.0677) is below


def test_an_increasing_map_keeps_the_order_and_the_count() -> None:
    estimate = Estimate(0.1, -0.2, 0.4, 7).map(perplexity)
    assert estimate == Estimate(math.exp(0.1), math.exp(-0.2), math.exp(0.4), 7)
    assert estimate.as_dict() == {"value": math.exp(0.1), "low": math.exp(-0.2), "high": math.exp(0.4), "count": 7}


def test_nothing_to_reduce() -> None:
    assert reduction_percent(0.0, 0.0) is None
    assert reduction_percent(0.0, 0.5) is None
    assert reduction_percent(0.8, 0.2) == pytest.approx(75.0)
    assert reduction_percent(0.4, 0.6) == pytest.approx(-50.0)


def test_perplexity_is_finite_for_any_loss() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7.0)
    assert math.isfinite(perplexity(1e6))
