"""Stages that note which keys of the configuration they read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import Experiment, Section
from utils.run.artifacts import write_json
from utils.run.stage import Context, Stage


def noting(stage: Stage, config: Experiment, folder: Path) -> Stage:
    """The stage, which writes the keys that it reads of this configuration to <label>.json."""
    places: dict[int, str] = {}
    touched: set[str] = set()

    def walk(section: Section, place: str) -> None:
        places[id(section)] = place
        for name in type(section).model_fields:
            if isinstance(value := getattr(section, name), Section):
                walk(value, f"{place}{name}.")

    def watched(self: Section, name: str) -> object:
        value = object.__getattribute__(self, name)
        if id(self) in places and name in type(self).model_fields and not isinstance(value, Section):
            touched.add(places[id(self)] + name)
        return value

    def recorded(ctx: Context) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Section, "__getattribute__", watched)
            stage.run(ctx)
        write_json(folder / f"{stage.label}.json", sorted(touched))

    walk(config, "")
    return replace(stage, run=recorded)
