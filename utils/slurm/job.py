"""Inside a job: which seeds it does, what it does for a chain that broke, and what it does when it was stopped in time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.schema import Experiment
from utils.run.artifacts import read_json, remove, write_json
from utils.run.environment import number
from utils.run.errors import FAILED, STOPPED, InputError
from utils.run.preemption import job_end
from utils.run.progress import duration
from utils.run.stage import Stage, Task
from utils.slurm import client
from utils.slurm.chain import Chain
from utils.slurm.client import SlurmError
from utils.slurm.plan import Key, Queued, Submission, submit_missing

PATIENCE = 60.0  # seconds in which a controller that is away may come back


def own_id() -> str:
    """17, or 17_2 for task 2 of array 17."""
    if not number("SLURM_JOB_ID"):
        raise InputError("found no SLURM_JOB_ID in the environment: this is for the inside of a job; submit one: bash run_all.sh")
    array, tasks = number("SLURM_ARRAY_JOB_ID"), own_tasks()
    return f"{array}_{tasks[0]}" if array and tasks else str(number("SLURM_JOB_ID"))


def _number() -> str:
    return own_id().split("_")[0]


def own_tasks() -> tuple[int, ...]:
    """Position in the run's list of seeds; empty for a plain job."""
    return (number("SLURM_ARRAY_TASK_ID"),) if os.environ.get("SLURM_ARRAY_TASK_ID") else ()


def own_seeds(chain: Chain, stage: Stage) -> tuple[int, ...]:
    """Seeds that this job does. Raises InputError for a task number that no seed has."""
    tasks, seeds = own_tasks(), chain.config.seeds
    if not tasks or not stage.every_seed:
        return seeds
    if tasks[0] >= len(seeds):
        raise InputError(f"found array task {tasks[0]}, expected 0 to {len(seeds) - 1}: the run's seeds are {', '.join(map(str, seeds))}")
    return (seeds[tasks[0]],)


