"""All records of a run in one place, over all seeds, and what of them is absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from configs.schema import Experiment
from utils.report.numbers import SHARE, Number, Source
from utils.run.artifacts import read_json
from utils.run.errors import InputError
from utils.run.records import read_rows
from utils.statistics import resampling

MODELS = ("base", "converted", "baseline", "monotonic")
ARMS = ("baseline", "monotonic")
CONTROLS = {"noise": "the baseline with weight noise, matched in quality", "earlier": "an earlier checkpoint, matched in quality"}
ATTACKED = ("base", "baseline", "monotonic", *CONTROLS)
ATTACKS = ("hotflip", "query_greedy", "transfer", "longer")
RANDOM = "random"  # random flips as an attack: of the draws of HotFlip's control the best one for each text


@dataclass(frozen=True, eq=False)
class Study:
    """`json[seed][artefact]` as stored; `documents`, `flips`, `triggers`, `steps`, `benchmarks` are long tables with a column `seed`.

    `files[seed][artefact]` are the paths; an artefact that a seed lacks is absent there. `flips` has beside the stored fields `attack`
    (the part before a colon; `found_on` is the part behind), `clean` and `rise`, nats per untouched token after hotflip.flips flips.
    """

    config: Experiment
    json: Mapping[int, Mapping[str, Any]]
    documents: pd.DataFrame
    flips: pd.DataFrame
    triggers: pd.DataFrame
    steps: pd.DataFrame
    benchmarks: pd.DataFrame = field(default_factory=pd.DataFrame)
    files: Mapping[int, Mapping[str, Path]] = field(default_factory=dict)

    @classmethod
    def load(cls, config: Experiment, inputs: Mapping[int, Mapping[str, Path]]) -> Study:
        json = {seed: {name: read_json(path) for name, path in paths.items() if path.suffix == ".json"} for seed, paths in inputs.items()}
        _same_text({seed: stored["setup"]["source"] for seed, stored in json.items() if "setup" in stored})
        benchmarks = _numeric(_rows("benchmark_records", inputs))
        read = {name: _rows(name, inputs) for name in ("evaluation_records", "hotflip_records", "uat_records")}
        steps = pd.concat([_rows(f"{arm}_metrics", inputs).assign(arm=arm) for arm in ARMS], ignore_index=True)
        flips = with_rises(read["hotflip_records"], config.hotflip.flips)
        return cls(config, json, read["evaluation_records"], flips, read["uat_records"], steps, benchmarks, inputs)

    @property
    def seeds(self) -> list[int]:
        """Those of which there is anything."""
        return [seed for seed, stored in self.json.items() if stored]

    @property
    def measured(self) -> int:
        """How many seeds the quantity with the fewest rests on."""
        return min((frame["seed"].nunique() for frame in (self.documents, self.flips) if len(frame)), default=0)

    def stored(self, artefact: str) -> dict[int, Any]:
        """A JSON artefact of every seed that has it."""
        return {seed: stored[artefact] for seed, stored in self.json.items() if artefact in stored}

    @cached_property
    def models(self) -> list[str]:
        """Models whose test loss was measured, in the order of the report."""
        return _present(self.documents, "model", (*MODELS, *CONTROLS))

    @cached_property
    def attacked(self) -> list[str]:
        return _present(self.flips, "model", ATTACKED)

    @cached_property
    def triggered(self) -> list[str]:
        return _present(self.triggers, "model", ATTACKED)

    @cached_property
    def subsets(self) -> list[str]:
        return sorted(self.documents["subset"].unique())

    def matrix(
        self, rows: pd.DataFrame, unit: str, value: str, where: Mapping[str, Iterable[Any]], how: str | Callable[..., Any] = "mean"
    ) -> pd.DataFrame:
        """(S, n): one row a seed, one column a unit; only units that every seed has."""
        for column, wanted in where.items():
            rows = rows[rows[column].isin(list(wanted))]
        return rows.groupby(["seed", unit])[value].agg(how).unstack(unit).dropna(axis=1)

    def mean(self, matrix: pd.DataFrame, unit: str, how: str, *sources: Source, least: float = 0.0) -> Number:
        """Mean over seeds and units, both resampled; the interval of a share ends at `least` and at one."""
        report = self.config.report
        estimate = resampling.mean(matrix.to_numpy(), report.confidence, report.bootstrap_draws)
        if unit == SHARE:
            low, high = (None if bound is None else min(max(bound, least), 1.0) for bound in (estimate.low, estimate.high))
            estimate = replace(estimate, low=low, high=high)
        return Number.of(estimate, unit, f"mean of {how}; {self.resampled(matrix)}", *sources)

    @staticmethod
    def resampled(matrix: pd.DataFrame) -> str:
        seeds, units = matrix.shape
        return f"bootstrap over {units} {matrix.columns.name}s" + (f" and {seeds} seeds" if seeds > 1 else "")

    @property
    def traces(self) -> dict[str, list[str]]:
        """Files of each artefact, relative to the folder of the run's work."""
        found: dict[str, list[str]] = {}
        for paths in self.files.values():
            for name, path in paths.items():
                found.setdefault(name, []).append(Path(*path.parts[-3:]).as_posix())
        return found

    @cached_property
    def lacking(self) -> dict[int, list[str]]:
        """{seed: artefacts that it lacks and another seed has}; a report of which this is not empty is partial."""
        names = list(dict.fromkeys(name for paths in self.files.values() for name in paths))
        found = {seed: [name for name in names if name not in paths] for seed, paths in self.files.items()}
        return {seed: missing for seed, missing in found.items() if missing}

    @cached_property
    def absent(self) -> list[str]:
        """What the report does without, in words."""
        lines = [
            f"seed {seed} has no {', '.join(missing)}: its stage is not complete; the other seeds are reported"
            for seed, missing in self.lacking.items()
        ]
        lines += [f"control {name} ({words}): no attack records" for name, words in CONTROLS.items() if name not in self.attacked]
        for seed, results in self.stored("hotflip_results").items():
            reasons = {name: results.get("matched", {}).get(name) for name in CONTROLS}
            lines += [f"seed {seed} has no control {name}: {reason}" for name, reason in reasons.items() if isinstance(reason, str)]
        kinds = set(self.flips["attack"]) if len(self.flips) else set()
        lines += [f"attack {name}: no records" for name in ATTACKS if name not in kinds]
        if self.benchmarks.empty:
            lines.append("benchmarks: no records")
        return lines


