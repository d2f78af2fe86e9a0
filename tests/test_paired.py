"""Paired tests and intervals against enumeration, brute force and published numbers, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from utils.statistics.estimate import Estimate
from utils.statistics.paired import hodges_lehmann, holm, mcnemar, rate, success_difference, tango_score, wilcoxon

# Hollander and Wolfe (1973), page 29: depression scores of nine patients before and after a tranquillizer; R's help of wilcox.test
BEFORE = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
AFTER = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided p over all 2^n signs."""
    ranks = stats.rankdata(np.abs(differences))
    found = sum(rank for rank, each in zip(ranks, differences, strict=True) if each > 0)
    sums = [sum(rank for rank, plus in zip(ranks, signs, strict=True) if plus) for signs in itertools.product((0, 1), repeat=len(ranks))]
    low, high = np.mean(np.array(sums) <= found), np.mean(np.array(sums) >= found)
    return min(1.0, 2 * min(low, high))


def test_wilcoxon_against_the_published_example() -> None:
    """R's wilcox.test(x, y, paired = TRUE, alternative = "greater") gives 0.01953; two-sided twice that."""
    differences = np.subtract(BEFORE, AFTER)
    assert wilcoxon(differences) == pytest.approx(0.0390625)
    assert hodges_lehmann(differences, 0.95).value == pytest.approx(0.46)


@pytest.mark.parametrize("seed", range(4))
def test_wilcoxon_against_all_signs(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.4, 1.0, 9).tolist()
    assert wilcoxon(differences) == pytest.approx(signed_rank_p(differences))


def test_wilcoxon_without_a_difference() -> None:
    assert wilcoxon([0.0, 0.0]) == 1.0
    assert wilcoxon([0.0, 0.3, 0.0, 0.2, 0.1, 0.5, 0.4]) == wilcoxon([0.3, 0.2, 0.1, 0.5, 0.4])


@pytest.mark.parametrize("count", [6, 9, 12])
def test_hodges_lehmann_interval_holds_the_shifts_that_are_not_rejected(count: int) -> None:
    """The interval turned round: a shift just inside is not rejected at 5 %, one just outside is."""
    differences = np.random.default_rng(count).normal(0.2, 1.0, count)
    found = hodges_lehmann(differences, 0.95)
    means = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2)]
    assert found.value == pytest.approx(np.median(means)) and found.count == count
    for bound, outwards in ((found.low, -1e-6), (found.high, 1e-6)):
        assert bound is not None
        assert signed_rank_p((differences - bound - outwards).tolist()) <= 0.05
        assert signed_rank_p((differences - bound + outwards).tolist()) > 0.05


def test_hodges_lehmann_of_too_few() -> None:
    """Five differences cannot reject anything at 5 % on two sides."""
    assert hodges_lehmann([0.1, 0.2, 0.3, 0.4, 0.5], 0.95) == Estimate(0.3, None, None, 5)
    assert hodges_lehmann([1.0] * 8, 0.95) == Estimate(1.0, 1.0, 1.0, 8)


@pytest.mark.parametrize("count", [20, 80])
def test_hodges_lehmann_covers_the_truth_and_wilcoxon_keeps_its_size(count: int) -> None:
    """Exact and normal; heavy tails. 400 samples, so a share of 95 % has a standard error of 1.1 %."""
    samples = np.random.default_rng(count).standard_t(3, (400, count))
    intervals = [hodges_lehmann(sample, 0.95) for sample in samples]
    assert 0.92 <= np.mean([each.low <= 0 <= each.high for each in intervals]) <= 0.98  # type: ignore[operator]
    assert 0.02 <= np.mean([wilcoxon(sample) <= 0.05 for sample in samples]) <= 0.08


@pytest.mark.parametrize(("only_first", "only_second"), [(1, 9), (9, 1), (5, 5), (0, 3), (12, 4), (1, 0)])
def test_mcnemar_against_binomial_coefficients(only_first: int, only_second: int) -> None:
    """Two-sided and exact: twice the smaller tail of a fair coin, at most 1."""
    found = mcnemar(*pairs(only_second, only_first, 7))
    count, tail = only_first + only_second, min(only_first, only_second)
    expected = min(1.0, 2 * sum(math.comb(count, each) for each in range(tail + 1)) / 2**count)
    assert found == {"only_first": only_first, "only_second": only_second, "p": pytest.approx(expected)}


