"""Shared fixtures: a private scratch folder for every test, the tiny experiment, and one finished run that tests may copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.presets import load
from configs.schema import Experiment
from stages.pipeline import run_each, stages
from tests.fake_stages import TINY

torch.set_num_threads(1)


def place(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Put the folders of a run below `root`."""
    monkeypatch.setenv("SCRATCH", str(root / "scratch"))
    monkeypatch.setenv("PROJECT", str(root / "project"))


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every test has its own $SCRATCH and $PROJECT."""
    place(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    return load(TINY)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Experiment) -> Path:
    """Root of a complete run of the tiny experiment (scratch/ and project/). Read it, or copy it with `finished_copy`."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        place(patch, root)
        assert run_each(stages(), tiny, tiny.seeds, discard=False) == 0
    return root


@pytest.fixture
def finished_copy(finished: Path, own_folders: Path) -> Path:
    """The finished run in this test's own folders, free to be damaged."""
    shutil.copytree(finished, own_folders, dirs_exist_ok=True)
    return own_folders


@pytest.fixture
def stage_folder() -> Callable[[Path, int], Path]:
    """Folder of a stage of the tiny run below a root."""

    def folder(root: Path, number: int) -> Path:
        if number == 7:
            return root / "project" / "foundation_llm_final_results" / "tiny"
        return root / "scratch" / "foundation_llm_work" / "tiny" / "seed_42" / stages()[number].label

    return folder
