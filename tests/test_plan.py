"""What is submitted and what waits for what: worked examples, and random queues against a reading of SLURM's own rules."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from stages.pipeline import depends_on, stages
from utils.slurm.plan import Key, Queued, Submission, dependency, submit_missing

STAGES = stages()
GRAPH = {stage.number: depends_on(stage, STAGES) for stage in STAGES}
SUMMARY = 7


class Sbatch(list[Submission]):
    """Takes submissions and gives ids: 100, 101 ... Refuses from the given call on."""

    def __init__(self, refuse_from: int = 1_000_000) -> None:
        super().__init__()
        self.refuse_from = refuse_from

    def __call__(self, submission: Submission) -> str:
        if len(self) >= self.refuse_from:
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        self.append(submission)
        return str(99 + len(self))


def plan(
    seeds: Sequence[int], complete: Iterable[Key] = (), queued: dict[Key, Queued] | None = None, first: int = 0, last: int = 7
) -> list[tuple[int, tuple[int, ...], tuple[int, ...], str]]:
    """(stage, seeds, tasks, dependency) of every submission, in order; ids are 100, 101 ..."""
    sbatch = Sbatch()
    made = submit_missing(STAGES[first : last + 1], seeds, GRAPH, complete, {} if queued is None else queued, sbatch)
    assert made == sbatch
    return [(one.stage.number, one.seeds, one.tasks, one.dependency) for one in made]


def plain(job: str, stage: int, *seeds: int) -> dict[Key, Queued]:
    return {(stage, seed): Queued(job) for seed in seeds}


def array(job: str, stage: int, tasks: dict[int, int]) -> dict[Key, Queued]:
    """{seed: task} of the tasks that are still to come or at work."""
    return {(stage, seed): Queued(job, task, frozenset(tasks.values())) for seed, task in tasks.items()}


def done(stages: Iterable[int], *seeds: int) -> set[Key]:
    return {(stage, seed) for stage in stages for seed in seeds}


def test_one_seed_is_a_chain_of_plain_jobs() -> None:
    assert plan([42]) == [
        (0, (42,), (), ""),
        (1, (42,), (), "afterok:100"),
        (2, (42,), (), "afterok:100"),
        (3, (42,), (), "afterok:101"),
        (4, (42,), (), "afterok:102:103"),
        (5, (42,), (), "afterok:102:103"),
        (6, (42,), (), "afterok:102:103"),
        (7, (42,), (), "afterok:104:105:106"),
    ]


def test_several_seeds_are_arrays_whose_tasks_wait_for_tasks_of_equal_number() -> None:
    seeds, tasks = (42, 7, 1337), (0, 1, 2)
    summary = ":".join(f"{job}_{task}" for job in (104, 105, 106) for task in tasks)
    assert plan(seeds) == [
        (0, seeds, tasks, ""),
        (1, seeds, tasks, "aftercorr:100"),
        (2, seeds, tasks, "aftercorr:100"),
        (3, seeds, tasks, "aftercorr:101"),
        (4, seeds, tasks, "aftercorr:102,aftercorr:103"),
        (5, seeds, tasks, "aftercorr:102,aftercorr:103"),
        (6, seeds, tasks, "aftercorr:102,aftercorr:103"),
        (7, seeds, (), f"afterany:{summary}"),
    ]


def test_complete_stages_are_waited_for_by_nobody() -> None:
    assert plan([42], done(range(3), 42)) == [
        (3, (42,), (), ""),
        (4, (42,), (), "afterok:100"),
        (5, (42,), (), "afterok:100"),
        (6, (42,), (), "afterok:100"),
        (7, (42,), (), "afterok:101:102:103"),
    ]
    assert plan([42, 7], done(range(8), 42, 7)) == []


def test_seed_that_is_ahead_makes_a_smaller_array() -> None:
    """Task numbers stay positions in the run's seeds."""
    complete = done(range(4), 42, 7, 1337) | done([4], 7)
    assert plan([42, 7, 1337], complete, last=4) == [(4, (42, 1337), (0, 2), "")]


def test_seeds_that_wait_for_different_things_become_jobs_of_their_own() -> None:
    """One seed has its baseline, the other does not: no array could say that."""
    complete = done([0, 1], 42, 7) | {(2, 42)}
    assert plan([42, 7], complete, first=2, last=4) == [
        (2, (7,), (1,), ""),
        (3, (42, 7), (0, 1), ""),
        (4, (42,), (0,), "afterok:101_0"),
        (4, (7,), (1,), "afterok:100_1:101_1"),
    ]


