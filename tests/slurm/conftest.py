"""A cluster and a checkout of one's own for every test. Without SLURM the tests are skipped, unless REQUIRE_SLURM is set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fake_stages import ROOT
from tests.slurm.cluster import Cluster, missing, running
from utils.run.artifacts import read_sealed, write_sealed
from utils.slurm.snapshot import CODE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.flaky(reruns=1))  # daemons on a fast clock miss each other on a busy machine; pytest counts it
            if absent and not os.environ.get("REQUIRE_SLURM"):
                item.add_marker(pytest.mark.skip(reason=f"SLURM cannot be started here: no {', '.join(absent)}"))


@dataclass
class Checkout:
    """A user's checkout and what is typed there."""

    root: Path
    environment: dict[str, str]

    def type(self, *command: str, code: int | None = 0, seconds: float = 600, **variables: str) -> str:
        """Run a command; returns what it printed. `code` is the expected exit code, None any."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def run_all(self, *options: str, code: int | None = 0, **variables: str) -> str:
        return self.type("bash", "run_all.sh", *options, code=code, **variables)

    def submit(self, *options: str, code: int | None = 0, **variables: str) -> str:
        """The tiny experiment on a partition without GPUs."""
        return self.run_all("--config", "tests/tiny.yaml", "--cluster", "tests/slurm/site.yaml", *options, code=code, **variables)

    def log(self, name: str) -> str:
        """All logs of a stage's jobs, by the job's name."""
        return "\n".join(path.read_text() for path in sorted((self.root / "logs").glob(f"{name}_*.out")))

    @property
    def work(self) -> Path:
        """Folder of the tiny run."""
        return Path(self.environment["SCRATCH"]) / "foundation_llm_work" / "tiny"


def make_checkout(root: Path, cluster: Cluster, folders: Path) -> Checkout:
    """Copy what a user has to `root`; runs go below `folders`."""
    root.mkdir(parents=True)
    for name in CODE:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "requirements.txt", "tests/tiny.yaml", "tests/slurm/site.yaml", "logs/.gitkeep"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "VIRTUAL_ENV"))}
    environment |= {
        "SLURM_CONF": str(cluster.conf),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SCRATCH": str(folders / "scratch"),
        "PROJECT": str(folders / "project"),
    }
    return Checkout(root, environment)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A fresh cluster; options of `Cluster` by @pytest.mark.parametrize("cluster", [{...}], indirect=True)."""
    with running(**getattr(request, "param", {})) as started:
        yield started


@pytest.fixture
def checkout(cluster: Cluster, own_folders: Path) -> Checkout:
    return make_checkout(own_folders / "checkout", cluster, own_folders)


@pytest.fixture
def prepare(checkout: Checkout, finished: Path) -> Callable[..., Checkout]:
    """prepare(3, 42, 7): a checkout whose run `tiny` is complete up to stage 3 for seeds 42 and 7, which hold the same results."""

    def upto(last: int, *seeds: int) -> Checkout:
        origin = finished / "scratch" / "foundation_llm_work" / "tiny" / "seed_42"
        shutil.copytree(finished / "scratch" / "foundation_llm_cache", checkout.work.parents[1] / "foundation_llm_cache")
        for seed in seeds or (42,):
            for stage in origin.glob(f"stage_[0-{last}]_*"):
                target = checkout.work / f"seed_{seed}" / stage.name
                shutil.copytree(stage, target)
                for notes in (target / "started.json", target / "manifest.json"):
                    write_sealed(notes, json.loads(json.dumps(read_sealed(notes)).replace('"seed": 42', f'"seed": {seed}')))
        return checkout

    return upto


@pytest.fixture
def prepared(prepare: Callable[..., Checkout]) -> Checkout:
    """A checkout whose run `tiny` is complete up to stage 1: the training stages are next."""
    return prepare(1)


def submitted(said: str) -> dict[int, str]:
    """{stage: job} as run_all.sh printed it; of several jobs of a stage the last one."""
    return {int(stage): job for job, stage in re.findall(r"^  job (\d+): stage (\d)", said, re.MULTILINE)}
