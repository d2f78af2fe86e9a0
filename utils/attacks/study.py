"""What both attack stages have in common: what they read, how their work is cut into units, and who does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from configs.schema import Experiment
from utils.attacks.matched import matched_controls
from utils.attacks.round_trip import RoundTrip
from utils.data.attack_texts import read_attack_texts
from utils.data.tokenizer import load_tokenizer
from utils.models.loading import device_of, load_model
from utils.run.artifacts import write_json
from utils.run.launch import launch
from utils.run.preemption import Stop
from utils.run.records import Row
from utils.run.units import Place, Share, Step, Unit, rows_in


@dataclass(frozen=True)
class Files:
    """What an attack stage reads; and the folder of what is under way."""

    models: Mapping[str, Path]
    earlier_models: Path
    validation_tokens: Path
    texts: Path
    tokenizer: Path
    state: Path

    def stored(self) -> dict[str, Any]:
        """As JSON, with absolute paths, for another process."""
        models = {name: str(path.absolute()) for name, path in self.models.items()}
        return {name: str(path.absolute()) for name, path in vars(self).items() if name != "models"} | {"models": models}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Files:
        models = {name: Path(path) for name, path in stored["models"].items()}
        return cls(models=models, **{name: Path(path) for name, path in stored.items() if name != "models"})


Attacks = TypeVar("Attacks")  # what does the units' work on one model


class Study(ABC, Generic[Attacks]):
    """The work of an attack stage, as units. One model is loaded at a time, and only for a unit that needs it."""

    def __init__(self, config: Experiment, files: Files) -> None:
        self.config, self.files, self.folder = config, files, files.state / "units"
        self.sets, self.alphabet = read_attack_texts(files.texts)
        self.words = RoundTrip(load_tokenizer(files.tokenizer))
        self._held: tuple[str, Attacks] | None = None

    def ready(self, done: Set[str]) -> list[Unit]:
        """The units whose inputs are there, in order; all of them once all of these are done."""
        matched = Unit("matched", "controls of equal quality", "", 1, self._match)
        made = matched.name in done
        searches = [unit for name in (self.models if made else self.files.models) for unit in self.searches(name)]
        found = made and done >= {unit.name for unit in searches}
        return [matched, *searches, *(self.reports() if found else [])]

    @abstractmethod
    def searches(self, name: str) -> list[Unit]:
        """Units of the searches on a model."""

    @abstractmethod
    def reports(self) -> list[Unit]:
        """Units that need what all searches found."""

    @abstractmethod
    def attacks(self, model: PreTrainedModel, name: str) -> Attacks:
        """What does the units' work on a model."""

    @cached_property
    def matched(self) -> tuple[dict[str, Path], dict[str, Any]]:
        """Folders of the controls of equal quality, and what was done for them."""
        return matched_controls(
            self.config,
            models=dict(self.files.models),
            earlier_models=self.files.earlier_models,
            validation_tokens=self.files.validation_tokens,
            folder=self.files.state / "matched",
        )

    @property
    def models(self) -> dict[str, Path]:
        return {**self.files.models, **self.matched[0]}

    def on(self, name: str) -> Attacks:
        """The attacks on a model, which stays loaded until another one is asked for."""
        if self._held is None or self._held[0] != name:
            self._held = None  # a model and its copy, before the next is loaded
            folder = self.files.models[name] if name in self.files.models else self.models[name]
            self._held = name, self.attacks(load_model(folder, device_of(self.config.compute)), name)
        return self._held[1]

    def _match(self, begun: Path, step: Step) -> list[Row]:
        self._held = None
        return [self.matched[1]]

    def rows(self, units: Iterable[Unit]) -> list[Row]:
        """What the units have found, in their order."""
        return rows_in(self.folder, units)

    def work(self, stop: Stop, task: int = 0, tasks: int = 1) -> None:
        """Do all units, here or in a process for each GPU. As one of several `tasks` of an array: until there is none to take."""
        count, device = self.config.attack_workers.processes, device_of(self.config.compute)
        count = count or (torch.cuda.device_count() if device.type == "cuda" else 1)
        if count == 1:
            Share(self.ready, self.folder, stop, Place(task, tasks, waits=tasks == 1)).run()
            return
        state = self.files.state / f"task_{task}" if tasks > 1 else self.files.state
        spec = {"study": type(self).__name__, "config": self.config.model_dump_json(), "task": task, "tasks": tasks}
        path = (state / "processes.json").absolute()
        write_json(path, spec | {"files": self.files.stored(), "stop": str(path.with_name("stop"))})
        launch("utils.attacks.worker", [str(path)], count, state, stop)
