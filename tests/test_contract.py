"""The real stages held to their contract: complete, damaged, and dependent on what they declare alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.presets import load
from configs.schema import Experiment, Section
from stages.pipeline import run_each, stages
from tests.fake_stages import TINY, contents
from utils.run.errors import DONE, REFUSED
from utils.run.folders import Folders
from utils.run.preemption import Stop
from utils.run.stage import Context, Stage, run_stage

pytestmark = pytest.mark.integration


def test_evaluation_and_attacks_never_read_the_training_text() -> None:
    assert [stage.number for stage in stages() if "train_tokens" in stage.reads] == [1, 2, 3]


def test_finished_run_is_complete_and_costs_nothing_again(
    finished_copy: Path, tiny: Experiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stop, "listen", lambda self: None)
    before = contents(finished_copy)
    assert run_each(stages(), tiny, tiny.seeds, discard=False) == DONE
    assert capsys.readouterr().out.count("already complete") == 8
    assert contents(finished_copy) == before


@pytest.mark.parametrize(
    ("number", "name", "reader"),
    [(0, "base_model/model.safetensors", 1), (2, "best/model.safetensors", 4), (4, "records.jsonl", 7), (5, "uat_results.json", 7)],
)
def test_truncated_artefact_of_the_real_chain_is_named_by_its_reader(
    number: int,
    name: str,
    reader: int,
    finished_copy: Path,
    stage_folder: Callable[[Path, int], Path],
    tiny: Experiment,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = stage_folder(finished_copy, number) / name
    path.write_bytes(path.read_bytes()[:-7])
    assert run_stage(stages()[reader], tiny, 42, stages(), Stop()) == REFUSED
    message = capsys.readouterr().err
    assert f"{path} has {path.stat().st_size} bytes, expected {path.stat().st_size + 7}" in message
    assert f"run stage {number}" in message


def test_stages_read_no_key_of_the_configuration_that_they_do_not_declare(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """An undeclared key could change without the stage being made again."""
    config = load(TINY)
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

    walk(config, "")
    assert Folders.of(config.paths, config.run_name) == Folders.of(tiny.paths, tiny.run_name)
    for stage in stages():

        def recorded(ctx: Context, stage: Stage = stage) -> None:
            touched.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Section, "__getattribute__", watched)
                stage.run(ctx)

        assert run_stage(replace(stage, run=recorded), config, 42, stages(), Stop()) == DONE
        # a run has its folders by its name; no result depends on who watches, nor on how many work
        declared = {*stage.config_keys, "run_name", "telemetry", "attack_workers"}
        undeclared = {key for key in touched if not any(key == known or key.startswith(f"{known}.") for known in declared)}
        assert touched
        assert undeclared == set(), stage.label