def _rows(artefact: str, inputs: Mapping[int, Mapping[str, Path]]) -> pd.DataFrame:
    frames = [pd.DataFrame(read_rows(paths[artefact])).assign(seed=seed) for seed, paths in inputs.items() if artefact in paths]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _numeric(benchmarks: pd.DataFrame) -> pd.DataFrame:
    """Only items whose value is a number: a perplexity by word or byte is recorded as a pair, which has no mean over items."""
    return benchmarks if benchmarks.empty else benchmarks[benchmarks["value"].map(lambda value: isinstance(value, (int, float)))]


def with_rises(flips: pd.DataFrame, budget: int) -> pd.DataFrame:
    """Add attack, found_on, clean, rise and random_rise to the rows of stage 6, and rows of the attack RANDOM.

    Rows without `attack` are HotFlip's.
    """
    if flips.empty:
        return flips
    named = flips["attack"] if "attack" in flips else pd.Series("hotflip", flips.index)
    parts = named.fillna("hotflip").str.partition(":")
    drawn = flips["random_nll"] if "random_nll" in flips else pd.Series([None] * len(flips), flips.index)
    clean = flips["nll"].map(lambda nll: nll[0])
    searched = flips.assign(
        attack=parts[0],
        found_on=parts[2],
        clean=clean,
        rise=flips["nll"].map(lambda nll: nll[min(budget, len(nll) - 1)]) - clean,
        random_rise=drawn.map(lambda each: float(np.mean(each)) if isinstance(each, list) and each else np.nan) - clean,
    )
    best = drawn.map(lambda each: float(np.max(each)) if isinstance(each, list) and each else np.nan) - clean
    chance = searched[["seed", "model", "text", "subset", "clean"]].assign(attack=RANDOM, found_on="", rise=best)
    return pd.concat([searched, chance[best.notna()]], ignore_index=True)


def _present(rows: pd.DataFrame, column: str, order: Iterable[str]) -> list[str]:
    there = set(rows[column]) if column in rows else set()
    return [name for name in order if name in there] + sorted(there - set(order))


def _same_text(sources: Mapping[int, Any]) -> None:
    first = next(iter(sources))
    if others := [seed for seed, source in sources.items() if source != sources[first]]:
        raise InputError(
            f"seeds {first} and {others[0]} were made from different text (setup_complete.json, source); run stage 0 of one of them "
            "again with --discard, and what follows from it"
        )
