"""Tests and intervals of paired data: differences of rise (Wilcoxon, Hodges-Lehmann), successes (McNemar, Tango), and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from utils.statistics.estimate import Estimate

EXACT = 50  # differences, up to which the null distribution of the signed-rank sum is enumerated


def wilcoxon(differences: ArrayLike) -> float:
    """Two-sided p of the signed-rank test that differences (n,) are symmetric about zero; zeros are left out, and p = 1 if all are."""
    data = np.asarray(differences, dtype=float)
    data = data[data != 0]
    return float(stats.wilcoxon(data).pvalue) if len(data) else 1.0


def hodges_lehmann(differences: ArrayLike, confidence: float) -> Estimate:
    """Median of the Walsh averages (x_i + x_j) / 2, i <= j, with the interval of shifts that the signed-rank test does not reject.

    Exact up to 50 differences, normal above (Hollander and Wolfe, section 3.3). No interval where even the widest has less confidence.
    """
    data = np.asarray(differences, dtype=float)
    first, second = np.triu_indices(len(data))
    walsh = np.sort((data[first] + data[second]) / 2)
    left_out = _left_out(len(data), (1 - confidence) / 2)
    low, high = (None, None) if left_out < 0 else (float(walsh[left_out]), float(walsh[len(walsh) - 1 - left_out]))
    return Estimate(float(np.median(walsh)), low, high, len(data))


def _left_out(count: int, tail: float) -> int:
    """Walsh averages outside the interval on either side: the largest k with P(signed-rank sum <= k) <= tail; -1 if there is none."""
    if count > EXACT:
        deviation = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return int(count * (count + 1) / 4 + stats.norm.ppf(tail) * deviation)
    ways = np.ones(1)
    for rank in range(1, count + 1):  # the sum of the ranks whose sign is plus
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    return int(np.searchsorted(np.cumsum(ways) / 2.0**count, tail, side="right")) - 1


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | int]:
    """Exact McNemar test of paired successes: the two-sided binomial test on the discordant pairs; p = 1 if there are none."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def rate(successes: Sequence[bool], confidence: float) -> Estimate:
    """Share of successes with Wilson's score interval (1927), which does not close up where there are none, or only successes."""
    hits, count = sum(successes), len(successes)
    low, high = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
    return Estimate(hits / count, float(low), float(high), count)


def success_difference(first: Sequence[bool], second: Sequence[bool], confidence: float) -> Estimate:
    """Success rate of `second` minus `first` on the same texts, with the score interval of Tango (1998), which also holds where there
    are few discordant pairs or none."""
    tests, count = mcnemar(first, second), len(first)
    gained, lost = int(tests["only_second"]), int(tests["only_first"])
    value, limit = (gained - lost) / count, float(stats.norm.ppf((1 + confidence) / 2))

    def bound(sign: float) -> float:
        def excess(shift: float) -> float:
            return tango_score(gained, lost, count, shift) + sign * limit

        return float(sign) if excess(sign) * excess(value) > 0 else float(optimize.brentq(excess, value, sign))

    return Estimate(value, bound(-1.0), bound(1.0), count)


def tango_score(gained: int, lost: int, count: int, shift: float) -> float:
    """Tango's score for "the difference of the paired rates is `shift`", asymptotically standard normal (equation 11 there)."""
    a, b = 2 * count, -gained - lost + (2 * count - gained + lost) * shift
    lost_rate = (math.sqrt(max(0.0, b * b + 4 * a * lost * shift * (1 - shift))) - b) / (2 * a)  # under that hypothesis
    variance = count * (2 * lost_rate + shift * (1 - shift))
    top = gained - lost - count * shift
    return top / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, top) if abs(top) > 1e-9 else 0.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of a declared family (Holm 1979), in the order given: each at most the family's error rate if rejected below it."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
