"""What to submit: the missing stages of a run, in order, each waiting for the jobs that make its inputs. Nothing is called here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from utils.run.stage import Stage

Key = tuple[int, int]  # (stage number, seed)


@dataclass(frozen=True)
class Queued:
    """A job that will have done a stage for a seed: a plain job (task None), or one task of an array.

    `tasks` are all tasks of that array which are still to come or at work.
    """

    job: str
    task: int | None = None
    tasks: frozenset[int] = frozenset()

    @property
    def id(self) -> str:
        return self.job if self.task is None else f"{self.job}_{self.task}"


@dataclass(frozen=True)
class Submission:
    """One call of sbatch. `tasks` are positions in the run's list of seeds; empty for a plain job, which does all `seeds` in turn."""

    stage: Stage
    seeds: tuple[int, ...]
    tasks: tuple[int, ...]
    dependency: str


def submit_missing(
    chosen: Sequence[Stage],
    seeds: Sequence[int],
    waits_for: Mapping[int, Sequence[int]],
    complete: Iterable[Key],
    queued: dict[Key, Queued],
    submit: Callable[[Submission], str],
) -> list[Submission]:
    """Submit what is neither complete nor queued, stage after stage; `queued` grows by what `submit` returns (a job's id).

    A stage whose inputs are neither complete nor queued is left out. One that sums up all seeds is queued under every one of
    them. If `submit` raises, what came before stays in `queued`: the beginning of a chain waits for nothing that is not there.
    """
    done, made = set(complete), []
    for stage in chosen:
        still = [seed for seed in seeds if (stage.number, seed) not in done and (stage.number, seed) not in queued]
        missing = tuple(seed for seed in still if inputs(stage, seed, seeds, waits_for) <= done | set(queued))
        if not missing:
            continue
        for submission in _submissions(stage, missing, tuple(seeds), waits_for[stage.number], queued):
            job = submit(submission)
            made.append(submission)
            for place, seed in enumerate(submission.seeds):
                task = submission.tasks[place] if submission.tasks else None
                queued[stage.number, seed] = Queued(job, task, frozenset(submission.tasks))
    return made


def inputs(stage: Stage, seed: int, seeds: Sequence[int], waits_for: Mapping[int, Sequence[int]]) -> set[Key]:
    """What must be done before a stage of a seed can begin; a stage that sums up waits for every seed."""
    return {(parent, one) for parent in waits_for[stage.number] for one in ((seed,) if stage.every_seed else seeds)}


def _submissions(
    stage: Stage, missing: tuple[int, ...], seeds: tuple[int, ...], parents: Sequence[int], queued: Mapping[Key, Queued]
) -> list[Submission]:
    """One array for all missing seeds where its tasks can wait for tasks of equal number; otherwise one job a seed."""
    if not stage.every_seed or len(seeds) == 1:
        return [Submission(stage, seeds, (), dependency(stage, parents, seeds, queued))]
    tasks = tuple(seeds.index(seed) for seed in missing)
    arrays = [_array(parent, missing, tasks, queued) for parent in parents]
    if None not in arrays:
        return [Submission(stage, missing, tasks, ",".join(f"aftercorr:{job}" for job in arrays if job))]
    return [Submission(stage, (seed,), (seeds.index(seed),), dependency(stage, parents, (seed,), queued)) for seed in missing]


def _array(parent: int, missing: Sequence[int], tasks: Sequence[int], queued: Mapping[Key, Queued]) -> str | None:
    """The array whose tasks correspond one to one to the missing seeds; "" if nothing is to wait for; None if neither holds."""
    found = {queued.get((parent, seed)) and (queued[parent, seed].job, queued[parent, seed].tasks) for seed in missing}
    if found == {None}:
        return ""
    (first, *others) = found
    if not first or others or first[1] != frozenset(tasks):
        return None
    equal = all(queued[parent, seed].task == task for seed, task in zip(missing, tasks, strict=True))  # not so for seeds in another order
    return first[0] if equal else None


def dependency(stage: Stage, parents: Sequence[int], seeds: Sequence[int], queued: Mapping[Key, Queued]) -> str:
    """What sbatch is told: to wait for every job that makes an input for one of the seeds; empty if all inputs are there.

    One seed's stage needs them all (`afterok`). A summary of several seeds is made of what there is once all have ended (`afterany`).
    """
    ids = dict.fromkeys(queued[parent, seed].id for parent in parents for seed in seeds if (parent, seed) in queued)
    kind = "afterok" if stage.every_seed or len(seeds) == 1 else "afterany"
    return f"{kind}:{':'.join(ids)}" if ids else ""