def own_share(config: Experiment) -> tuple[int, Task]:
    """(seed, task) of this task of an array that shares a stage's work: the tasks of the first seed come first. Raises InputError for a
    number that is none of them."""
    own, tasks = number("SLURM_ARRAY_TASK_ID"), config.attack_workers.tasks
    if own >= tasks * len(config.seeds):
        raise InputError(f"found array task {own}, expected 0 to {tasks * len(config.seeds) - 1}: attack_workers.tasks={tasks} a seed")
    return config.seeds[own // tasks], (own % tasks, tasks)


def arrive(chain: Chain, stage: Stage, seeds: Sequence[int]) -> None:
    """Say how this job will end; if it was submitted by hand, note it, and repair the chain behind it.

    Without an answer from SLURM, or from the disk of another stage's folder, the work goes on: the chain can be repaired later.
    """
    _say_limits()
    if os.environ.get("JOB_RESTARTS"):
        return  # submitted by this program, together with all that waits for it
    try:
        if all((entry["job"], entry["tasks"]) != (_number(), list(own_tasks())) for entry in chain.recorded()):
            chain.note(stage, _number(), seeds, own_tasks(), by="hand")
        client.update(own_id(), Comment=str(chain.code))
        repair(chain, stage, seeds)
    except (SlurmError, OSError) as error:
        print(f"  the jobs behind this one were not looked at ({error}); later: bash run_all.sh --resume")


def _say_limits() -> None:
    end = job_end()
    left = "" if end is None else f"{duration(max(0.0, end - time.time()))} to the time limit; "
    print(f"  {left}asked by SIGUSR1, or when the limit is near, the stage saves and the job queues itself again", flush=True)


def repair(chain: Chain, stage: Stage, seeds: Sequence[int]) -> None:
    """Submit the stages behind this one that are neither complete nor queued, and let those that wait, wait for this job."""
    jobs = client.queue()
    here = _self(stage, seeds, _number())
    queued = chain.queued(jobs) | here
    complete, _unusable = chain.survey(queued)
    moved = chain.repoint(jobs, queued, here)
    behind = _behind(chain, stage)
    by = f"job {own_id()}"
    made = submit_missing(behind, chain.config.seeds, chain.waits_for, complete, queued, lambda one: chain.submit(one, by))
    for new in made:
        print(f"  submitted stage {new.stage.number} {new.stage.name}" + (f", {new.dependency}" if new.dependency else ""))
    if moved:
        print(f"  the waiting jobs {', '.join(moved)} now wait for this one")
    for one in behind:
        if any((one.number, seed) not in complete and (one.number, seed) not in queued for seed in chain.config.seeds):
            print(f"  stage {one.number} ({one.name}) also waits for what is neither complete nor queued: bash run_all.sh --resume")


def _self(stage: Stage, seeds: Sequence[int], job: str) -> dict[Key, Queued]:
    """This job, or its successor, in the queue."""
    tasks = own_tasks()
    return {(stage.number, seed): Queued(job, tasks[0] if tasks else None, frozenset(tasks)) for seed in seeds}


def _behind(chain: Chain, stage: Stage) -> list[Stage]:
    """Stages that wait for this one, directly or not, in order."""
    numbers = {stage.number}
    for one in chain.pipeline:
        if numbers & set(chain.waits_for[one.number]):
            numbers.add(one.number)
    return [one for one in chain.pipeline if one.number in numbers - {stage.number}]


def leave(chain: Chain, stage: Stage, seeds: Sequence[int]) -> int:
    """After exit code 75: queue the job again, or say why not. Returns the job's exit code.

    Not again if it was cancelled, if it gained nothing since it was last stopped, or after `max_restarts`.
    """
    state = _patiently(lambda: client.facts(own_id()))
    if state is None:
        print("SLURM does not answer, so this job is not queued again; when it is back: bash run_all.sh --resume")
        return STOPPED
    if state["JobState"] != "RUNNING" and state.get("Reason") != "TimeLimit":
        print(f"stopped as {state['JobState']}, not by the time limit: not queued again. To go on: bash run_all.sh --resume")
        return STOPPED
    restarts = number("SLURM_RESTART_COUNT") + number("JOB_RESTARTS")
    if restarts >= chain.cluster.max_restarts:
        print(f"restarted {restarts} times, as often as the cluster file allows (max_restarts). To go on anyway: bash run_all.sh --resume")
        return FAILED
    if not gained(chain, stage, seeds):
        print(
            "no work was gained since the last stop, so another start would not help. Give the job more time (`time` in the cluster file), "
            "or make its units of work smaller (batch sizes); then: bash run_all.sh --resume"
        )
        return FAILED
    if chain.cluster.requeue and _requeued():
        return STOPPED
    return _succeed(chain, stage, seeds, restarts + 1)


def gained(chain: Chain, stage: Stage, seeds: Sequence[int]) -> bool:
    """Whether the stage is further than when it was last stopped in time. Notes where it is now."""
    file = _stopped(chain, stage, seeds)
    now = chain.position(stage, seeds)
    try:
        before = read_json(file)
    except (InputError, OSError):
        before = None
    write_json(file, now)
    return bool(before != now)


def forget(chain: Chain, stage: Stage, seeds: Sequence[int]) -> None:
    """The stage is complete: how it was stopped no longer matters."""
    remove(_stopped(chain, stage, seeds))


def _stopped(chain: Chain, stage: Stage, seeds: Sequence[int]) -> Path:
    """Where a stage was when it was last stopped in time."""
    return chain.folder / "stopped" / f"{stage.label}_{'_'.join(map(str, seeds))}.json"


def _requeued() -> bool:
    try:
        print(f"queued again as job {own_id()}", flush=True)
        client.requeue(own_id())
    except SlurmError as error:
        print(f"this site does not let a job queue itself again ({error})")
        return False
    return True


def _succeed(chain: Chain, stage: Stage, seeds: Sequence[int], restarts: int) -> int:
    """Submit a job that goes on, and let the jobs that wait for this one wait for it."""
    submission = Submission(stage, tuple(seeds), own_tasks(), "")
    try:
        job = chain.submit(submission, by=f"job {own_id()}", restarts=restarts)
        jobs = client.queue()
        successor = _self(stage, seeds, job)
        moved = chain.repoint(jobs, chain.queued(jobs) | successor, successor)
    except SlurmError as error:
        print(f"no successor could be submitted ({error}). To go on: bash run_all.sh --resume")
        return STOPPED
    print(f"job {job} goes on from here" + (f"; the waiting jobs {', '.join(moved)} now wait for it" if moved else ""))
    return STOPPED


def _patiently(ask: Callable[[], dict[str, str]]) -> dict[str, str] | None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return ask()
        except SlurmError:
            if time.monotonic() >= end:
                return None
            time.sleep(2)
