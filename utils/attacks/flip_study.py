"""Stage 6 on stored models: every attack by flips on every model, with the same texts, candidates and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from utils.attacks.flip_records import SEARCHES, FlipAttacks, size
from utils.attacks.flip_results import flip_results
from utils.attacks.study import Study
from utils.run.records import Row, grouped, write_rows
from utils.run.units import Step, Unit

Flips = Mapping[str, list[dict[str, Any]]]  # by text


class FlipStudy(Study[FlipAttacks]):
    """A search is cut into groups of texts, which are attacked together whoever does it; flips are transferred model by model."""

    def attacks(self, model: PreTrainedModel, name: str) -> FlipAttacks:
        spec, precision = self.config.hotflip, self.config.compute.precision
        return FlipAttacks(model, name, self.sets["hotflip"], self.alphabet, self.words, spec, precision)

    def searches(self, name: str) -> list[Unit]:
        return [unit for attack in SEARCHES for unit in self._searches(name, attack)]

    def _searches(self, name: str, attack: str) -> list[Unit]:
        """One unit for each group of texts. A step is a flip of a text; with more candidates, as many steps."""
        spec, texts = self.config.hotflip, self.sets["hotflip"]
        groups = grouped(texts[: spec.longer_texts] if attack == "longer" else texts, spec.batch_size)

        def unit(number: int, group: list[Row]) -> Unit:
            def work(begun: Path, step: Step) -> list[Row]:
                return self.on(name).search(attack, group, begun, step)

            return Unit(f"{name}.{attack}.{number}", "attacks by flips", name, size(attack) * spec.flips * len(group), work)

        return [unit(number, list(group)) for number, group in enumerate(groups)]

    def reports(self) -> list[Unit]:
        """The flips of every model on every other one."""
        return [self._transfer(name, source) for name in self.models for source in self.models if source != name]

    def _transfer(self, name: str, source: str) -> Unit:
        groups = grouped(self.sets["hotflip"], self.config.hotflip.batch_size)

        def work(begun: Path, step: Step) -> list[Row]:
            rows: list[Row] = []
            for group in groups:
                step()
                rows += self.on(name).transferred(source, self.flips[source], group)
            return rows

        return Unit(f"{name}.transfer.{source}", "flips of other models", name, 1, work)

    @cached_property
    def flips(self) -> dict[str, Flips]:
        """What HotFlip found, by model."""
        return {name: {row["text"]: row["flips"] for row in self.rows(self._searches(name, "hotflip"))} for name in self.models}

    def results(self, seed: int, records: Path) -> dict[str, Any]:
        """Write all rows to `records`; return hotflip_results.json."""
        spec, rows = self.config.hotflip, {}
        for name in self.models:
            rows[name] = {attack: self.rows(self._searches(name, attack)) for attack in SEARCHES}
            others = (source for source in self.models if source != name)
            rows[name] |= {f"transfer:{source}": self.rows([self._transfer(name, source)]) for source in others}
        write_rows(records, (row for mine in rows.values() for found in mine.values() for row in found))
        attack = {"num_flips": spec.flips, "num_samples": spec.texts, "success_threshold": spec.threshold_nats}
        settings = attack | spec.model_dump(mode="json")
        return {"seed": seed, "attack_config": settings, "matched": self.matched[1], **flip_results(rows, spec)}
