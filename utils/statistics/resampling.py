"""Means with bootstrap intervals. The unit is the document or text; trainings (seeds) are a second level above it.

S is the number of seeds, n of units. All seeds see the same units, so the two levels are crossed: a resample draws units once
for all seeds, and seeds beside them. (Drawing units anew within each drawn seed would count the units' spread S times too small.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from utils.statistics.estimate import Estimate

SEED = 0  # of the resampling: tables must not change when they are made again
BATCH = 500  # resamples held in memory as floats at once


def mean(values: ArrayLike, confidence: float, draws: int) -> Estimate:
    """Mean of values (n,) or (S, n), one a text, with a percentile bootstrap interval."""
    data = np.asarray(values, dtype=float)
    return weighted_mean(data, np.ones(data.shape[-1]), confidence, draws)


def weighted_mean(sums: ArrayLike, weights: ArrayLike, confidence: float, draws: int) -> Estimate:
    """sum(sums) / sum(weights), documents resampled as clusters: nats per token from nats (n,) or (S, n) and tokens (n,).

    With several seeds their mean, and seeds are resampled too, with deviations scaled by sqrt(S / (S - 1)) (Rao and Wu 1988), for the
    variance of a mean of S resampled seeds is too small by (S - 1) / S. Where seeds matter more than documents a 95 % interval
    still holds the truth in only 81 % of samples of 2 seeds, 86 % of 3, 92 % of 5, 94 % of 10 (tests/test_resampling.py).
    """
    table, tokens = np.atleast_2d(np.asarray(sums, dtype=float)), np.asarray(weights, dtype=float)
    seeds, units = table.shape
    value = float(table.mean(axis=0).sum() / tokens.sum())
    if units < 2:
        return Estimate(value, None, None, units)
    columns = np.column_stack([*table, tokens])
    drawn = np.concatenate([counts @ columns for counts in _drawn_units(units, draws)])  # (draws, S + 1)
    rates = drawn[:, :-1] / drawn[:, -1:]
    rates = rates[:, 0] if seeds == 1 else (rates * _drawn_seeds(seeds, draws)).sum(axis=1)
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), units)


def _drawn_units(units: int, draws: int) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn, (BATCH, n) at a time."""
    counts = _counts(units, draws)
    for start in range(0, draws, BATCH):
        yield counts[start : start + BATCH].astype(float)


@lru_cache(maxsize=4)
def _counts(units: int, draws: int) -> NDArray[np.uint8]:
    """(draws, n); the same for every quantity of as many units. Above 255 units no unit is drawn 256 times in practice."""
    random, blocks = np.random.default_rng(SEED), []
    for done in range(0, draws, BATCH):
        rows = min(BATCH, draws - done)
        drawn = random.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        blocks.append(np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).clip(max=255).astype(np.uint8))
    return np.concatenate(blocks)


def _drawn_seeds(seeds: int, draws: int) -> NDArray[np.float64]:
    """(draws, S) shares of the seeds, which sum to one."""
    counts = np.random.default_rng([SEED, 1]).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    return 1 / seeds + math.sqrt(seeds / (seeds - 1)) * (counts / seeds - 1 / seeds)


def student_mean(values: ArrayLike, confidence: float) -> Estimate:
    """Mean with Student's t interval, for a handful of independent searches; no interval from fewer than three."""
    data = np.asarray(values, dtype=float)
    value = float(data.mean())
    if len(data) < 3:
        return Estimate(value, None, None, len(data))
    half = float(stats.t.ppf((1 + confidence) / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Estimate(value, value - half, value + half, len(data))
