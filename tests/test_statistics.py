"""Intervals by simulation and by hand, the paired test against binomial coefficients, words that follow from intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from utils.report.statistics import Estimate, mcnemar, mean, perplexity, reduction_percent, student_mean, weighted_mean


def test_weighted_mean_is_the_ratio_of_the_sums() -> None:
    """Not the mean of the documents' means: 10 nats in 2 tokens and 10 nats in 8 tokens are 2 nats per token."""
    estimate = weighted_mean([10.0, 10.0], [2, 8], 0.95, 400)
    assert estimate.value == 2.0
    assert (estimate.low, estimate.high) == (10 / 8, 10 / 2)
    assert estimate.count == 2


def test_interval_equals_a_plain_bootstrap() -> None:
    """Percentiles of a loop that draws documents with their nats and tokens together."""
    random = np.random.default_rng(3)
    tokens = random.integers(5, 200, 30)
    nats = tokens * random.normal(3.0, 0.5, 30)
    ratios = []
    for _ in range(4000):
        drawn = random.integers(0, 30, 30)
        ratios.append(nats[drawn].sum() / tokens[drawn].sum())
    estimate = weighted_mean(nats, tokens, 0.9, 4000)
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(ratios, [0.05, 0.95]), abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """600 samples of 40 documents of unequal length whose true mean is 3 nats per token."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(600):
        tokens = random.integers(20, 120, 40)
        estimate = weighted_mean(tokens * random.normal(3.0, 0.6, 40), tokens, 0.95, 300)
        assert estimate.low is not None and estimate.high is not None
        hits += estimate.low <= 3.0 <= estimate.high
    assert 0.91 <= hits / 600 <= 0.97


def test_pairing_makes_the_interval_narrow() -> None:
    """Texts differ by far more than the models do; the paired difference sees the models alone."""
    random = np.random.default_rng(1)
    hardness = random.normal(3.0, 1.0, 50)
    first, second = hardness + random.normal(0.0, 0.01, 50), hardness + 0.05 + random.normal(0.0, 0.01, 50)
    assert mean(second - first, 0.95, 500).verdict("lower", "higher") == "higher"
    one, other = mean(first, 0.95, 500), mean(second, 0.95, 500)
    assert one.high is not None and other.low is not None
    assert one.high > other.low


def test_the_same_data_give_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert mean(values, 0.95, 200) == mean(values.copy(), 0.95, 200)
    wide, narrow = mean(values, 0.99, 2000), mean(values, 0.5, 2000)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_single_document_has_no_interval() -> None:
    estimate = mean([0.3], 0.95, 100)
    assert estimate == Estimate(0.3, None, None, 1)
    assert estimate.verdict("below", "above") == "not distinguishable (too few for an interval)"
    assert estimate.map(math.exp) == Estimate(math.exp(0.3), None, None, 1)


def test_no_spread_is_an_interval_of_no_width() -> None:
    estimate = mean([0.0] * 5, 0.95, 100)
    assert (estimate.low, estimate.high) == (0.0, 0.0)
    assert estimate.verdict("below", "above") == "not distinguishable"


@pytest.mark.parametrize(
    ("low", "high", "words"), [(-0.2, -0.1, "below"), (0.1, 0.2, "above"), (-0.1, 0.2, "unclear"), (0.0, 0.2, "unclear")]
)
def test_words_follow_the_interval(low: float, high: float, words: str) -> None:
    assert Estimate(-5.0, low, high, 9).verdict("below", "above", "unclear") == words


def test_an_increasing_map_keeps_the_order_and_the_count() -> None:
    estimate = Estimate(0.1, -0.2, 0.4, 7).map(perplexity)
    assert estimate == Estimate(math.exp(0.1), math.exp(-0.2), math.exp(0.4), 7)
    assert estimate.as_dict() == {"value": math.exp(0.1), "low": math.exp(-0.2), "high": math.exp(0.4), "count": 7}


@pytest.mark.parametrize(("only_first", "only_second"), [(1, 9), (9, 1), (5, 5), (0, 3), (12, 4), (1, 0)])
def test_mcnemar_against_binomial_coefficients(only_first: int, only_second: int) -> None:
    """Two-sided and exact: twice the smaller tail of a fair coin, at most 1."""
    pairs = [(True, False)] * only_first + [(False, True)] * only_second + [(True, True)] * 3 + [(False, False)] * 4
    found = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    count, tail = only_first + only_second, min(only_first, only_second)
    expected = min(1.0, 2 * sum(math.comb(count, each) for each in range(tail + 1)) / 2**count)
    assert found == {"only_first": only_first, "only_second": only_second, "p": pytest.approx(expected)}


def test_mcnemar_without_discordant_pairs() -> None:
    assert mcnemar([True, False], [True, False]) == {"only_first": 0, "only_second": 0, "p": 1.0}
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def test_nothing_to_reduce() -> None:
    assert reduction_percent(0.0, 0.0) is None
    assert reduction_percent(0.0, 0.5) is None
    assert reduction_percent(0.8, 0.2) == pytest.approx(75.0)
    assert reduction_percent(0.4, 0.6) == pytest.approx(-50.0)


def test_perplexity_is_finite_for_any_loss() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7.0)
    assert math.isfinite(perplexity(1e6))


def test_student_interval_against_scipy() -> None:
    values = [0.1, 0.4, 0.2, 0.35]
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert student_mean(values, 0.9) == Estimate(pytest.approx(np.mean(values)), pytest.approx(low), pytest.approx(high), 4)
    assert student_mean([0.1, 0.2], 0.9).low is None
