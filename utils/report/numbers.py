"""A number and where it comes from: every cell of a table can be traced to rows of record files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from utils.statistics.estimate import Estimate, perplexity

NATS, PERPLEXITY, RATIO, SHARE, P, COUNT = "nats per token", "perplexity", "ratio", "share", "p", "count"
NO_INTERVAL = (P, COUNT)
DIGITS = {PERPLEXITY: 2, NATS: 3, RATIO: 3}


@dataclass(frozen=True)
class Source:
    """Rows of an artefact: those whose columns have one of the listed values, and the fields that were read. A value may end in `*`;
    a row without the column `attack` is one of HotFlip."""

    artefact: str
    where: Mapping[str, tuple[Any, ...]]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Number(Estimate):
    """An estimate with its unit, how it was formed, and from what."""

    unit: str = ""
    how: str = ""
    sources: tuple[Source, ...] = ()

    @classmethod
    def of(cls, estimate: Estimate, unit: str, how: str, *sources: Source) -> Number:
        return cls(estimate.value, estimate.low, estimate.high, estimate.count, unit, how, sources)

    def exp(self, unit: str) -> Number:
        """Perplexity of a loss, or the ratio of perplexities of a loss difference."""
        return replace(self.map(perplexity), unit=unit, how=f"exp of: {self.how}")

    def text(self, digits: int | None = None, *, bare: bool = False) -> str:
        """1.034 [1.020, 1.049]; shares in percent; `bare` without the interval."""
        if self.unit == P:
            return f"{self.value:.2g}"
        if self.unit == COUNT:
            return f"{self.value:,.0f}"
        scale, places = (100, 1) if self.unit == SHARE else (1, DIGITS.get(self.unit, 3))
        places = places if digits is None else digits
        value, end = f"{scale * self.value:.{places}f}", " %" if self.unit == SHARE else ""
        if bare:
            return value + end
        if self.low is None or self.high is None:
            return f"{value}{end} [no interval from {self.count}]"
        return f"{value}{end} [{scale * self.low:.{places}f}, {scale * self.high:.{places}f}]"

    def traced(self, files: Mapping[str, list[str]]) -> dict[str, Any]:
        """As stored in numbers.json; `files` gives the files of each artefact, relative to the run's folder of work."""
        sources = [
            {"artefact": source.artefact, "files": files.get(source.artefact, []), "where": dict(source.where), "fields": source.fields}
            for source in self.sources
        ]
        return {**self.as_dict(), "unit": self.unit, "how": self.how, "sources": sources}
