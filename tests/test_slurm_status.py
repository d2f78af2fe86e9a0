"""The table of a run with what SLURM says of each job, and the one thing to type next."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.pipeline import stages
from tests.fake_slurm import FakeSlurm, finish, interrupt, make_chain, small_checkout
from utils.slurm.chain import Chain
from utils.slurm.status import report


@pytest.fixture
def chain(own_folders: Path) -> Chain:
    return make_chain(small_checkout(own_folders / "checkout"))


@pytest.fixture
def submitted(chain: Chain, slurm: FakeSlurm) -> FakeSlurm:
    """Stages 0 and 1 are complete, jobs 12 to 17 were submitted for the rest: 12 and 13 run, the others wait."""
    finish(chain, [0, 1])
    for stage in stages()[2:]:
        job = f"1{stage.number}"
        chain.note(stage, job, chain.config.seeds, [], by="run_all")
        state = ("RUNNING", "None") if stage.number < 4 else ("PENDING", "Dependency")
        slurm.add(job, chain.script(stage).stem, *state, comment=str(chain.code))
    return slurm


def line(text: str, stage: str, seed: str = "42") -> str:
    """A row of the table, its blanks made single."""
    (found,) = (" ".join(row.split()) for row in text.splitlines() if row.split()[1:3] == [stage, seed])
    return found


def test_run_on_its_way(chain: Chain, submitted: FakeSlurm) -> None:
    interrupt(chain, 2, 42, 5)
    text, going = report(chain)
    assert going
    assert text.splitlines()[0] == f"run tiny in {chain.folders.run}"
    assert line(text, "setup").startswith("0 setup 42 complete 20")
    assert line(text, "train_baseline").startswith("2 train_baseline 42 running train 5/12, loss 2.5 ")
    assert line(text, "train_baseline").endswith(" 12 RUNNING")
    assert line(text, "train_monotonic") == "3 train_monotonic 42 running 13 RUNNING"
    assert line(text, "aggregate", "all") == "7 aggregate all not begun 17 PENDING (Dependency)"
    assert text.splitlines()[-1] == "Next: nothing to do, the jobs go on by themselves. Watch: bash run_all.sh --watch"
    submitted.change("14", state="PENDING", reason="None")
    assert line(report(chain)[0], "evaluate") == "4 evaluate 42 not begun 14 PENDING"


def test_before_anything_is_submitted(chain: Chain, slurm: FakeSlurm) -> None:
    text, going = report(chain)
    assert not going
    assert text.count("not begun") == 8 and "SLURM" not in text
    assert text.splitlines()[-1] == "Next: submit what is missing: bash run_all.sh --resume"
    assert slurm.said("sacct") == []


def test_failed_job_names_its_log(chain: Chain, submitted: FakeSlurm) -> None:
    submitted.change("12", state="FAILED", reason="NonZeroExitCode")
    for job in ("14", "15", "16", "17"):
        submitted.change(job, state="CANCELLED", reason="Dependency")
    text, going = report(chain)
    assert going  # stage 3 still runs
    assert line(text, "train_baseline") == "2 train_baseline 42 not begun 12 FAILED (NonZeroExitCode)"
    assert text.splitlines()[-1] == "Next: read logs/job_2_baseline_12.out, then submit what is missing: bash run_all.sh --resume"
    submitted.change("13", state="COMPLETED")
    assert not report(chain)[1]


def test_cancelled_run_is_told_to_go_on(chain: Chain, submitted: FakeSlurm) -> None:
    for job in submitted.jobs:
        submitted.change(job, state="CANCELLED", reason="None")
    text, going = report(chain)
    assert not going
    assert text.splitlines()[-1] == "Next: submit what is missing: bash run_all.sh --resume"


def test_job_that_waits_for_ever_is_to_be_replaced(chain: Chain, submitted: FakeSlurm) -> None:
    submitted.change("17", reason="DependencyNeverSatisfied")
    text, going = report(chain)
    assert going
    assert "17 PENDING (DependencyNeverSatisfied)" in line(text, "aggregate", "all")
    assert text.splitlines()[-1] == "Next: submit what is missing: bash run_all.sh --resume"


def test_job_without_a_place_for_its_log(chain: Chain, submitted: FakeSlurm) -> None:
    submitted.change("12", state="FAILED", reason="JobLaunchFailure")
    assert "mkdir" in report(chain)[0].splitlines()[-1]


def test_complete_run(chain: Chain, submitted: FakeSlurm) -> None:
    """Also while the last job is still on its way out, and while the controller is away."""
    finish(chain, range(2, 8))
    for away in (False, True):
        submitted.away = away
        text, going = report(chain)
        assert not going
        assert text.splitlines()[-1] == f"All stages are complete. Open {chain.folders.final}/experiment_summary.txt"
    submitted.away = False
    assert line(report(chain)[0], "train_baseline").split()[3] == "complete"


def test_controller_that_is_away(chain: Chain, submitted: FakeSlurm) -> None:
    interrupt(chain, 2, 42, 5)
    submitted.away = True
    text, going = report(chain, seconds=3)
    assert going
    assert text.startswith("SLURM does not answer (squeue gave no answer in 3 s). What follows is read from the files.\nrun tiny in ")
    assert line(text, "train_baseline").startswith("2 train_baseline 42 begun train 5/12")
    assert line(text, "train_baseline").endswith(" 12")
    assert text.splitlines()[-1] == "Next: ask again when SLURM answers: bash run_all.sh --status"


def test_jobs_that_the_queue_forgot_are_looked_up_in_the_accounts(chain: Chain, submitted: FakeSlurm) -> None:
    submitted.accounts = {"12": "TIMEOUT"}
    for job in ("12", "13"):
        del submitted.jobs[job]
    text, _ = report(chain)
    assert line(text, "train_baseline") == "2 train_baseline 42 not begun 12 TIMEOUT"
    assert line(text, "train_monotonic") == "3 train_monotonic 42 not begun 13 no longer known"
    assert submitted.said("sacct") == ["sacct -n -P -X -j 12,13 -o JobID,State"]
    submitted.refuses["sacct"] = "Slurm accounting storage is disabled"
    assert "12 no longer known" in line(report(chain)[0], "train_baseline")


def test_live_job_is_shown_before_one_that_ended(chain: Chain, submitted: FakeSlurm) -> None:
    """Submitted again by hand, with a higher number or a lower one."""
    submitted.change("12", state="FAILED", reason="NonZeroExitCode")
    for job in ("9", "100"):
        submitted.add(job, "job_2_baseline", comment=str(chain.code))
        assert f" {job} PENDING" in line(report(chain)[0], "train_baseline")
        submitted.change(job, state="CANCELLED")
    assert line(report(chain)[0], "train_baseline").endswith(" 100 CANCELLED")


def test_tasks_have_rows_of_their_own(own_folders: Path, slurm: FakeSlurm) -> None:
    chain = make_chain(small_checkout(own_folders / "checkout"), "seeds=[42, 7, 9]")
    chain.note(stages()[2], "20", [42, 9], [0, 2], by="run_all")
    slurm.add("20_0", "job_2_baseline", "TIMEOUT", "TimeLimit", comment=str(chain.code))
    text, going = report(chain)
    assert not going
    assert line(text, "train_baseline", "42") == "2 train_baseline 42 not begun 20_0 TIMEOUT (TimeLimit)"
    assert line(text, "train_baseline", "7") == "2 train_baseline 7 not begun"
    assert line(text, "train_baseline", "9") == "2 train_baseline 9 not begun 20_2 no longer known"
    assert text.splitlines()[-1].startswith("Next: read logs/job_2_baseline_20_0.out, then ")


@pytest.mark.parametrize("reason", ["JobHeldUser", "PartitionTimeLimit", "launch failed requeued held"])
def test_job_that_does_not_start_by_itself_is_named(reason: str, chain: Chain, submitted: FakeSlurm) -> None:
    submitted.change("14", reason=reason)
    last = report(chain)[0].splitlines()[-1]
    assert last == f"Next: job 14 does not start by itself ({reason}): see 'What each state means' in docs/OPERATIONS.md"
