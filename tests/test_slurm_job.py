"""What a job does about itself: which seeds it has, how it arrives, and how it leaves after it was stopped in time."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from configs.cluster import Cluster
from stages import slurm as commands
from stages.__main__ import main
from stages.pipeline import stages
from tests.fake_slurm import FakeSlurm, finish, interrupt, make_chain, small_checkout
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError
from utils.run.stage import Stage
from utils.slurm import job, snapshot
from utils.slurm.chain import Chain

Out = pytest.CaptureFixture[str]
TRAINING = stages()[2]
TWO = "seeds=[42, 7]"


@pytest.fixture
def root(own_folders: Path) -> Path:
    return small_checkout(own_folders / "checkout")


class Naps(list[float]):
    """Stands in for sleep."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> Naps:
    """Nobody waits, for a controller that comes back or for the end."""
    instead = Naps()
    monkeypatch.setattr(time, "sleep", instead)
    monkeypatch.setattr(job, "PATIENCE", 0.0)
    return instead


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> FakeSlurm:
    """This process is job 17, at work for stage 2."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    slurm.add("17", "job_2_baseline", "RUNNING")
    return slurm


def as_task(task: int, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    """This process is one task of array 17; SLURM gives the last one the array's own number as its id."""
    monkeypatch.setenv("SLURM_JOB_ID", "21")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
    slurm.jobs.pop("17", None)
    slurm.add(f"17_{task}", "job_2_baseline", "RUNNING")


# --- who am I


def test_own_id_and_tasks(monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert (job.own_id(), job.own_tasks()) == ("17", ())
    as_task(2, monkeypatch, slurm)
    assert (job.own_id(), job.own_tasks()) == ("17_2", (2,))


def test_outside_of_a_job_and_with_other_variables_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="found no SLURM_JOB_ID in the environment: this is for the inside of a job"):
        job.own_id()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "²")
    with pytest.raises(InputError, match="SLURM_ARRAY_TASK_ID='²' in the environment, expected a whole number"):
        job.own_tasks()


