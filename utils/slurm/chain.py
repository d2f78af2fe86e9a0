"""The jobs of one run: which stages and seeds they cover, how one is submitted, and what waits for what."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from configs.cluster import Cluster
from configs.presets import ConfigError
from configs.schema import Experiment
from utils.run.artifacts import read_json, write_json
from utils.run.environment import now
from utils.run.errors import InputError
from utils.run.folders import Folders
from utils.run.lock import locked
from utils.run.preemption import Stop
from utils.run.progress import Reported
from utils.run.stage import Stage, standing
from utils.slurm import client, snapshot
from utils.slurm.client import Job
from utils.slurm.plan import Key, Queued, Submission, dependency, inputs

JOB_NAME = re.compile(r"job_([0-7])_\w+")
SHARE_NAME = re.compile(r"share_([0-7])_\w+")


class Submitted(TypedDict):
    """A job in jobs.json. Of an array, a task for each seed."""

    stage: int
    job: str
    seeds: list[int]
    tasks: list[int]


@dataclass(frozen=True)
class Chain:
    """One run on one cluster. `waits_for` are the stages that make a stage's inputs, `code` is the snapshot that its jobs use."""

    pipeline: Sequence[Stage]
    waits_for: Mapping[int, Sequence[int]]
    config: Experiment
    cluster: Cluster
    code: Path
    root: Path

    @cached_property
    def folders(self) -> Folders:
        return Folders.of(self.config.paths, self.config.run_name)

    @property
    def folder(self) -> Path:
        return snapshot.submission_folder(self.folders)

    # --- one job

    def script(self, stage: Stage) -> Path:
        """A stage's job script, relative to the code."""
        (path,) = self._source.glob(f"jobs/job_{stage.number}_*.sh")
        return path.relative_to(self._source)

    @property
    def _source(self) -> Path:
        """The frozen code; before it is written, the checkout."""
        return self.code if self.code.is_dir() else self.root

    def options(self, stage: Stage) -> list[str]:
        """What the site wants, as options of sbatch."""
        text = (self._source / self.script(stage)).read_text(encoding="utf-8")
        return self.cluster.options(stage.name, wants_gpu="#SBATCH --gres=" in text)

    def command(self, submission: Submission, restarts: int = 0) -> list[str]:
        """Arguments of sbatch. The comment tells which run a job belongs to, whatever becomes of our own record."""
        script = self.script(submission.stage)
        name = script.stem
        options = [f"--job-name={name}", f"--comment={self.code}", "--kill-on-invalid-dep=yes"]
        if submission.tasks:
            options += ["--array=" + ",".join(map(str, submission.tasks)), f"--output=logs/{name}_%A_%a.out"]
        if submission.dependency:
            options.append(f"--dependency={submission.dependency}")
        return [*options, *self.options(submission.stage), str(self.code / script), str(self.code), str(restarts)]

    def behind_sharing(self, submission: Submission, submit: Callable[[list[str]], str]) -> Submission:
        """The submission, made to wait for the end of an array that shares its work, if there is to be one; `submit` calls sbatch."""
        if submission.stage.share is None or self.config.attack_workers.tasks == 1:
            return submission
        keys = {(submission.stage.number, seed) for seed in submission.seeds}
        arrays = {job.array for job, key in self.shares(client.queue()) if job.live and key in keys}  # those at work hold the folder
        arrays = arrays or {submit(self.sharing(submission))}
        return replace(submission, dependency=",".join(filter(None, (submission.dependency, "afterany:" + ":".join(sorted(arrays))))))

    def sharing(self, submission: Submission) -> list[str]:
        """Arguments of sbatch for the array that shares a stage's work."""
        tasks, stage = self.config.attack_workers.tasks, submission.stage
        script, name = self.script(stage), f"share_{stage.number}_{stage.name}"
        numbers = [self.config.seeds.index(seed) * tasks + task for seed in submission.seeds for task in range(tasks)]
        options = [f"--job-name={name}", f"--comment={self.code}", "--kill-on-invalid-dep=yes", f"--array={','.join(map(str, numbers))}"]
        options.append(f"--output=logs/{name}_%A_%a.out")
        if submission.dependency:  # other tasks than those of the array that it waits for
            options.append(f"--dependency={submission.dependency.replace('aftercorr:', 'afterok:')}")
        return [*options, *self.options(stage), str(self.code / script), str(self.code)]

    def submit(self, submission: Submission, by: str, restarts: int = 0) -> str:
        """Call sbatch and note the job; of a new job also for the array that shares its work. Raises SlurmError."""
        if restarts == 0:
            submission = self.behind_sharing(submission, self._submit_sharing)
        job = client.submit(self.command(submission, restarts), cwd=str(self.root))
        self.note(submission.stage, job, submission.seeds, submission.tasks, by)
        return job

    def _submit_sharing(self, arguments: list[str]) -> str:
        job = client.submit(arguments, cwd=str(self.root))
        print(f"  job {job}: an array that shares the work of the next one", flush=True)
        return job

    # --- the record

    @property
    def record(self) -> Path:
        return self.folder / "jobs.json"

    def recorded(self) -> list[dict[str, Any]]:
        """Every job submitted so far, oldest first."""
        return list(read_json(self.record, list[Submitted])) if self.record.exists() else []

    def note(self, stage: Stage, job: str, seeds: Sequence[int], tasks: Sequence[int], by: str) -> None:
        with locked(self.record.with_name("record"), queue=Stop()):
            entry = {"stage": stage.number, "job": job, "seeds": list(seeds), "tasks": list(tasks)}
            write_json(self.record, [*self.recorded(), entry | {"at": now(), "by": by, "code": self.code.name}])

    # --- the queue

    def own(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of this run: marked by their comment, or submitted by hand from this checkout while it is the newest run."""
        newest = snapshot.newest(self.root)
        by_hand = str(self.root) if newest is not None and newest.parent == self.folder else None
        return [
            job
            for job in jobs
            if JOB_NAME.fullmatch(job.name)
            and (Path(job.comment).parent == self.folder or (job.comment in ("", "(null)") and job.folder == by_hand))
        ]

    def shares(self, jobs: Iterable[Job]) -> list[tuple[Job, Key]]:
        """Tasks of arrays that share a stage's work, and whose."""
        found = []
        for job in jobs:
            named = SHARE_NAME.fullmatch(job.name)
            if named and Path(job.comment).parent == self.folder and job.task is not None:
                config = self._frozen_with(job)
                place = job.task // config.attack_workers.tasks
                if place < len(config.seeds):
                    found.append((job, (int(named[1]), config.seeds[place])))
        return found

    def keys(self, job: Job) -> list[Key]:
        """(stage, seed) pairs that a job of this run does."""
        named = JOB_NAME.fullmatch(job.name)
        assert named is not None
        seeds = self._frozen_with(job).seeds
        tasks = [job.task] if job.task is not None else range(len(seeds))
        return [(int(named[1]), seeds[task]) for task in tasks if task < len(seeds)]

    def _frozen_with(self, job: Job) -> Experiment:
        """The configuration that the job was frozen with."""
        code = Path(job.comment)
        if code in (self.code, Path(), Path("(null)")):
            return self.config
        try:
            return snapshot.stored(code)[0]
        except (InputError, ConfigError):
            return self.config

    def queued(self, jobs: Iterable[Job]) -> dict[Key, Queued]:
        """Who does what, of the jobs in the queue that still can."""
        live = [job for job in self.own(jobs) if job.live]
        tasks: dict[str, set[int]] = {}
        for job in live:
            tasks.setdefault(job.array, set()).update([] if job.task is None else [job.task])
        found: dict[Key, Queued] = {}
        for job in live:
            for key in self.keys(job):
                name = job.array if job.task is not None else job.id
                found.setdefault(key, Queued(name, job.task, frozenset(tasks[job.array])))
        return found

    def repoint(self, jobs: Iterable[Job], queued: Mapping[Key, Queued], moved: Iterable[Key]) -> list[str]:
        """Let the waiting jobs whose inputs are now made by other jobs (`moved`) wait for those. Returns their ids."""
        jobs, changed, moved = list(jobs), [], set(moved)
        shares = [(job, key) for job, key in self.shares(jobs) if job.live]
        for job, keys in [*((job, [key]) for job, key in shares), *((job, self.keys(job)) for job in self.own(jobs))]:
            needed = {(parent, seed) for number, seed in keys for parent in self.waits_for[number]}
            if job.live and job.state == "PENDING" and needed & moved:
                stage = self.pipeline[keys[0][0]]
                waits = [dependency(stage, self.waits_for[stage.number], [seed for _, seed in keys], queued)]
                arrays = {each.array for each, key in shares if key in keys}
                if arrays and JOB_NAME.fullmatch(job.name):
                    waits.append("afterany:" + ":".join(sorted(arrays)))
                client.update(job.id, Dependency=",".join(filter(None, waits)))
                changed.append(job.id)
        return changed

    # --- the folders

    def survey(self, queued: Mapping[Key, Queued]) -> tuple[set[Key], dict[Path, str]]:
        """(what is complete, with inputs that are; folders that cannot be gone on with and why, where no job is at it)."""
        complete: set[Key] = set()
        unusable: dict[Path, str] = {}
        for stage in self.pipeline:
            for seed in self.config.seeds:
                done, reason = standing(stage, self.config, seed, self.pipeline, self.folders)
                if done and inputs(stage, seed, self.config.seeds, self.waits_for) <= complete:
                    complete.add((stage.number, seed))
                elif reason and (stage.number, seed) not in queued:
                    unusable[stage.folder(self.folders, seed)] = reason
        return complete, unusable

    def position(self, stage: Stage, seeds: Iterable[int]) -> list[Any]:
        """How far a stage is for each seed: a value that differs if and only if work was gained."""
        files = [stage.folder(self.folders, seed) / "state" / "progress.json" for seed in seeds]
        done = [(file.parents[1] / "manifest.json").exists() for file in files]
        return ["complete" if whole else _position(file) for file, whole in zip(files, done, strict=True)]


def _position(file: Path) -> list[Any] | None:
    try:
        facts = read_json(file, Reported)
        return [facts["label"], facts["done"]]
    except (InputError, OSError):
        return None
