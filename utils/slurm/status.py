"""The run's table with what SLURM says of each job, and the next thing to type."""

from __future__ import annotations

from collections.abc import Sequence

from utils.run.status import Row, rows, table
from utils.slurm import client
from utils.slurm.chain import Chain
from utils.slurm.client import ENDED, Job, SlurmError
from utils.slurm.plan import Key

STUCK = {"JobHeldUser", "JobHeldAdmin", "PartitionTimeLimit", "launch failed requeued held", "AssocGrpBillingMinutes"}


def report(chain: Chain, seconds: float = 10.0) -> tuple[str, bool]:
    """(text, whether something is still to happen by itself). Works without accounting, and while the controller is away."""
    found, latest, trouble = rows(chain.pipeline, chain.config), _recorded(chain), ""
    jobs: list[Job] = []
    gone: dict[str, str] = {}
    try:
        jobs = chain.own(client.queue(seconds))
        gone = client.accounting(sorted(set(latest.values()) - {job.id for job in jobs}), seconds)
    except SlurmError as error:
        trouble = f"SLURM does not answer ({error}). What follows is read from the files.\n"
    by_key = _by_key(chain, jobs)
    for row in found:
        if job := by_key.get(_key(chain, row)):
            row.job, row.slurm = job.id, _words(job)
            row.state = "running" if job.state == "RUNNING" and row.state != "complete" else row.state
        elif known := latest.get(_key(chain, row)):
            row.job, row.slurm = known, "" if trouble else gone.get(known, "no longer known")
    place = f"run {chain.config.run_name} in {chain.folders.run}"
    going = any(row.state != "complete" for row in found) and (bool(trouble) or any(job.live for job in by_key.values()))
    return f"{trouble}{place}\n{table(found)}\n{next_step(chain, found, by_key, bool(trouble))}", going


def _key(chain: Chain, row: Row) -> Key:
    return (row.stage.number, chain.config.seeds[0] if row.seed is None else row.seed)


def _recorded(chain: Chain) -> dict[Key, str]:
    """The last job submitted for each stage and seed."""
    latest: dict[Key, str] = {}
    for entry in chain.recorded():
        for place, seed in enumerate(entry["seeds"]):
            latest[entry["stage"], seed] = f"{entry['job']}_{entry['tasks'][place]}" if entry["tasks"] else entry["job"]
    return latest


def _by_key(chain: Chain, jobs: Sequence[Job]) -> dict[Key, Job]:
    """For each stage and seed the job that is live, else the one that was submitted last."""
    found: dict[Key, Job] = {}
    for job in sorted(jobs, key=lambda one: (one.live, int(one.array))):
        for key in chain.keys(job):
            found[key] = job
    return found


def _words(job: Job) -> str:
    return job.state + (f" ({job.reason})" if job.reason not in ("None", "") else "")


def next_step(chain: Chain, found: Sequence[Row], by_key: dict[Key, Job], away: bool) -> str:
    """What to type."""
    if all(row.state == "complete" for row in found):
        return f"All stages are complete. Open {chain.folders.final / 'experiment_summary.txt'}"
    if away:
        return "Next: ask again when SLURM answers: bash run_all.sh --status"
    jobs = [by_key.get(_key(chain, row)) for row in found if row.state != "complete"]
    if stuck := [job for job in jobs if job and job.live and job.reason in STUCK]:
        return f"Next: job {stuck[0].id} does not start by itself ({stuck[0].reason}): see 'What each state means' in docs/OPERATIONS.md"
    if all(job and job.live for job in jobs):
        return "Next: nothing to do, the jobs go on by themselves. Watch: bash run_all.sh --watch"
    failed = [job for job in jobs if job and job.state in ENDED - {"COMPLETED", "CANCELLED"}]
    if any(job.reason == "JobLaunchFailure" for job in failed):
        hint = "a job found no folder for its log (mkdir logs), or a broken node; then "
    else:
        hint = f"read logs/{failed[0].name}_{failed[0].id}.out, then " if failed else ""
    return f"Next: {hint}submit what is missing: bash run_all.sh --resume"
