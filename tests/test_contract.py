"""The real stages held to their contract: complete, damaged, and dependent on what they declare alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import Experiment
from stages.pipeline import run_each, stages
from tests.fake_stages import contents
from utils.run.artifacts import read_json
from utils.run.errors import DONE, REFUSED
from utils.run.preemption import Stop
from utils.run.stage import run_stage

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


def test_stages_read_no_key_of_the_configuration_that_they_do_not_declare(watched_run: Path) -> None:
    """An undeclared key could change without the stage being made again."""
    for stage in stages():
        touched = read_json(watched_run / "keys_read" / f"{stage.label}.json")
        # a run has its folders by its name; no result depends on who watches, nor on how many work
        declared = {*stage.config_keys, "run_name", "telemetry", "attack_workers"}
        undeclared = {key for key in touched if not any(key == known or key.startswith(f"{known}.") for known in declared)}
        assert touched
        assert undeclared == set(), stage.label
