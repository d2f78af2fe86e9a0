"""Kill -9 at random moments of every stage, rerun until done: nothing may differ from the uninterrupted run. Twice in a row."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from configs.schema import Experiment
from stages.pipeline import stages
from tests.killing import differing, killed_until_done, results, stage_seconds

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("loaded_once")]


@pytest.mark.parametrize("turn", [1, 2])
def test_killed_run_equals_straight_run(
    turn: int, finished: Path, own_folders: Path, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    chance, seconds = random.Random(turn), stage_seconds(finished)
    log = own_folders / "log"
    hits = [killed_until_done(tiny, stage.number, seconds[stage.number], 2, chance, log) for stage in stages()]
    log.unlink()
    assert sum(hits) >= 8, hits
    assert differing(results(finished), results(own_folders)) == []