def test_waits_for_jobs_that_are_queued_already() -> None:
    queued = array("17", 2, {42: 0, 7: 1}) | array("18", 3, {42: 0, 7: 1})
    assert plan([42, 7], done([0, 1], 42, 7), queued, last=4) == [(4, (42, 7), (0, 1), "aftercorr:17,aftercorr:18")]
    assert queued[4, 7] == Queued("100", 1, frozenset({0, 1}))
    assert plan([42, 7], done([0, 1], 42, 7), queued, last=4) == []


def test_array_of_other_tasks_is_waited_for_task_by_task() -> None:
    """`aftercorr` pairs equal task numbers of whole arrays; one with more live tasks is not paired."""
    queued = array("17", 1, {42: 0, 7: 1, 1337: 2}) | array("18", 3, {7: 1})
    assert plan([42, 7, 1337], done([0], 42, 7, 1337), queued, first=3, last=3) == [
        (3, (42,), (0,), "afterok:17_0"),
        (3, (1337,), (2,), "afterok:17_2"),
    ]


def test_array_of_seeds_in_another_order_is_waited_for_task_by_task() -> None:
    queued = array("17", 2, {7: 0, 42: 1})
    assert plan([42, 7], done([0, 1, 3], 42, 7), queued, first=4, last=4) == [
        (4, (42,), (0,), "afterok:17_1"),
        (4, (7,), (1,), "afterok:17_0"),
    ]


def test_plain_job_of_all_seeds_is_waited_for_as_a_whole() -> None:
    """Submitted by hand: one job does all seeds in turn."""
    queued = plain("17", 2, 42, 7)
    complete = done([0, 1, 3], 42, 7)
    assert plan([42, 7], complete, queued, first=4) == [
        (4, (42,), (0,), "afterok:17"),
        (4, (7,), (1,), "afterok:17"),
        (5, (42,), (0,), "afterok:17"),
        (5, (7,), (1,), "afterok:17"),
        (6, (42,), (0,), "afterok:17"),
        (6, (7,), (1,), "afterok:17"),
        (7, (42, 7), (), "afterany:100_0:101_1:102_0:103_1:104_0:105_1"),
    ]


def test_what_lacks_an_input_is_left_out_with_all_behind_it() -> None:
    assert plan([42], done([0], 42), first=3) == []
    assert plan([42, 7], done([0, 1, 2], 42, 7) | {(3, 42)}, first=4) == [(4, (42,), (0,), ""), (5, (42,), (0,), ""), (6, (42,), (0,), "")]


def test_summary_is_submitted_once_and_never_beside_a_queued_one() -> None:
    complete = done(range(7), 42, 7)
    assert plan([42, 7], complete) == [(7, (42, 7), (), "")]
    assert plan([42, 7], complete, plain("17", SUMMARY, 42, 7)) == []


def test_dependency_names_each_job_once_and_is_empty_without_any() -> None:
    queued = plain("17", 4, 42, 7) | array("18", 5, {42: 0})
    summary = stages()[SUMMARY]
    assert dependency(summary, [4, 5, 6], [42, 7], queued) == "afterany:17:18_0"
    assert dependency(summary, [4, 5, 6], [42], queued) == "afterok:17:18_0"
    assert dependency(stages()[4], [4], [42, 7], queued) == "afterok:17"
    assert dependency(summary, [6], [42, 7], queued) == ""


# --- random queues


def random_case(chance: random.Random) -> tuple[list[int], list[int], set[Key], dict[Key, Queued]]:
    """Seeds, chosen stages, and what is complete or queued: by arrays, single tasks of them, or plain jobs for several seeds.

    Arrays may be of an older submission, with the seeds in another order.
    """
    seeds = chance.sample([42, 7, 1337, 2024], chance.randint(1, 4))
    chosen = sorted(chance.sample(range(8), chance.randint(1, 8))) if chance.random() < 0.4 else list(range(8))
    complete: set[Key] = set()
    queued: dict[Key, Queued] = {}
    for stage in range(8):
        if stage == SUMMARY:
            fate = chance.choice(["missing", "missing", "complete", "queued"])
            complete |= done([stage], *seeds) if fate == "complete" else set()
            queued |= plain("27", stage, *seeds) if fate == "queued" else {}
            continue
        fates = {seed: chance.choice(["missing", "complete", "queued"][: chance.randint(1, 3)]) for seed in seeds}
        complete |= {(stage, seed) for seed in seeds if fates[seed] == "complete"}
        waiting = [seed for seed in seeds if fates[seed] == "queued"]
        order = chance.sample(seeds, len(seeds)) if chance.random() < 0.5 else seeds
        if len(seeds) == 1 or chance.random() < 0.3:
            queued |= plain(f"1{stage}", stage, *waiting)
        elif chance.random() < 0.6:
            queued |= array(f"1{stage}", stage, {seed: order.index(seed) for seed in waiting})
        else:
            for place, seed in enumerate(waiting):
                queued |= array(f"{3 + place}{stage}", stage, {seed: order.index(seed)})
    return seeds, chosen, complete, queued


