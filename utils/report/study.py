"""All records of a run in one place, and the comparisons that the tables, figures and the summary share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from configs.schema import Experiment
from utils.report.statistics import Estimate, mcnemar, mean, perplexity, student_mean, weighted_mean
from utils.run.artifacts import read_json
from utils.run.errors import InputError
from utils.run.records import read_rows

MODELS = ("base", "converted", "baseline", "monotonic")
ATTACKED = ("base", "baseline", "monotonic")


@dataclass(frozen=True)
class Study:
    """`json[seed][artefact]` as stored; `documents`, `flips`, `triggers`, `steps` are long tables with a column `seed`."""

    config: Experiment
    json: Mapping[int, Mapping[str, Any]]
    documents: pd.DataFrame
    flips: pd.DataFrame
    triggers: pd.DataFrame
    steps: pd.DataFrame

    @classmethod
    def load(cls, config: Experiment, inputs: Mapping[int, Mapping[str, Path]]) -> Study:
        json = {seed: {name: read_json(path) for name, path in paths.items() if path.suffix == ".json"} for seed, paths in inputs.items()}
        sources = {seed: stored["setup"]["source"] for seed, stored in json.items()}
        first = next(iter(sources))
        if others := [seed for seed, source in sources.items() if source != sources[first]]:
            raise InputError(
                f"seeds {first} and {others[0]} were made from different text (setup_complete.json, source); run stage 0 of one of them "
                "again with --discard, and what follows from it"
            )
        rows = {
            name: pd.concat([pd.DataFrame(read_rows(paths[name])).assign(seed=seed) for seed, paths in inputs.items()], ignore_index=True)
            for name in ("evaluation_records", "hotflip_records", "uat_records", "baseline_metrics", "monotonic_metrics")
        }
        steps = pd.concat([rows[f"{arm}_metrics"].assign(arm=arm) for arm in ("baseline", "monotonic")], ignore_index=True)
        flips = rows["hotflip_records"]
        flips = flips[flips["attack"] == "hotflip"].reset_index(drop=True)
        flips["rise"] = [nll[-1] - nll[0] for nll in flips["nll"]]
        flips["random_rise"] = [np.mean(random) - nll[0] for random, nll in zip(flips["random_nll"], flips["nll"], strict=True)]
        return cls(config, json, rows["evaluation_records"], flips, rows["uat_records"], steps)

    @property
    def seeds(self) -> list[int]:
        return list(self.json)

    @property
    def _resampling(self) -> dict[str, Any]:
        return {"confidence": self.config.report.confidence, "draws": self.config.report.bootstrap_draws}

    def interval_of(self, values: ArrayLike) -> Estimate:
        """Mean of one value a text, with the report's interval."""
        return mean(values, **self._resampling)

    def nll(self, model: str, subset: str | None = None) -> Estimate:
        """Nats per token of a model, seeds averaged by document."""
        nats, tokens = self._document_nats(model, subset)
        return weighted_mean(nats, tokens, **self._resampling)

    def nll_difference(self, model: str, other: str) -> Estimate:
        """Nats per token, `model` minus `other`, paired by document."""
        nats, tokens = self._document_nats(model)
        return weighted_mean(nats - self._document_nats(other)[0], tokens, **self._resampling)

    def _document_nats(self, model: str, subset: str | None = None) -> tuple[pd.Series, pd.Series]:
        rows = self.documents[self.documents["model"] == model]
        rows = rows if subset is None else rows[rows["subset"] == subset]
        grouped = rows.groupby("document")[["nll", "tokens"]].mean()
        return grouped["nll"], grouped["tokens"]

    def per_seed_ratio(self, model: str, other: str) -> dict[int, float]:
        """Perplexity ratio within each seed."""
        sums = self.documents.groupby(["seed", "model"])[["nll", "tokens"]].sum()
        loss = sums["nll"] / sums["tokens"]
        return {seed: perplexity(float(loss[seed, model] - loss[seed, other])) for seed in self.seeds}

    def flip_rise(self, model: str, column: str = "rise") -> Estimate:
        """Rise under HotFlip (or 'random_rise'), nats per untouched token, seeds averaged by text."""
        return self.interval_of(self._by_text(self.flips, model, column))

    def flip_difference(self) -> Estimate:
        """HotFlip's rise, monotonic minus baseline, paired by text."""
        return self.interval_of(self._by_text(self.flips, "monotonic", "rise") - self._by_text(self.flips, "baseline", "rise"))

    def flip_success(self, model: str) -> float:
        """Share of texts (over all seeds) whose rise exceeds the common threshold."""
        rows = self.flips[self.flips["model"] == model]
        return float((rows["rise"] > self.config.hotflip.threshold_nats).mean())

    def flip_mcnemar(self) -> dict[int, dict[str, float | int]]:
        """Exact test of success, baseline (first) against monotonic (second), for each seed."""
        threshold, tests = self.config.hotflip.threshold_nats, {}
        for seed in self.seeds:
            rows = self.flips[self.flips["seed"] == seed]
            wide = rows.pivot(index="text", columns="model", values="rise") > threshold
            tests[seed] = mcnemar(wide["baseline"].tolist(), wide["monotonic"].tolist())
        return tests

    def reference_success(self, model: str) -> float:
        """The reference's criterion: relative rise of the model's own loss over all tokens, flipped ones included."""
        rows = self.flips[self.flips["model"] == model]
        relative = rows["reference_attacked"] / rows["reference_clean"] - 1
        return float((relative > self.config.hotflip.reference_threshold).mean())

    def trigger_rise(self, model: str, trigger: str, zero: str = "clean") -> Estimate:
        """Held-out rise of `model` under a trigger against another (no trigger by default), nats per token of the text."""
        return self.interval_of(self._trigger_nll(model, trigger) - self._trigger_nll(model, zero))

    def trigger_difference(self) -> Estimate:
        """Rise under the own trigger, monotonic minus baseline. The unit is the search, one for each model and seed: two searches
        on one model differ more than two texts do, so an interval over texts would claim what a repetition refutes."""
        nll = self.triggers.groupby(["seed", "model", "trigger"])["nll"].mean()
        rise = {model: [nll[seed, model, model] - nll[seed, model, "clean"] for seed in self.seeds] for model in ("baseline", "monotonic")}
        return student_mean(np.subtract(rise["monotonic"], rise["baseline"]), self.config.report.confidence)

    def _trigger_nll(self, model: str, trigger: str) -> pd.Series:
        kinds = self.triggers["trigger"]
        chosen = kinds.str.startswith("random_") if trigger == "random" else kinds == trigger
        return self._by_text(self.triggers[chosen], model, "nll")

    @staticmethod
    def _by_text(rows: pd.DataFrame, model: str, column: str) -> pd.Series:
        return rows[rows["model"] == model].groupby("text")[column].mean()

    @cached_property
    def certificates(self) -> dict[int, dict[str, Any]]:
        return {seed: stored["monotonic_certificate"] for seed, stored in self.json.items()}

    @cached_property
    def perplexity_ratio(self) -> Estimate:
        """Primary endpoint: monotonic over baseline, exp of the paired difference."""
        return self.nll_difference("monotonic", "baseline").map(perplexity)

    @property
    def non_inferior(self) -> bool | None:
        """Whether the interval's upper bound of the loss difference is below the margin; None without an interval."""
        high = self.nll_difference("monotonic", "baseline").high
        return None if high is None else high < self.config.report.margin_nats
