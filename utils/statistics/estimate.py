"""A number with its interval, and the words that may be said about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

Some = TypeVar("Some", bound="Estimate")


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; the bounds are None where the data cannot give one (a single document, two searches)."""

    value: float
    low: float | None
    high: float | None
    count: int

    def verdict(self, below: str, above: str, unclear: str = "not distinguishable") -> str:
        """Words that follow from the interval alone."""
        if self.low is None or self.high is None:
            return f"{unclear} (too few for an interval)"
        return below if self.high < 0 else above if self.low > 0 else unclear

    def below(self, margin: float) -> bool | None:
        """Non-inferiority of a loss difference: whether the whole interval lies below the margin; None without an interval."""
        return None if self.high is None else self.high < margin

    def map(self: Some, function: Callable[[float], float]) -> Some:
        """The estimate of an increasing function of the quantity, for example exp of a difference in nats."""
        low, high = (None if bound is None else function(bound) for bound in (self.low, self.high))
        return replace(self, value=function(self.value), low=low, high=high)

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


def reduction_percent(before: float, after: float) -> float | None:
    """100 (before - after) / before; None where there is nothing to reduce."""
    return None if before == 0 else 100 * (before - after) / before


def perplexity(nats: float) -> float:
    """exp, kept finite for any loss."""
    return math.exp(min(nats, 700.0))