def inputs(stage: int, seed: int, seeds: Sequence[int]) -> set[Key]:
    return {(parent, one) for parent in GRAPH[stage] for one in (seeds if stage == SUMMARY else [seed])}


def waited_for(submission: Submission, task: int | None, live: dict[tuple[str, int | None], set[Key]]) -> set[tuple[str, int | None]]:
    """Live (job, task) pairs that SLURM lets one task of a submission wait for, as `man sbatch` defines --dependency."""
    found: set[tuple[str, int | None]] = set()
    for clause in filter(None, submission.dependency.split(",")):
        kind, *jobs = clause.split(":")
        for job in jobs:
            if kind == "aftercorr":
                assert task is not None and (job, task) in live, f"no task {task} in array {job}"
                found.add((job, task))
            else:
                assert kind == ("afterany" if submission.stage.number == SUMMARY and len(submission.seeds) > 1 else "afterok")
                number, _, one = job.partition("_")
                whole = {pair for pair in live if pair[0] == number and (not one or pair[1] == int(one))}
                assert whole, f"nothing is known of job {job}"
                found |= whole
    return found


def expected_keys(seeds: Sequence[int], chosen: Sequence[int], there: set[Key]) -> set[Key]:
    """What can be made from what is there, by the chosen stages."""
    made: set[Key] = set()
    for stage in chosen:
        for seed in seeds:
            if (stage, seed) not in there and inputs(stage, seed, seeds) <= there | made:
                made.add((stage, seed))
    return made


@pytest.mark.parametrize("number", range(20))
def test_every_job_waits_for_exactly_the_live_jobs_that_make_its_inputs(number: int) -> None:
    chance = random.Random(number)
    for _ in range(30):
        hold_against_slurms_rules(*random_case(chance))


def hold_against_slurms_rules(seeds: list[int], chosen: list[int], complete: set[Key], queued: dict[Key, Queued]) -> None:
    before = dict(queued)
    sbatch = Sbatch()
    submit_missing([STAGES[stage] for stage in chosen], seeds, GRAPH, complete, queued, sbatch)
    live: dict[tuple[str, int | None], set[Key]] = {}
    for key, job in before.items():
        live.setdefault((job.job, job.task), set()).add(key)
    made: list[Key] = []
    for place, submission in enumerate(sbatch):
        stage = submission.stage.number
        tasks: list[tuple[int | None, tuple[int, ...]]] = [(None, submission.seeds)]
        if submission.tasks:
            assert [seeds[task] for task in submission.tasks] == list(submission.seeds)
            tasks = [(task, (seeds[task],)) for task in submission.tasks]
        for task, own in tasks:
            needed = set().union(*(inputs(stage, seed, seeds) for seed in own))
            makers = {pair for pair, keys in live.items() if keys & needed}
            assert waited_for(submission, task, live) == makers
            assert needed <= complete | {key for keys in live.values() for key in keys}
        for task, own in tasks:
            live[str(100 + place), task] = {(stage, seed) for seed in own}
            made += [(stage, seed) for seed in own]
    assert len(made) == len(set(made))
    assert not set(made) & (complete | set(before))
    assert set(made) == expected_keys(seeds, chosen, complete | set(before))
    assert set(queued) == set(before) | set(made)
    assert [one.stage.number for one in sbatch] == sorted(one.stage.number for one in sbatch)


@pytest.mark.parametrize("number", range(30))
def test_refused_submission_leaves_a_beginning_that_a_second_call_completes(number: int) -> None:
    seeds, chosen, complete, queued = random_case(random.Random(number))
    run = [STAGES[stage] for stage in chosen]
    straight: dict[Key, Queued] = dict(queued)
    calls = len(submit_missing(run, seeds, GRAPH, complete, straight, Sbatch()))
    for refused in range(calls):
        halted, sbatch = dict(queued), Sbatch(refused)
        with pytest.raises(RuntimeError, match="QOSMax"):
            submit_missing(run, seeds, GRAPH, complete, halted, sbatch)
        assert len(sbatch) == refused
        submitted = {(one.stage.number, seed) for one in sbatch for seed in one.seeds}
        assert set(halted) == set(queued) | submitted
        for stage, seed in submitted:
            assert inputs(stage, seed, seeds) <= complete | set(halted)
        submit_missing(run, seeds, GRAPH, complete, halted, Sbatch())
        assert set(halted) == set(straight)