def test_own_seeds_are_all_of_a_plain_job_and_one_of_a_task(root: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    chain = make_chain(root, TWO)
    assert job.own_seeds(chain, TRAINING) == (42, 7)
    as_task(1, monkeypatch, slurm)
    assert job.own_seeds(chain, TRAINING) == (7,)
    assert job.own_seeds(chain, stages()[7]) == (42, 7)


def test_share_of_a_task(root: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    config = make_chain(root, TWO, "attack_workers.tasks=3").config
    found = []
    for task in range(6):
        as_task(task, monkeypatch, slurm)
        found.append(job.own_share(config))
    assert found == [(42, (0, 3)), (42, (1, 3)), (42, (2, 3)), (7, (0, 3)), (7, (1, 3)), (7, (2, 3))]


def test_task_that_no_seed_has_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    as_task(2, monkeypatch, slurm)
    with pytest.raises(InputError, match="found array task 2, expected 0 to 1: the run's seeds are 42, 7"):
        job.own_seeds(make_chain(root, TWO), TRAINING)


# --- it arrives


def test_job_of_this_program_says_when_it_ends_and_asks_nothing(
    root: Path, inside: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv("JOB_RESTARTS", "0")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 7200))
    job.arrive(make_chain(root), TRAINING, [42])
    assert inside.calls == []
    assert capsys.readouterr().out.startswith(("  2 h 00 min to the time limit; asked by", "  1 h 59 min"))
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    job.arrive(make_chain(root), TRAINING, [42])
    assert capsys.readouterr().out.startswith("  asked by SIGUSR1")


def test_job_submitted_by_hand_marks_itself_and_repairs_the_chain_behind_it(root: Path, inside: FakeSlurm, capsys: Out) -> None:
    """Stage 2 failed; 4 waits for ever for the old job, 5 was cancelled, 3 runs; 1 and 0 are complete."""
    chain = make_chain(root)
    finish(chain, [0, 1])
    snapshot.remember(root, chain.code)
    inside.change("17", folder=str(root), comment="(null)")
    inside.add("12", "job_3_monotonic", "RUNNING", comment=str(chain.code))
    inside.add("13", "job_4_evaluate", "PENDING", "Dependency", comment=str(chain.code))
    inside.add("14", "job_5_uat", "CANCELLED", comment=str(chain.code))
    capsys.readouterr()
    job.arrive(chain, TRAINING, [42])
    assert inside.jobs["17"].comment == str(chain.code)
    assert [(entry["job"], entry["stage"], entry["by"]) for entry in chain.recorded()] == [
        ("17", 2, "hand"),
        ("100", 5, "job 17"),
        ("101", 6, "job 17"),
        ("102", 7, "job 17"),
    ]
    assert inside.waits == {"17": "", "13": "afterok:17:12", "100": "afterok:17:12", "101": "afterok:17:12", "102": "afterok:13:100:101"}
    out = capsys.readouterr().out
    assert "  submitted stage 5 uat, afterok:17:12\n" in out
    assert "  the waiting jobs 13 now wait for this one\n" in out
    calls = len(inside.said("sbatch"))
    job.arrive(chain, TRAINING, [42])  # the same job after a requeue
    assert len(inside.said("sbatch")) == calls
    assert [entry["job"] for entry in chain.recorded()].count("17") == 1


def test_task_submitted_by_hand_repairs_its_own_seed(root: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, capsys: Out) -> None:
    """Of seed 42 nobody makes stage 2, so its stages 4 to 6 and the summary are left for --resume."""
    chain = make_chain(root, TWO)
    finish(chain, [0, 1, 3])
    as_task(1, monkeypatch, slurm)
    capsys.readouterr()
    job.arrive(chain, TRAINING, [7])
    assert slurm.waits == {"17_1": "", **dict.fromkeys(("100_1", "101_1", "102_1"), "aftercorr:17")}
    assert "  stage 4 (evaluate) also waits for what is neither complete nor queued: bash run_all.sh --resume\n" in capsys.readouterr().out


def test_every_task_of_an_array_submitted_by_hand_is_recorded(root: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    chain = make_chain(root, TWO)
    for task in (0, 1, 0):
        as_task(task, monkeypatch, slurm)
        job.arrive(chain, TRAINING, [chain.config.seeds[task]])
    assert [(entry["job"], entry["seeds"], entry["tasks"]) for entry in chain.recorded() if entry["by"] == "hand"] == [
        ("17", [42], [0]),
        ("17", [7], [1]),
    ]


def test_job_by_hand_works_on_while_the_controller_is_away(root: Path, inside: FakeSlurm, capsys: Out) -> None:
    inside.away = True
    job.arrive(make_chain(root), TRAINING, [42])
    assert (
        "the jobs behind this one were not looked at (scontrol gave no answer in 60 s); later: bash run_all.sh" in capsys.readouterr().out
    )


def test_job_by_hand_works_on_while_another_stage_is_out_of_reach(
    root: Path, inside: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def survey(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "manifest.json")

    monkeypatch.setattr(Chain, "survey", survey)
    job.arrive(make_chain(root), TRAINING, [42])
    assert "the jobs behind this one were not looked at ([Errno 5] Input/output error: 'manifest.json'); later" in capsys.readouterr().out


# --- it leaves


def leave(chain: Chain, step: int | None = None, *seeds: int) -> int:
    """Leave, stopped at a step."""
    if step is not None:
        interrupt(chain, 2, (seeds or (42,))[0], step)
    return job.leave(chain, TRAINING, seeds or (42,))


@pytest.fixture
def chain(root: Path) -> Chain:
    """Stage 2 is next."""
    chain = make_chain(root)
    finish(chain, [0])
    return chain


def test_stopped_job_queues_itself_again(chain: Chain, inside: FakeSlurm, capsys: Out) -> None:
    assert leave(chain, 3) == STOPPED
    assert inside.said("scontrol") == ["scontrol -o show job 17", "scontrol requeue 17"]
    assert "queued again as job 17\n" in capsys.readouterr().out
    assert inside.said("sbatch") == []


def test_task_queues_itself_and_no_other_again(chain: Chain, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm) -> None:
    as_task(0, monkeypatch, slurm)
    assert leave(chain, 3) == STOPPED
    assert slurm.said("scontrol")[-1] == "scontrol requeue 17_0"


@pytest.mark.parametrize(("state", "reason", "again"), [("COMPLETING", "TimeLimit", True), ("CANCELLED", "None", False)])
def test_cancelled_job_stays_away_but_the_time_limit_is_no_reason_to(
    state: str, reason: str, again: bool, chain: Chain, inside: FakeSlurm, capsys: Out
) -> None:
    inside.change("17", state=state, reason=reason)
    assert leave(chain, 3) == STOPPED
    assert ("scontrol requeue 17" in inside.said("scontrol")) is again
    out = capsys.readouterr().out
    assert (f"stopped as {state}, not by the time limit: not queued again. To go on: bash run_all.sh --resume" in out) is not again


@pytest.mark.parametrize(
    ("own", "before", "again"), [("2", "", True), ("3", "", False), ("1", "2", False), ("", "2", True), ("1", "1", True)]
)
def test_restarts_of_the_job_and_its_predecessors_are_bounded(
    own: str, before: str, again: bool, root: Path, inside: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    chain = make_chain(root, cluster=Cluster(max_restarts=3))
    finish(chain, [0])
    monkeypatch.setenv("SLURM_RESTART_COUNT", own)
    monkeypatch.setenv("JOB_RESTARTS", before)
    assert leave(chain, 3) == (STOPPED if again else FAILED)
    assert ("scontrol requeue 17" in inside.said("scontrol")) is again
    assert ("restarted 3 times, as often as the cluster file allows (max_restarts)" in capsys.readouterr().out) is not again


def test_job_that_gains_nothing_does_not_come_back(chain: Chain, inside: FakeSlurm, capsys: Out) -> None:
    assert leave(chain) == STOPPED  # stopped before it began: the first time that is no sign
    assert leave(chain) == FAILED
    said = capsys.readouterr().out
    assert "no work was gained since the last stop" in said and "batch sizes" in said
    assert leave(chain, 3) == leave(chain, 4) == STOPPED
    assert leave(chain, 4) == FAILED
    assert inside.said("scontrol").count("scontrol requeue 17") == 3


def test_stage_that_is_complete_forgets_its_stops(chain: Chain, inside: FakeSlurm) -> None:
    """Made again later, for another reason, its first stop is no second one."""
    assert leave(chain, 3) == STOPPED
    job.forget(chain, TRAINING, [42])
    assert leave(chain, 3) == STOPPED
    job.forget(chain, TRAINING, [42])
    job.forget(chain, TRAINING, [42])


def test_damaged_note_of_the_last_stop_counts_as_none(chain: Chain, inside: FakeSlurm) -> None:
    assert leave(chain, 3) == STOPPED
    (note,) = (chain.folder / "stopped").glob("*.json")
    note.write_text("{")
    assert leave(chain, 3) == STOPPED


def test_without_an_answer_the_job_ends_and_says_how_to_go_on(chain: Chain, inside: FakeSlurm, naps: Naps, capsys: Out) -> None:
    inside.away = True
    assert leave(chain, 3) == STOPPED
    assert "SLURM does not answer, so this job is not queued again; when it is back: bash run_all.sh --resume" in capsys.readouterr().out
    assert naps == []


def test_controller_that_comes_back_in_time_is_waited_for(
    chain: Chain, inside: FakeSlurm, naps: Naps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "PATIENCE", 30.0)
    inside.away = True

    def back_soon(seconds: float) -> None:
        naps.append(seconds)
        inside.away = len(naps) < 3

    monkeypatch.setattr(time, "sleep", back_soon)
    assert leave(chain, 3) == STOPPED
    assert naps == [2, 2, 2]


def test_where_requeue_is_refused_a_successor_goes_on(
    chain: Chain, inside: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    """The jobs that wait for this one are pointed at it before this one ends."""
    monkeypatch.setenv("JOB_RESTARTS", "4")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    inside.refuses["scontrol requeue"] = "Requested operation is presently disabled for job 17"
    inside.change("17", comment=str(chain.code))
    inside.add("12", "job_3_monotonic", "RUNNING", comment=str(chain.code))
    inside.add("13", "job_4_evaluate", comment=str(chain.code))
    assert leave(chain, 3) == STOPPED
    (line,) = inside.said("sbatch")
    assert "--job-name=job_2_baseline" in line and "--dependency" not in line
    assert line.endswith(f"{chain.code}/jobs/job_2_baseline.sh {chain.code} 6")
    assert inside.waits["13"] == "afterok:100:12"
    assert chain.recorded()[-1]["by"] == "job 17"
    out = capsys.readouterr().out
    assert "this site does not let a job queue itself again (scontrol: Requested operation is presently disabled for job 17)" in out
    assert "job 100 goes on from here; the waiting jobs 13 now wait for it" in out


def test_site_that_forbids_requeue_is_not_asked(root: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's successor is that task of a new array."""
    chain = make_chain(root, TWO, cluster=Cluster(requeue=False))
    finish(chain, [0])
    as_task(1, monkeypatch, slurm)
    assert leave(chain, 3, 7) == STOPPED
    assert not any("requeue" in line for line in slurm.said("scontrol"))
    assert list(slurm.jobs) == ["17_1", "100_1"]
    assert chain.recorded()[-1]["seeds"] == [7] and chain.recorded()[-1]["tasks"] == [1]


def test_successor_that_is_refused_is_told(chain: Chain, inside: FakeSlurm, capsys: Out) -> None:
    inside.refuses |= {"scontrol requeue": "disabled", "sbatch": "Job violates accounting/QOS policy"}
    assert leave(chain, 3) == STOPPED
    assert "no successor could be submitted (sbatch: Job violates accounting/QOS policy)" in capsys.readouterr().out


# --- the commands inside a job


@pytest.fixture
def frozen(chain: Chain, inside: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """The program runs from the run's snapshot, in the checkout."""
    snapshot.Snapshot.of(chain.root, chain.config, chain.cluster, "python").write()
    monkeypatch.chdir(chain.root)
    monkeypatch.setattr(commands, "__file__", str(next(chain.folder.glob("code-*")) / "stages/slurm.py"))
    return chain


def test_command_job_does_the_stage_for_its_seeds(frozen: Chain, inside: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answers = [STOPPED, DONE]

    def run_each(chosen: list, config: object, seeds: tuple, discard: bool) -> int:
        asked.append((chosen[0].name, seeds, discard))
        return answers[len(asked) - 1]

    monkeypatch.setattr(commands, "run_each", run_each)
    monkeypatch.setenv("JOB_RESTARTS", "0")
    interrupt(frozen, 2, 42, 3)
    assert main(["job", "2"]) == STOPPED
    assert main(["requeue", "2"]) == STOPPED
    assert list((frozen.folder / "stopped").iterdir())
    assert main(["job", "2"]) == DONE
    assert not list((frozen.folder / "stopped").iterdir())
    assert asked == [("train_baseline", (42,), False)] * 2


def test_command_share_does_a_share_and_sees_to_nothing_else(
    frozen: Chain, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, capsys: Out
) -> None:
    asked = []

    def run_stage(stage: Stage, config: object, seed: int, *others: object, task: object) -> int:
        asked.append((stage.name, seed, task))
        return STOPPED

    monkeypatch.setattr(commands, "run_stage", run_stage)
    calls = len(slurm.calls)
    as_task(1, monkeypatch, slurm)
    assert main(["share", "5"]) == REFUSED
    assert "found array task 1, expected 0 to 0: attack_workers.tasks=1 a seed" in capsys.readouterr().err
    as_task(0, monkeypatch, slurm)
    assert main(["share", "5"]) == STOPPED
    assert asked == [("uat", 42, (0, 1))]
    assert len(slurm.calls) == calls


def test_command_job_of_a_task_without_a_seed_is_refused(
    frozen: Chain, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, capsys: Out
) -> None:
    as_task(5, monkeypatch, slurm)
    assert main(["job", "2"]) == REFUSED
    assert "found array task 5, expected 0 to 0" in capsys.readouterr().err
