"""Shared fixtures: a private scratch folder for every test, the tiny experiment, and one finished run that tests may copy."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.presets import load
from configs.schema import Experiment
from stages.pipeline import run_each, stages
from stages.stage_7_aggregate import RECORDS
from tests.extended_records import extended
from tests.fake_slurm import FakeSlurm
from tests.fake_stages import ROOT, TINY
from tests.hub_server import Hub
from tests.keys_read import noting
from utils.report.attack_figures import figures
from utils.report.figures import write_figures
from utils.report.page import write_page
from utils.report.study import Study
from utils.report.table import write_numbers, write_tables
from utils.report.tables import tables
from utils.run import artifacts
from utils.run.stage import producer
from utils.slurm import client, snapshot

torch.set_num_threads(1)

COMMANDS_OF_README = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
RUNS_OF_README = [command for command in COMMANDS_OF_README if command.startswith("bash run_all.sh")]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]


def place(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Put the folders of a run below `root`."""
    monkeypatch.setenv("SCRATCH", str(root / "scratch"))
    monkeypatch.setenv("PROJECT", str(root / "project"))


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every test has its own $SCRATCH and $PROJECT, no SLURM job around it, and no run that a developer submitted from here."""
    place(monkeypatch, tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "JOB_RESTARTS")) and name != "SLURM_CONF"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(snapshot, "NEWEST", tmp_path / "newest_submission")
    return tmp_path


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: no power is lost here."""
    monkeypatch.setattr(artifacts, "sync", lambda path: None)


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    return load(TINY)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MadeOnce:
    """made_once("name", make): a folder that make(folder) has filled, once for all processes of this test session, which only read it."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, complete = shared / name, shared / f"{name}.complete"
        with (shared / f"{name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def watched_run(made_once: MadeOnce, tiny: Experiment) -> Path:
    """A complete run of the tiny experiment in `run/`, and in `keys_read/` what each stage read of the configuration."""

    def make(folder: Path) -> None:
        (folder / "run").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            place(patch, folder / "run")
            assert run_each([noting(stage, tiny, folder / "keys_read") for stage in stages()], tiny, tiny.seeds, discard=False) == 0

    return made_once("watched_run", make)


@pytest.fixture(scope="session")
def finished(watched_run: Path) -> Path:
    """Root of a complete run of the tiny experiment (scratch/ and project/). Read it, or copy it with `finished_copy`."""
    return watched_run / "run"


@pytest.fixture(scope="session")
def two_seeds(made_once: MadeOnce, finished: Path) -> Path:
    """Root of what the README's command for two seeds makes of the tiny experiment: a complete run `two-seeds`."""
    (command,) = [command for command in RUNS_OF_README if "--seeds" in command]

    def make(folder: Path) -> None:
        from stages.__main__ import main  # at the top of this file a worker would import it before its coverage begins

        shutil.copytree(finished / "scratch/foundation_llm_cache", folder / "scratch/foundation_llm_cache")
        with pytest.MonkeyPatch.context() as patch:
            place(patch, folder)
            assert main(["run", "--config", TINY, *shlex.split(command)[2:]]) == 0

    return made_once("two_seeds", make)


@pytest.fixture(scope="session")
def loaded_once(finished: Path) -> None:
    """A model was loaded in this process: what the first one costs is spared in every fork."""
    from utils.models.loading import load_model

    load_model(next(finished.rglob("stage_2_train_baseline")) / "best")


@pytest.fixture(scope="session")
def finished_records(finished: Path) -> dict[str, Path]:
    """What stage 7 of the finished run reads, by artefact."""
    sources = {name: producer(stages(), name) for name in RECORDS}
    work = finished / "scratch" / "foundation_llm_work" / "tiny" / "seed_42"
    return {name: work / source.label / source.writes[name] for name, source in sources.items()}


@pytest.fixture(scope="session")
def full_report(made_once: MadeOnce, tiny: Experiment, finished_records: dict[str, Path]) -> Path:
    """Folder of a report over three seeds with all controls, attacks, benchmarks and hostile texts; `records/` is what it is made from."""

    def make(folder: Path) -> None:
        study = Study.load(tiny, extended(finished_records, folder / "records"))
        made = tables(study)
        write_tables(made, folder / "tables")
        write_numbers(made, study.traces, folder / "numbers.json")
        write_figures(figures(study), folder / "figures")
        write_page(study, made, folder / "figures", folder / "report.html")

    return made_once("full_report", make)


@pytest.fixture
def finished_copy(finished: Path, own_folders: Path) -> Path:
    """The finished run in this test's own folders, free to be damaged."""
    shutil.copytree(finished, own_folders, dirs_exist_ok=True)
    return own_folders


@pytest.fixture
def filled_cache(finished: Path, own_folders: Path) -> Path:
    """This test's own folders, with tokens and base model of the tiny experiment in the cache."""
    shutil.copytree(finished / "scratch/foundation_llm_cache", own_folders / "scratch/foundation_llm_cache")
    return own_folders


@pytest.fixture
def checkout_copy(own_folders: Path) -> Path:
    """What a user has, without anything that was submitted from it: for commands that run as processes of their own."""
    root = own_folders / "checkout"
    for name in snapshot.CODE:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_all.sh", root)
    return root


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, no_sync: None) -> FakeSlurm:
    """No SLURM command is called; the fake notes what was asked for."""
    fake = FakeSlurm()
    monkeypatch.setattr(client, "call", fake)
    return fake


@pytest.fixture
def stage_folder() -> Callable[[Path, int], Path]:
    """Folder of a stage of the tiny run below a root."""

    def folder(root: Path, number: int) -> Path:
        if number == 7:
            return root / "project" / "foundation_llm_final_results" / "tiny"
        return root / "scratch" / "foundation_llm_work" / "tiny" / "seed_42" / stages()[number].label

    return folder


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let every disk seem to have so many gigabytes free."""

    def pretend(gigabytes: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=gigabytes * 1e9))

    return pretend


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A model hub on loopback, to which the hub client of this process is connected with an empty cache in `hub_cache`."""
    hub = Hub()
    hub.connect(monkeypatch, tmp_path / "hub_cache")
    yield hub
    hub.close()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB, or of as many as @pytest.mark.parametrize("small_disk", [...], indirect=True) says."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={getattr(request, 'param', 64)}k"
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", place], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", place], check=True)
