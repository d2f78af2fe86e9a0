"""What is recorded of the surroundings, against the programs that know; where the folders of a run lie."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy
import pytest
import torch

from configs.schema import Paths
from utils.run import environment
from utils.run.errors import InputError
from utils.run.folders import Folders


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_versions_are_those_of_the_imported_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.versions()
    assert found["python"] == sys.version.split()[0]
    assert found["numpy"] == numpy.__version__
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    assert environment.versions()["no-such-package"] == "not installed"


def test_now_is_utc_to_the_second() -> None:
    stamp = datetime.fromisoformat(environment.now())
    assert stamp.utcoffset() == timedelta(0)
    assert stamp.microsecond == 0
    assert abs(datetime.now(timezone.utc) - stamp) < timedelta(minutes=1)


def test_host_is_this_one() -> None:
    assert environment.host()["host"] == os.uname().nodename
    assert environment.host()["cores"] == os.cpu_count()
    assert set(environment.host()) == {"host", "platform", "cores"}


def test_host_of_a_job_names_it_and_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert (environment.host()["job"], environment.host()["restarts"]) == ("17", "0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert environment.host()["restarts"] == "3"


def test_code_revision_is_gits_and_tells_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = environment.code_revision.__wrapped__
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "utils" / "run" / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision() == "unknown"
    git(tmp_path, "init")
    assert revision() == "unknown"  # no commit yet
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert revision() == commit
    (tmp_path / "file").write_text("b")
    assert revision() == commit + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision() == "unknown"


def test_code_revision_of_a_frozen_copy_is_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "utils" / "run" / "environment.py"))
    git(tmp_path, "init")
    (tmp_path / "REVISION").write_text("0123abcd+changes\n")
    assert environment.code_revision.__wrapped__() == "0123abcd+changes"


def test_folders_follow_scratch_and_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = Folders.of(Paths(), "mine")
    assert folders.run == tmp_path / "scratch/foundation_llm_work/mine"
    assert folders.cache == tmp_path / "scratch/foundation_llm_cache"
    assert folders.final == tmp_path / "project/foundation_llm_final_results/mine"
    assert folders.summary == tmp_path / "project/foundation_llm_final_results/experiment_summary.txt"


@pytest.mark.parametrize("empty", [True, False])
def test_folders_without_scratch_and_project_lie_here(empty: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SCRATCH", "PROJECT"):
        monkeypatch.setenv(name, "") if empty else monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    folders = Folders.of(Paths(), "mine")
    assert folders.work == tmp_path / "runs/foundation_llm_work"
    assert folders.cache == tmp_path / "runs/foundation_llm_cache"
    assert folders.results == tmp_path / "foundation_llm_final_results"


def test_configured_folders_win_and_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folders = Folders.of(Paths(work=Path("w"), results=Path("/r"), cache=Path("c/../d")), "mine")
    assert (folders.work, folders.results, folders.cache) == (tmp_path / "w", Path("/r"), tmp_path / "d")


def test_a_home_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"paths: ~nobody-of-this-name/x: .*; write the folder out"):
        Folders.of(Paths(work=Path("~nobody-of-this-name/x")), "run")
