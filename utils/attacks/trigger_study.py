"""Stage 5 on stored models: a trigger searched on every model, and reported on every model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from utils.attacks.study import Study
from utils.attacks.trigger_records import TriggerAttacks, common_triggers, own_triggers
from utils.attacks.trigger_results import table_of, trigger_results
from utils.attacks.uat import chosen
from utils.run.records import Row, grouped, write_rows
from utils.run.units import Step, Unit

TOGETHER = 4  # triggers of one unit of a report: small enough to be shared out evenly, and few files


class TriggerStudy(Study[TriggerAttacks]):
    """A search is cut into its restarts, a report into a few triggers each."""

    def attacks(self, model: PreTrainedModel, name: str) -> TriggerAttacks:
        return TriggerAttacks(model, name, self.sets, self.alphabet, self.words, self.config.uat, self.config.compute.precision)

    def searches(self, name: str) -> list[Unit]:
        return [self._search(name, restart) for restart in range(self.config.uat.restarts + 1)]

    def _search(self, name: str, restart: int) -> Unit:
        spec = self.config.uat

        def work(begun: Path, step: Step) -> list[Row]:
            return [self.on(name).search(restart, begun, step)]

        kind = f"restart_{restart}" if restart < spec.restarts else "query_greedy"
        return Unit(f"{name}.{kind}", "searches of triggers", name, spec.sweeps * spec.trigger_length, work)

    def reports(self) -> list[Unit]:
        """Every trigger on every model, on the sets 'report' and 'select'."""
        return [unit for name in self.models for kind in ("report", "select") for unit in self._reports(name, kind)]

    def _reports(self, name: str, kind: str) -> list[Unit]:
        triggers = list((self.common | own_triggers(name, self.found[name])).items())

        def unit(number: int, group: Sequence[tuple[str, list[int]]]) -> Unit:
            def work(begun: Path, step: Step) -> list[Row]:
                rows: list[Row] = []
                for label, trigger in group:
                    step()
                    rows += self.on(name).report(kind, label, trigger)
                return rows

            return Unit(f"{name}.{kind}.{number}", "losses behind triggers", name, len(group), work)

        return [unit(number, group) for number, group in enumerate(grouped(triggers, TOGETHER))]

    @cached_property
    def found(self) -> dict[str, dict[str, Any]]:
        """What was searched, by model: the chosen restart and all of them."""
        return {name: chosen(self.rows(self.searches(name))) for name in self.models}

    @cached_property
    def common(self) -> dict[str, list[int]]:
        return common_triggers(self.found, self.words, self.alphabet, self.config.uat)

    def results(self, seed: int, records: Path) -> tuple[dict[str, Any], str]:
        """Write all rows to `records`; return uat_results.json and the text of learned_triggers.csv."""
        spec = self.config.uat
        rows = {kind: self.rows(unit for name in self.models for unit in self._reports(name, kind)) for kind in ("report", "select")}
        write_rows(records, rows["report"])
        attack = {
            "trigger_length": spec.trigger_length,
            "num_iterations": spec.sweeps,
            "num_restarts": spec.restarts,
            "num_opt_samples": spec.search_texts,
            "num_eval_samples": spec.report_texts,
        }
        settings = attack | spec.model_dump(mode="json")
        results = trigger_results(rows["report"], rows["select"], self.found, self.sets["report"], self.words, spec)
        return {"seed": seed, "attack_config": settings, "matched": self.matched[1], **results}, table_of(results["results"])
