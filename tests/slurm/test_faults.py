"""Things that go wrong between submission and summary, and how a chain goes on: always by `bash run_all.sh --resume`."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout, submitted

RESUME = "submit what is missing: bash run_all.sh --resume"
NOTHING = "nothing to submit"
THROTTLE = "JobSubmitPlugins=throttle\nSchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,jobs_per_user_per_hour=3\n"


def test_one_seed_of_three_fails(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """An input is damaged while the array waits: its task fails, the others do not, and the report is partial; after the repair that task
    alone is done again, and the report."""
    checkout = prepare(5, 42, 7, 9)
    cluster.hold()
    jobs = submitted(checkout.submit("--seeds", "42,7,9"))
    model = checkout.work / "seed_7/stage_2_train_baseline/best/model.safetensors"
    intact = model.read_bytes()
    model.write_bytes(bytes(len(intact)))
    cluster.release()
    assert cluster.wait(jobs[7]) == "COMPLETED"
    assert [cluster.wait(f"{jobs[6]}_{task}") for task in range(3)] == ["COMPLETED", "FAILED", "COMPLETED"]
    log = checkout.log(f"job_6_hotflip_{jobs[6]}_1".removesuffix(f"_{jobs[6]}_1"))
    assert "the input 'baseline_model' is damaged: " in log and "differs from its SHA-256 checksum" in log
    assert "the stage ended with code 2. Jobs that wait for it are cancelled by SLURM." in log
    assert "when the cause is gone: bash run_all.sh --resume" in log
    said = checkout.run_all("--status")
    assert re.search(rf"6 hotflip +7 .* {jobs[6]}_1 +FAILED \(NonZeroExitCode\)\n", said)
    assert re.search(rf"7 aggregate +all +partial .* {jobs[7]} +COMPLETED", said)
    (summary,) = checkout.work.parents[2].glob("project/*/tiny/experiment_summary.txt")
    assert "PARTIAL REPORT: of 3 seeds 7 are not complete (see Absent)." in summary.read_text()
    assert said.endswith(f"Next: read logs/job_6_hotflip_{jobs[6]}_1.out, then {RESUME}\n")

    model.write_bytes(intact)
    said = checkout.run_all("--resume")
    again = submitted(said)
    assert list(again) == [6, 7] and f"  job {again[6]}: stage 6 hotflip, seeds 7\n" in said
    assert cluster.wait(again[7]) == "COMPLETED" and cluster.states()[f"{again[6]}_1"] == "COMPLETED"
    assert "PARTIAL" not in summary.read_text()
    assert f"{again[6]}_0" not in cluster.states() and NOTHING in checkout.run_all("--resume")


def test_cancelled_then_crashed(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """scancel of a running job ends the chain, --resume submits exactly that; when the node dies SLURM queues the job again."""
    checkout = prepare(5)

    def at_work(job: str, starts: int) -> None:
        begun = "flip tokens greedily"
        cluster.wait_for(lambda: checkout.log("job_6_hotflip").count(begun) == starts, 180, f"job {job} does not begin")

    jobs = submitted(checkout.submit())
    at_work(jobs[6], 1)
    cluster.call("scancel", jobs[6])
    assert [cluster.wait(jobs[6]), cluster.wait(jobs[7])] == ["CANCELLED", "CANCELLED"]
    assert checkout.run_all("--status").endswith(f"Next: {RESUME}\n")

    jobs = submitted(checkout.run_all("--resume"))
    assert list(jobs) == [6, 7]
    at_work(jobs[6], 2)
    (node,) = cluster.show("%N", "-j", jobs[6])
    cluster.crash(node)
    at_work(jobs[6], 3)
    assert cluster.show("%N", "-j", jobs[6]) != [node] and cluster.states()[jobs[7]] == "PENDING"
    assert cluster.wait(jobs[7]) == "COMPLETED" and cluster.states()[jobs[6]] == "COMPLETED"
    assert f"job {jobs[6]} on " in checkout.log("job_6_hotflip") and "restarts 1," in checkout.log("job_6_hotflip")


def test_waiting_task_cancelled(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """One task of an array is cancelled before it began: --resume submits it alone, and what waits for it waits for the new one."""
    checkout = prepare(1, 42, 7, 9)
    cluster.hold()
    old = submitted(checkout.submit("--seeds", "42,7,9"))
    assert len(cluster.show("%i")) == 16
    cluster.call("scancel", f"{old[3]}_1")
    cluster.wait_for(lambda: len(cluster.show("%i")) == 15, 30, "the task stays")
    assert checkout.run_all("--status").endswith(f"Next: {RESUME}\n")
    said = checkout.run_all("--resume")
    new = submitted(said)
    assert list(new) == [3] and cluster.show("%i %E", "-j", new[3]) == [f"{new[3]}_1 (null)"]
    assert f"waiting jobs {old[4]}_1, {old[5]}_1, {old[6]}_1 now wait for these" in said
    for stage in (4, 5, 6):
        others = f"aftercorr:{old[2]}_*(unfulfilled),aftercorr:{old[3]}_*(unfulfilled)"
        waits = dict(line.split() for line in cluster.show("%i %E", "-j", old[stage]))
        this = f"afterok:{old[2]}_1(unfulfilled),afterok:{new[3]}_1(unfulfilled)"
        assert waits == {f"{old[stage]}_{task}": this if task == 1 else others for task in range(3)}
    assert f"{NOTHING}: 6 complete, 16 queued or running" in checkout.run_all("--resume")


@pytest.mark.parametrize("cluster", [{"extra": THROTTLE}], indirect=True)
def test_refused_half_way(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """A limit of submissions an hour hits in the middle. What is there stays and can run; the controller starts anew; the rest follows."""
    checkout = prepare(5)
    cluster.hold()
    said = checkout.submit(code=1)
    jobs = submitted(said)
    assert list(jobs) == [6] and cluster.show("%i %E") == [f"{jobs[6]} (null)"]
    assert "SLURM refused: sbatch: sbatch: error: Reached jobs per hour limit" in said
    assert "What is listed above stays: it is the beginning of a chain, and waits for nothing that is missing." in said
    assert "When the cause is gone, submit the rest: bash run_all.sh --resume" in said
    assert checkout.run_all("--status").endswith(f"Next: {RESUME}\n")

    cluster.conf.write_text(cluster.conf.read_text().replace(THROTTLE, ""))
    cluster.stop_controller()
    cluster.start_controller()  # the partitions are up again
    said = checkout.run_all("--resume")
    assert list(submitted(said)) == [7] and f"stage 7 aggregate, afterok:{jobs[6]}\n" in said
    assert cluster.wait(submitted(said)[7]) == "COMPLETED" and cluster.states()[jobs[6]] == "COMPLETED"


@pytest.mark.parametrize("cluster", [{"extra": "MessageTimeout=2\n"}], indirect=True)
def test_controller_away_and_lost(cluster: Cluster, prepared: Checkout) -> None:
    """Without the controller the files tell; when it has forgotten everything, other users' jobs with our numbers are not ours."""
    cluster.hold()
    old = submitted(prepared.submit())
    began = time.monotonic()
    prepared.run_all("--status")
    answered = time.monotonic()
    cluster.stop_controller(signal.SIGKILL)
    away = time.monotonic()
    said = prepared.run_all("--status")
    assert time.monotonic() - away < 15 + (answered - began)  # what the command itself takes on a busy machine is no waiting
    assert said.startswith("SLURM does not answer (squeue: ") and said.endswith(
        "Next: ask again when SLURM answers: bash run_all.sh --status\n"
    )
    assert re.search(rf"1 monotonicity +42 +complete .*\n +2 train_baseline +42 +not begun .* {old[2]}\n", said)
    said = prepared.submit("--run-name", "other", code=1)
    assert "nothing was submitted: squeue: " in said and "Unable to contact slurm controller" in said
    assert not (prepared.work.parent / "other/submission/jobs.json").exists()

    shutil.rmtree(cluster.folder / "state")
    (cluster.folder / "state").mkdir()
    cluster.start_controller()
    foreign = ["sbatch", "--hold", "--job-name=job_2_baseline", f"--chdir={cluster.folder}", "--wrap=true"]
    while not set(old.values()) & set(cluster.states()):
        cluster.call(*foreign)
    cluster.hold()
    others = cluster.show("%i")
    said = prepared.run_all("--status")
    assert said.count("no longer known") == 6 and said.endswith(f"Next: {RESUME}\n")
    new = submitted(prepared.run_all("--resume"))
    assert list(new) == [2, 3, 4, 5, 6, 7]
    assert sorted(cluster.show("%i")) == sorted([*others, *new.values()])
    assert cluster.show("%E", "-j", new[4]) == [f"afterok:{new[2]}(unfulfilled),afterok:{new[3]}(unfulfilled)"]
    assert prepared.run_all("--status").count("PENDING") == 6


