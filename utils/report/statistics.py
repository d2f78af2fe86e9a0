"""Paired comparisons with intervals. Every function takes one value a document or text, never pooled tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

SEED = 0  # of the resampling: tables must not change when they are made again
BATCH = 500  # resamples held in memory at once


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; the bounds are None where the data cannot give one (a single document, two seeds)."""

    value: float
    low: float | None
    high: float | None
    count: int

    def verdict(self, below: str, above: str, unclear: str = "not distinguishable") -> str:
        """Words that follow from the interval alone."""
        if self.low is None or self.high is None:
            return f"{unclear} (too few for an interval)"
        return below if self.high < 0 else above if self.low > 0 else unclear

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the quantity, for example exp of a difference in nats."""
        bounds = [None if bound is None else function(bound) for bound in (self.low, self.high)]
        return Estimate(function(self.value), bounds[0], bounds[1], self.count)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: ArrayLike, confidence: float, draws: int) -> Estimate:
    """Mean of one value a text, with a percentile bootstrap interval over the texts."""
    return weighted_mean(values, np.ones_like(np.asarray(values, dtype=float)), confidence, draws)


def weighted_mean(sums: ArrayLike, weights: ArrayLike, confidence: float, draws: int) -> Estimate:
    """sum(sums) / sum(weights), documents resampled as clusters: nats per token from nats and tokens of each document."""
    top, bottom = np.asarray(sums, dtype=float), np.asarray(weights, dtype=float)
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(value, None, None, len(top))

    def ratio(a: NDArray[np.float64], b: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return a.sum(axis=axis) / b.sum(axis=axis)

    low, high = stats.bootstrap(
        (top, bottom),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=BATCH,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value, float(low), float(high), len(top))


def student_mean(values: ArrayLike, confidence: float) -> Estimate:
    """Mean with Student's t interval, for a handful of independent runs; no interval from fewer than three."""
    data = np.asarray(values, dtype=float)
    value = float(data.mean())
    if len(data) < 3:
        return Estimate(value, None, None, len(data))
    half = float(stats.t.ppf((1 + confidence) / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Estimate(value, value - half, value + half, len(data))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | int]:
    """Exact McNemar test of paired successes: the two-sided binomial test on the discordant pairs; p = 1 if there are none."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def reduction_percent(before: float, after: float) -> float | None:
    """100 (before - after) / before; None where there is nothing to reduce."""
    return None if before == 0 else 100 * (before - after) / before


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))
