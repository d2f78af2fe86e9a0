"""The corruption campaign in small, and what it says of readers that look at nothing."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from configs.schema import Experiment
from tests.faults.corruption import DAMAGE, Fault, Site, Trial, like_anybody, planned, sites
from tests.faults.crash import HANGS
from tests.killing import waited
from utils.run import manifest

WORK = Path("scratch/foundation_llm_work/tiny/seed_42/stage_2_train_baseline")
pytestmark = pytest.mark.integration


@pytest.fixture
def trial(tiny: Experiment, finished: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    return Trial(tiny, finished, own_folders)


@pytest.fixture
def whole(finished: Path) -> Site:
    return Site("finished", finished, 2, False, (f"{WORK}/**/*",))


def test_damage_to_a_finished_stage_is_noticed_and_named(trial: Trial, whole: Site) -> None:
    found = [trial.tried(fault, random.Random(0)) for fault in planned([whole], 7, random.Random(1))]
    assert all(outcome.survived for outcome in found), [outcome for outcome in found if not outcome.survived]
    assert sum(outcome.found.startswith("refused") for outcome in found) >= 3


def test_damage_to_a_stage_at_work_is_noticed(tiny: Experiment, finished: Path, trial: Trial, own_folders: Path) -> None:
    begun = [site for site in sites(tiny, finished, own_folders, [2]) if site.begun]
    assert any("step_00000008" in str(file) for site in begun for file in site.files())
    faults = planned(begun, 200, random.Random(2))
    assert len(faults) > 100 and {fault.damage for fault in faults} == set(DAMAGE)
    flips = [fault for fault in faults if fault.file.name in ("metrics.jsonl", "started.json") and fault.damage == "one bit"][:2]
    for fault in [*faults[:4], *flips]:
        outcome = trial.tried(fault, random.Random(0))
        assert outcome.survived, outcome


def test_readers_that_look_at_nothing_are_found_out(trial: Trial, whole: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(whole, WORK / "metrics.jsonl", "one bit")
    assert trial.tried(fault, random.Random(0)).survived
    monkeypatch.setattr(manifest, "damage", lambda path, expected, contents=True: None)
    outcome = trial.tried(fault, random.Random(0))
    assert not outcome.survived and "a wrong result without a word" in outcome.found


def test_a_traceback_is_no_refusal(trial: Trial, whole: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(whole, WORK / "manifest.json", "emptied")
    assert trial.tried(fault, random.Random(0)).survived
    monkeypatch.setattr(manifest, "read_sealed", lambda path, cure, always: json.loads(path.read_text()))
    outcome = trial.tried(fault, random.Random(0))
    assert not outcome.survived and "Traceback" in outcome.found


def test_modes_of_files_hold_for_root_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    path.chmod(0)
    if (child := os.fork()) == 0:
        code = 1
        try:
            like_anybody()
            path.read_text()
        except PermissionError:
            code = 0
        finally:
            os._exit(code)
    assert waited(child, HANGS) == 0
