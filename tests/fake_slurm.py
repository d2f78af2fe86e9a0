"""SLURM as a list of jobs, in place of `client.call`; and chains of the real stages that do no work."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from configs.cluster import Cluster
from configs.presets import load
from stages.pipeline import depends_on, stages
from tests.fake_stages import ROOT, TINY
from utils.run.artifacts import write_text
from utils.run.errors import DONE, STOPPED, StoppedInTime
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.stage import Context, run_stage
from utils.slurm import snapshot
from utils.slurm.chain import Chain
from utils.slurm.client import SEPARATOR, Job, NoAnswer, SlurmError

NEWEST = snapshot.NEWEST  # as shipped; conftest.py puts another in its place
SCRIPTS = sorted((ROOT / "jobs").glob("job_*.sh"))
GRAPH = {stage.number: depends_on(stage, stages()) for stage in stages()}


def put(path: Path, text: str) -> None:
    """A program of one's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


class FakeSlurm:
    """Answers the commands that the program knows; ids are 100, 101 ... `refuses` maps the beginning of a command to SLURM's words."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.waits: dict[str, str] = {}
        self.calls: list[tuple[str, ...]] = []
        self.refuses: dict[str, str] = {}
        self.accounts: dict[str, str] = {}
        self.limits: dict[str, str] = {}
        self.out_of_service: list[str] = []
        self.away = False
        self.ids = iter(range(100, 1000))

    def __call__(self, *command: str, seconds: float = 60.0, cwd: str | None = None) -> str:
        self.calls.append(command)
        if self.away:
            raise NoAnswer(f"{command[0]} gave no answer in {seconds:g} s")
        for beginning, words in self.refuses.items():
            if " ".join(command).startswith(beginning):
                raise SlurmError(f"{command[0]}: {words}")
        answer: str = getattr(self, command[0])(list(command[1:]), cwd)
        return answer

    def sinfo(self, arguments: list[str], cwd: str | None) -> str:
        return "\n".join(self.out_of_service)

    def add(self, job: str, name: str, state: str = "PENDING", reason: str = "None", folder: str = "", comment: str = "") -> None:
        number, _, task = job.partition("_")
        self.jobs[job] = Job(job, number, int(task) if task else None, name, state, reason, folder, comment)

    def change(self, job: str, **facts: str) -> None:
        self.jobs[job] = replace(self.jobs[job], **facts)

    def said(self, command: str) -> list[str]:
        """Every call of one command, as typed."""
        return [" ".join(call) for call in self.calls if call[0] == command]

    # --- the commands

    def sbatch(self, options: list[str], cwd: str | None) -> str:
        if "--test-only" in options:
            return ""
        given = dict(option[2:].split("=", 1) for option in options if option.startswith("--") and "=" in option)
        number = str(next(self.ids))
        for task in given["array"].split(",") if "array" in given else [""]:
            job = f"{number}_{task}" if task else number
            reason = "Dependency" if "dependency" in given else "Priority"
            self.add(job, given["job-name"], reason=reason, folder=cwd or "", comment=given["comment"])
            self.waits[job] = given.get("dependency", "")
        return f"{number}\n"

    def squeue(self, options: list[str], cwd: str | None) -> str:
        rows = [
            (job.id, job.array, "N/A" if job.task is None else str(job.task), job.name, job.state, job.reason, job.folder, job.comment)
            for job in self.jobs.values()
        ]
        return "".join(SEPARATOR.join(row) + "\n" for row in rows)

    def scontrol(self, options: list[str], cwd: str | None) -> str:
        if options[0] == "update":
            fields = dict(option.split("=", 1) for option in options[1:])
            job = fields.pop("JobId")
            self.waits[job] = fields.get("Dependency", self.waits.get(job, ""))
            self.change(job, comment=fields.get("Comment", self.jobs[job].comment))
            return ""
        if options[0] == "requeue":
            return ""
        if options[-1] == "partition":
            default = next(iter(self.limits), "")
            lines = [
                f"PartitionName={name} Default={'YES' if name == default else 'NO'} MaxTime={limit}" for name, limit in self.limits.items()
            ]
            return "".join(f"{line}\n" for line in lines)
        shown = self.jobs[options[-1]]
        return f"JobId={shown.array} JobName={shown.name} JobState={shown.state} Reason={shown.reason} Command=(null)\n"

    def sacct(self, options: list[str], cwd: str | None) -> str:
        return "".join(f"{job}|{state}\n" for job, state in self.accounts.items())

    def scancel(self, options: list[str], cwd: str | None) -> str:
        del self.jobs[options[0]]
        return ""


# --- chains


def small_checkout(root: Path) -> Path:
    """The job scripts, and as little code as a snapshot can have."""
    shutil.copytree(ROOT / "jobs", root / "jobs")
    (root / "utils/__pycache__").mkdir(parents=True)
    (root / "utils/a.py").write_text("A = 1\n")
    (root / "utils/__pycache__/a.pyc").write_bytes(b"compiled")
    return root


def make_chain(root: Path, *overrides: str, cluster: Cluster | None = None) -> Chain:
    """The tiny experiment from the checkout `root`; its snapshot is described, not written."""
    config, cluster = load(TINY, overrides), cluster or Cluster()
    frozen = snapshot.Snapshot.of(root, config, cluster, sys.executable)
    return Chain(stages(), GRAPH, config, cluster, frozen.folder, root)


def touch(ctx: Context) -> None:
    for name in ctx.writes:
        write_text(ctx.write(name), name)


def stop_at(step: int) -> Callable[[Context], None]:
    def work(ctx: Context) -> None:
        Progress("train", 12, every_seconds=1e9).advance(step, note="loss 2.5")
        raise StoppedInTime("the test says so")

    return work


def finish(chain: Chain, numbers: Iterable[int], *seeds: int) -> None:
    """Let stages be complete, with outputs of a few bytes."""
    pretended = [replace(stage, run=touch) for stage in stages()]
    for number in numbers:
        for seed in seeds or chain.config.seeds:
            assert run_stage(pretended[number], chain.config, seed, pretended, Stop()) == DONE


def interrupt(chain: Chain, number: int, seed: int, step: int) -> None:
    """Let a stage be stopped in time at a step."""
    assert run_stage(replace(stages()[number], run=stop_at(step)), chain.config, seed, stages(), Stop()) == STOPPED
