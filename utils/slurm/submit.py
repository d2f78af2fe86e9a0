"""Submit a run, or what is missing of it. The second call finds nothing to do."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from utils.run.checks import passed
from utils.run.errors import DONE, FAILED, REFUSED, InputError
from utils.run.lock import locked
from utils.run.stage import Stage, set_aside
from utils.slurm import client, snapshot
from utils.slurm.chain import Chain
from utils.slurm.client import Job, SlurmError
from utils.slurm.plan import Key, Queued, Submission, submit_missing
from utils.slurm.preflight import checks

ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class Order:
    """What the user asks for. `confirm` asks a question and returns the answer."""

    chosen: Sequence[Stage]
    discard: bool
    dry_run: bool
    confirm: Callable[[str], bool]


def submit_run(chain: Chain, frozen: snapshot.Snapshot, order: Order) -> int:
    """Submit what is neither complete nor queued of the chosen stages. Returns an exit code and prints what the user needs."""
    try:
        with nullcontext() if order.dry_run else locked(chain.folder):
            return _submit(chain, frozen, order)
    except InputError as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    except SlurmError as error:
        print(f"nothing was submitted: {error}", file=sys.stderr)
        return FAILED


def _submit(chain: Chain, frozen: snapshot.Snapshot, order: Order) -> int:
    jobs = _settled(chain)
    queued = chain.queued(jobs)
    complete, unusable = chain.survey(queued)
    if unusable and not order.discard:
        raise InputError("\n".join(unusable.values()))
    _refuse_gaps(chain, order.chosen, complete, queued)
    missing = [stage for stage in order.chosen if any(key not in complete and key not in queued for key in _keys(chain, stage))]
    if not missing:
        print(
            f"nothing to submit: {_count(chain, order.chosen, complete)} complete, {_count(chain, order.chosen, queued)} queued or running"
        )
        return DONE
    if order.dry_run:
        _dry_run(chain, missing, complete, queued)
        return DONE
    if not passed(checks(chain, missing)):
        print("nothing was submitted: correct what is marked 'no' above, then type the same command again", file=sys.stderr)
        return REFUSED
    if not order.confirm(f"submit {len(missing)} stages of run {chain.config.run_name}?"):
        return REFUSED
    _prepare(chain, frozen, unusable, jobs)
    before = set(queued)
    try:
        submit_missing(missing, chain.config.seeds, chain.waits_for, complete, queued, lambda one: _speaking(chain, one))
        if moved := chain.repoint(jobs, queued, set(queued) - before):
            print(f"waiting jobs {', '.join(moved)} now wait for these")
    except SlurmError as error:
        return _half_way(error, bool(set(queued) - before))
    print("The jobs stop before their time limit and queue themselves again.\n  look:                   bash run_all.sh --status")
    print("  go on after a failure:  bash run_all.sh --resume")
    return DONE


def _settled(chain: Chain) -> list[Job]:
    """The queue, once no job of this run is just ending: nobody can tell yet what will have become of it."""
    end = time.monotonic() + ENDING_SECONDS
    while True:
        jobs = client.queue()
        ending = [job.id for job in (*chain.own(jobs), *(job for job, _ in chain.shares(jobs))) if job.state == "COMPLETING"]
        if not ending or time.monotonic() > end:
            return jobs
        print(f"waiting for the end of job {', '.join(ending)}", file=sys.stderr, flush=True)
        time.sleep(2)


def _prepare(chain: Chain, frozen: snapshot.Snapshot, unusable: Iterable[Path], jobs: Sequence[Job]) -> None:
    """What must be there before the first job can start; and jobs that wait for what can never be go."""
    for folder in unusable:
        print(f"moved to {set_aside(folder)}")
    frozen.write()
    (chain.root / "logs").mkdir(exist_ok=True)
    snapshot.remember(chain.root, chain.code)
    for job in [*chain.own(jobs), *(job for job, _ in chain.shares(jobs))]:
        if job.state == "PENDING" and not job.live:
            client.cancel(job.id)


def _keys(chain: Chain, stage: Stage) -> list[Key]:
    return [(stage.number, seed) for seed in chain.config.seeds]


def _count(chain: Chain, chosen: Sequence[Stage], keys: set[Key] | dict[Key, Queued]) -> int:
    """Stages and seeds, a stage over all seeds counted once."""
    return sum(key in keys for stage in chosen for key in _keys(chain, stage)[: None if stage.every_seed else 1])


def _refuse_gaps(chain: Chain, chosen: Sequence[Stage], complete: set[Key], queued: dict[Key, Queued]) -> None:
    """A stage that is chosen needs inputs that are there, on their way, or chosen too."""
    numbers = {stage.number for stage in chosen}
    for stage in chosen:
        for parent in chain.waits_for[stage.number]:
            gap = [seed for seed in chain.config.seeds if (parent, seed) not in complete and (parent, seed) not in queued]
            if parent not in numbers and gap:
                raise InputError(
                    f"stage {stage.number} ({stage.name}) waits for stage {parent}, neither complete nor queued for seed {gap[0]}; "
                    f"begin with it: --from {parent}"
                )


def _dry_run(chain: Chain, missing: Sequence[Stage], complete: set[Key], queued: dict[Key, Queued]) -> None:
    def show(submission: Submission) -> str:
        def show_sharing(arguments: list[str]) -> str:
            print(shlex.join(["sbatch", *arguments]))
            return f"SHARE{submission.stage.number}"

        print(shlex.join(["sbatch", *chain.command(chain.behind_sharing(submission, show_sharing))]))
        task = f"_seed{submission.seeds[0]}" if len(submission.tasks) == 1 else ""
        return f"JOB{submission.stage.number}{task}"

    submit_missing(missing, chain.config.seeds, chain.waits_for, complete, queued, show)


def _speaking(chain: Chain, submission: Submission) -> str:
    job = chain.submit(submission, by="run_all")
    after = f", {submission.dependency}" if submission.dependency else ""
    seeds = f", seeds {','.join(map(str, submission.seeds))}" if submission.tasks else ""
    print(f"  job {job}: stage {submission.stage.number} {submission.stage.name}{seeds}{after}", flush=True)
    return job


def _half_way(error: SlurmError, any_submitted: bool) -> int:
    there = "What is listed above stays: it is the beginning of a chain, and waits for nothing that is missing."
    print(f"SLURM refused: {error}\n{there if any_submitted else 'Nothing was submitted.'}", file=sys.stderr)
    print("When the cause is gone, submit the rest: bash run_all.sh --resume", file=sys.stderr)
    return FAILED