def test_log_folder(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """By hand before any run: told what to type. A removed log folder is made by run_all.sh; removed later, --status explains."""
    checkout = prepare(6)
    by_hand = checkout.type("sbatch", "--parsable", "jobs/job_7_aggregate.sh").strip()
    assert cluster.wait(by_hand) == "FAILED"
    assert "type 'bash run_all.sh' there first" in checkout.log("job_7_aggregate")
    shutil.rmtree(checkout.root / "logs")
    cluster.hold()
    jobs = submitted(checkout.submit())
    assert list(jobs) == [7]
    shutil.rmtree(checkout.root / "logs")
    cluster.release()
    assert cluster.wait(jobs[7]) == "FAILED" and cluster.show("%r", "-t", "all", "-j", jobs[7]) == ["JobLaunchFailure"]
    for command in ("--status", "--resume"):
        said = checkout.run_all(command, code=None)
        assert "logs/newest_submission" in said and "--run-name NAME" in said
    said = checkout.run_all("--status", "--run-name", "tiny")
    assert " FAILED (JobLaunchFailure)" in said and "a job found no folder for its log (mkdir logs)" in said
    again = submitted(checkout.run_all("--resume", "--run-name", "tiny"))
    assert cluster.wait(again[7]) == "COMPLETED"
    assert checkout.run_all("--status").splitlines()[-1].startswith("All stages are complete.")