def test_mcnemar_without_discordant_pairs() -> None:
    assert mcnemar([True, False], [True, False]) == {"only_first": 0, "only_second": 0, "p": 1.0}
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def pairs(gained: int, lost: int, same: int) -> tuple[list[bool], list[bool]]:
    """Successes of a first and a second model; half of those that agree are successes."""
    half = [number % 2 == 0 for number in range(same)]
    return [False] * gained + [True] * lost + half, [True] * gained + [False] * lost + half


@pytest.mark.parametrize(("gained", "lost", "same"), [(9, 1, 30), (0, 0, 10), (5, 0, 7), (12, 2, 36), (3, 4, 0)])
def test_tango_score_against_a_search_over_the_likelihood(gained: int, lost: int, same: int) -> None:
    """The nuisance rate by brute force on a grid instead of in closed form."""
    count = gained + lost + same
    for shift in (-0.6, -0.2, 0.05, 0.3, 0.7):
        grid = np.linspace(max(0.0, -shift), (1 - shift) / 2, 200_001)[1:-1]
        likelihood = gained * np.log(grid + shift) + lost * np.log(grid) + same * np.log(1 - 2 * grid - shift)
        best = grid[likelihood.argmax()]
        expected = (gained - lost - count * shift) / math.sqrt(count * (2 * best + shift - shift**2))
        assert tango_score(gained, lost, count, shift) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("gained", "lost", "same"), [(9, 1, 30), (0, 0, 10), (5, 0, 7), (3, 4, 0)])
def test_interval_of_the_paired_difference_ends_where_the_score_does(gained: int, lost: int, same: int) -> None:
    found = success_difference(*pairs(gained, lost, same), 0.95)
    count = gained + lost + same
    assert found.value == pytest.approx((gained - lost) / count) and found.count == count
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert tango_score(gained, lost, count, found.low) == pytest.approx(1.959964, abs=1e-4)
    assert tango_score(gained, lost, count, found.high) == pytest.approx(-1.959964, abs=1e-4)


def test_paired_difference_at_the_edges() -> None:
    """All texts change: the interval ends at one; with none it is that of Tango's closed form, z^2 / (n + z^2)."""
    gained = success_difference(*pairs(10, 0, 0), 0.95)
    assert gained.value == gained.high == 1.0 and 0 < gained.low < 1  # type: ignore[operator]
    none, z2 = success_difference(*pairs(0, 0, 44), 0.95), 1.959964**2
    assert (none.low, none.high) == pytest.approx((-z2 / (44 + z2), z2 / (44 + z2)), abs=1e-4)
    assert success_difference([True], [True], 0.95).verdict("below", "above") == "not distinguishable"


def test_paired_interval_covers_the_truth() -> None:
    """60 texts, few of them discordant: 6 % lost, 16 % gained."""
    counts = np.random.default_rng(2).multinomial(60, [0.16, 0.06, 0.78], size=500)
    found = [success_difference(*pairs(*map(int, row)), 0.95) for row in counts]
    assert 0.92 <= np.mean([each.low <= 0.1 <= each.high for each in found]) <= 0.98  # type: ignore[operator]


def test_mcnemar_keeps_its_size() -> None:
    counts = np.random.default_rng(3).multinomial(60, [0.12, 0.12, 0.76], size=1000)
    assert np.mean([mcnemar(*pairs(*map(int, row)))["p"] <= 0.05 for row in counts]) <= 0.06


def test_rate_has_wilsons_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662, 15 of 148 0.0624 to 0.1605, none of 20 0 to 0.1611."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = rate([True] * hits + [False] * (count - hits), 0.95)
        assert (found.value, found.low, found.high) == pytest.approx((hits / count, low, high), abs=5e-5)


def test_holm_by_hand() -> None:
    """0.01 * 4, 0.02 * 3, then 0.03 * 2 = 0.06 and 0.04 are lifted to what comes before them."""
    p = {"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02}
    assert holm(p) == pytest.approx({"d": 0.06, "a": 0.04, "c": 0.06, "b": 0.06})
    assert list(holm(p)) == ["d", "a", "c", "b"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_keeps_the_familys_error_rate() -> None:
    """Three true hypotheses and a false one."""
    random, wrong = np.random.default_rng(6), 0
    for _ in range(2000):
        adjusted = holm({"false": 1e-6} | {f"true {number}": random.random() for number in range(3)})
        wrong += any(p <= 0.05 for name, p in adjusted.items() if name != "false")
    assert wrong / 2000 <= 0.065
