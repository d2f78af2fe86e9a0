"""Bootstrap intervals against a plain loop, against scipy's bootstrap, and by simulation: how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from utils.statistics.estimate import Estimate
from utils.statistics.resampling import mean, student_mean, weighted_mean


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


def test_interval_equals_scipys_bootstrap() -> None:
    random = np.random.default_rng(4)
    values = random.gamma(2.0, 1.0, 60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, confidence_level=0.95, method="percentile", rng=random)
    ours = mean(values, 0.95, 9999)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


def test_interval_of_seeds_equals_a_plain_loop() -> None:
    """Seeds and documents drawn apart, the same documents for all seeds; a seed's share scaled after Rao and Wu."""
    random = np.random.default_rng(5)
    tokens = random.integers(5, 200, 30)
    nats = tokens * (random.normal(3.0, 0.5, 30) + random.normal(0, 0.2, (4, 1)))
    drawn_means = []
    for _ in range(4000):
        documents, seeds = random.integers(0, 30, 30), random.integers(0, 4, 4)
        rates = nats[:, documents].sum(axis=1) / tokens[documents].sum()
        center = rates.mean()
        drawn_means.append(center + math.sqrt(4 / 3) * (rates[seeds].mean() - center))
    estimate = weighted_mean(nats, tokens, 0.9, 4000)
    assert estimate.value == pytest.approx(nats.sum() / (4 * tokens.sum()))
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(drawn_means, [0.05, 0.95]), abs=0.02)


def coverage(samples: int, draw: object) -> float:
    """Share of samples whose 95 % interval holds zero, the truth of what `draw()` gives to weighted_mean."""
    hits = 0
    for _ in range(samples):
        estimate = weighted_mean(*draw(), 0.95, 300)  # type: ignore[operator]
        assert estimate.low is not None and estimate.high is not None
        hits += estimate.low <= 0.0 <= estimate.high
    return hits / samples


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """600 samples of 40 documents of unequal length."""
    random = np.random.default_rng(0)

    def draw() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        tokens = random.integers(20, 120, 40)
        return tokens * random.normal(0.0, 0.6, 40), tokens

    assert 0.91 <= coverage(600, draw) <= 0.97


@pytest.mark.parametrize(("seeds", "expected"), [(2, 0.81), (3, 0.86), (5, 0.92), (10, 0.94)])
def test_coverage_where_seeds_matter_more_than_documents(seeds: int, expected: float) -> None:
    """Means of seeds spread by 0.3, of documents by 0.6 / sqrt(40). The fewer seeds the more the interval claims too much, which the
    report says; the expected shares are those of 2,000 samples."""
    random = np.random.default_rng(seeds)

    def draw() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        trained, document = random.normal(0, 0.3, (seeds, 1)), random.normal(0, 0.6, 40)
        return trained + document + random.normal(0, 0.2, (seeds, 40)), np.ones(40)

    assert coverage(500, draw) == pytest.approx(expected, abs=0.05)


def test_averaging_seeds_first_would_miss_their_spread() -> None:
    """What the second level is for: seeds far apart, documents alike."""
    table = np.array([[1.0], [2.0], [3.0]]) + 0.001 * np.random.default_rng(0).normal(size=(3, 40))
    narrow, wide = mean(table.mean(axis=0), 0.95, 2000), mean(table, 0.95, 2000)
    assert narrow.value == pytest.approx(wide.value)
    assert narrow.low > 1.99 and wide.low < 1.4


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


def test_student_interval_against_scipy() -> None:
    values = [0.1, 0.4, 0.2, 0.35]
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert student_mean(values, 0.9) == Estimate(pytest.approx(np.mean(values)), pytest.approx(low), pytest.approx(high), 4)
    assert student_mean([0.1, 0.2], 0.9).low is None
