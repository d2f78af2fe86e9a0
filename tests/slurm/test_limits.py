"""Jobs that are asked to stop, at every moment at which that can happen, and what becomes of them and of the jobs behind them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.presets import load
from stages.pipeline import run_each, stages
from tests.conftest import place
from tests.fake_stages import TINY
from tests.killing import differing, results
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout, submitted

Prepare = Callable[..., Checkout]

LONGER = ("training.steps=40", "training.validate_every=2")  # enough steps to catch a training run between two of them
BASELINE = "job_2_baseline"
NO_SIGNAL = {"SBATCH_SIGNAL": "B:CONT@1"}  # a site whose signal does nothing
LATE = """# Python runs this before anything else: the stage's waits here while the file `late` lies beside this one.
import os, sys, time
while sys.orig_argv[-2:-1] == ["job"] and os.path.exists(os.path.join(os.path.dirname(__file__), "late")):
    time.sleep(0.01)
"""

# Stages 0, 1 and 3 are complete in all that follows: stage 2 does the work, stage 4 waits for it.
fast = pytest.mark.parametrize("cluster", [{"speed": 20, "kill_wait": 600}], indirect=True, ids=["fast"])
impatient = pytest.mark.parametrize("cluster", [{"speed": 20, "kill_wait": 1}], indirect=True, ids=["impatient"])
real_clock = pytest.mark.parametrize("cluster", [{"speed": 1}], indirect=True, ids=["real_clock"])


@pytest.fixture(scope="module")
def finished(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The straight run with which the stopped ones are compared: stages 0 to 3, with longer training."""
    root = tmp_path_factory.mktemp("longer")
    shutil.copytree(finished / "scratch", root / "scratch", ignore=shutil.ignore_patterns("stage_[2-6]_*"))
    with pytest.MonkeyPatch.context() as patch:
        place(patch, root)
        config = load(TINY, LONGER)
        assert run_each(stages()[2:4], config, config.seeds, discard=False) == 0
    return root


def late(checkout: Checkout) -> Path:
    """While this file is there, no stage's Python gets to work."""
    folder = checkout.root / "start"
    folder.mkdir(exist_ok=True)
    return folder / "late"


def submit(checkout: Checkout, seeds: tuple[int, ...] = (42,), variables: dict[str, str] | None = None, **site: Any) -> dict[int, str]:
    """Submit stages 2 to 4 on the tests' site with changes; returns {stage: job}."""
    for number in seeds:
        shutil.rmtree(checkout.work / f"seed_{number}" / "stage_2_train_baseline")
    late(checkout).with_name("sitecustomize.py").write_text(LATE)
    environment = [f"export PYTHONPATH={late(checkout).parent}", *site.pop("environment", [])]
    given = yaml.safe_load((checkout.root / "tests/slurm/site.yaml").read_text()) | site | {"environment": environment}
    (checkout.root / "site.yaml").write_text(yaml.safe_dump(given))
    settings = [word for setting in LONGER for word in ("--set", setting)]
    chosen = ["--seeds", ",".join(map(str, seeds)), "--from", "2", "--to", "4"]
    said = checkout.run_all("--config", "tests/tiny.yaml", "--cluster", "site.yaml", *settings, *chosen, **variables or {})
    assert list(submitted(said)) == [2, 4]
    return submitted(said)


# --- a job's Python, held still


class Python:
    """The process of a job that does the stage ("job") or sees to its return ("requeue")."""

    def __init__(self, cluster: Cluster, job: str, work: str = "job") -> None:
        array, _, task = job.partition("_")
        self.job = job
        self.marks = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={job}"}
        self.marks |= {f"SLURM_CONF={cluster.conf}"}  # clusters of other tests number their jobs the same
        self.work, self.pid = work, 0

    def there(self) -> bool:
        for folder in () if self.pid else Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if words[1:2] == ["-c"] and words[-3:-2] == [self.work]:
                    environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                    if self.marks <= set(environment):
                        self.pid = int(folder.name)
        return bool(self.pid)

    def _status(self, key: str) -> str:
        return re.findall(rf"^{key}:\s+(\S+)", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)[0]

    def _has(self, key: str, number: signal.Signals) -> bool:
        return bool(int(self._status(key), 16) >> (number - 1) & 1)

    def listens(self) -> bool:
        return self._has("SigCgt", signal.SIGUSR1)

    def asked(self) -> bool:
        """A signal waits for the process to go on."""
        return self._has("ShdPnd", signal.SIGUSR1)

    def hold(self) -> None:
        try:
            os.kill(self.pid, signal.SIGSTOP)
            while self._status("State") != "T":
                time.sleep(0)
        except (FileNotFoundError, ProcessLookupError):
            raise AssertionError("the job's Python ended before the moment came") from None

    def go_on(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)


def always() -> bool:
    return True


@contextmanager
def held(cluster: Cluster, python: Python, moment: Callable[[], bool] = always, after: Callable[[], bool] = always) -> Iterator[None]:
    """Stop a job's Python by SIGSTOP until the end of the block: at the first look at which the moment has come.

    It is stopped for each look, which makes it slow; this begins only when `after` holds.
    """
    cluster.wait_for(python.there, 60, f"job {python.job} starts no Python")
    cluster.wait_for(after, 60, f"job {python.job} does not come so far", pause=0.002)
    python.hold()
    while not moment():
        python.go_on()
        time.sleep(0.002)
        python.hold()
    try:
        yield
    finally:
        python.go_on()


def set_limit(cluster: Cluster, job: str, minutes: int) -> None:
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def past_limit(cluster: Cluster, checkout: Checkout, job: str, times: int) -> None:
    """Let a job's time be over; SLURM sends TERM, and CONT to what is held."""
    set_limit(cluster, job, 1)
    cluster.wait_for(lambda: checkout.log(BASELINE).count("DUE TO TIME LIMIT") == times, 30, "no time limit")


def stop_before_it_listens(cluster: Cluster, checkout: Checkout, job: str) -> None:
    """Send the signal of the time limit to a job whose Python is late (`late`) and has no handler yet, and so ends of it."""
    python = Python(cluster, job)
    cluster.wait_for(python.there, 60, f"job {job} starts no Python")
    assert late(checkout).exists() and not python.listens()
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: not Path(f"/proc/{python.pid}").exists(), 20, "the signal does not end Python")


# --- moments of stage 2


def folder(checkout: Checkout) -> Path:
    return checkout.work / "seed_42/stage_2_train_baseline"


def training(checkout: Checkout, start: int) -> bool:
    """The start of this number (0: the first) has a checkpoint behind it."""
    return any(folder(checkout).glob("state/checkpoints/step_*")) and checkout.log(BASELINE).count("going on from step") >= start


def anywhere(checkout: Checkout) -> bool:
    return True


def saving(checkout: Checkout) -> bool:
    return any(folder(checkout).glob("state/checkpoints/.tmp-step_*"))


def ending(checkout: Checkout) -> bool:
    """In or after the last step, before the stage is complete."""
    return any(folder(checkout).glob("state/checkpoints/*step_00000040*")) and not (folder(checkout) / "manifest.json").exists()


def begun(cluster: Cluster, checkout: Checkout, start: int) -> float:
    """Wait for a job's start of this number; returns when that was."""
    cluster.wait_for(lambda: f"restarts {start}," in checkout.log(BASELINE), 60, f"no start number {start}")
    return time.monotonic()


def same_as_straight(checkout: Checkout, finished: Path) -> bool:
    """Weights, metrics and history equal those of the run that was never stopped, byte for byte."""
    straight = results(finished / folder(checkout).relative_to(checkout.work.parents[2]))
    assert {"metrics.jsonl", "baseline_training_history.json", "best/model.safetensors", "last/model.safetensors"} <= straight.keys()
    return differing(straight, results(folder(checkout))) == []


def waits_for(cluster: Cluster, job: str) -> str:
    """What a waiting job depends on."""
    (found,) = cluster.show("%T %r %E", "-j", job)
    state, reason, jobs = found.split()
    assert (state, reason) == ("PENDING", "Dependency")
    return jobs.replace("(unfulfilled)", "")


# --- the tests


@fast
def test_three_time_limits(cluster: Cluster, prepare: Prepare, finished: Path) -> None:
    """The script's signal before each limit, once amid a checkpoint. The fourth comes in the last step, when there is nothing to stop."""
    checkout = prepare(3)
    jobs = submit(checkout)
    for start, moment in enumerate((anywhere, saving, anywhere, ending)):
        since = begun(cluster, checkout, start)
        set_limit(cluster, jobs[2], 60)
        assert waits_for(cluster, jobs[4]) == f"afterok:{jobs[2]}"
        python = Python(cluster, jobs[2])
        with held(cluster, python, partial(moment, checkout), after=partial(training, checkout, start)):
            so_far = int((time.monotonic() - since) * cluster.speed / 60)
            set_limit(cluster, jobs[2], so_far + 11)  # the script wants its signal 10 minutes before
            cluster.wait_for(python.asked, 30, "no signal before the time limit")
    assert cluster.wait(jobs[2]) == "COMPLETED"
    cluster.wait(jobs[4], "RUNNING", "COMPLETED")
    assert same_as_straight(checkout, finished)

    (log,) = (path.read_text() for path in (checkout.root / "logs").glob(f"{BASELINE}_*"))
    assert re.findall(rf"{BASELINE}, job {jobs[2]} on \S+ restarts (\d), ends at \d", log) == ["0", "1", "2", "3"]
    assert len(re.findall("no NVIDIA GPU visible here|GPU samples: ", log)) == 4
    assert log.count("stopped in time (signal SIGUSR1, step ") == log.count(f"queued again as job {jobs[2]}\n") == 3
    assert "ends with code 0" in log.splitlines()[-1] and sorted(cluster.states()) == sorted(jobs.values())


@fast
def test_term_at_the_limit_and_too_many_restarts(cluster: Cluster, prepare: Prepare, finished: Path) -> None:
    """No signal comes before the limit. TERM finds the job on its way out, then at work; both times there is time to come back."""
    checkout = prepare(3)
    late(checkout).touch()
    jobs = submit(checkout, max_restarts=2, variables=NO_SIGNAL)
    begun(cluster, checkout, 0)
    stop_before_it_listens(cluster, checkout, jobs[2])
    late(checkout).unlink()
    with held(cluster, Python(cluster, jobs[2], "requeue")):
        past_limit(cluster, checkout, jobs[2], 1)
    begun(cluster, checkout, 1)
    set_limit(cluster, jobs[2], 60)
    with held(cluster, Python(cluster, jobs[2]), after=partial(training, checkout, 0)):
        late(checkout).touch()
        past_limit(cluster, checkout, jobs[2], 2)
    begun(cluster, checkout, 2)
    set_limit(cluster, jobs[2], 60)
    assert waits_for(cluster, jobs[4]) == f"afterok:{jobs[2]}"
    stop_before_it_listens(cluster, checkout, jobs[2])
    late(checkout).unlink()
    assert [cluster.wait(jobs[2]), cluster.wait(jobs[4])] == ["FAILED", "CANCELLED"]
    assert "restarted 2 times, as often as the cluster file allows (max_restarts)" in checkout.log(BASELINE)

    jobs = submitted(checkout.run_all("--resume", "--to", "4"))
    assert cluster.wait(jobs[2]) == "COMPLETED"
    assert "going on from step" in checkout.log(BASELINE) and same_as_straight(checkout, finished)


@fast
def test_stops_without_gain(cluster: Cluster, prepare: Prepare) -> None:
    """An array's task that is stopped twice at the same place does not start a third time. The first signal comes before any Python."""
    checkout = prepare(3, 42, 7)
    cluster.hold()
    jobs = submit(checkout, seeds=(42, 7), environment=["while [ -e slow ]; do echo a slow environment; sleep 0.1; done"])
    task, slow = f"{jobs[2]}_0", checkout.root / "slow"
    late(checkout).touch()
    cluster.call("scancel", f"{jobs[2]}_1")
    slow.touch()
    cluster.release()
    cluster.wait_for(lambda: "a slow environment" in checkout.log(BASELINE), 30, "no start")
    cluster.call("scancel", "--batch", "--signal=USR1", task)
    cluster.wait_for(lambda: "signal USR1" in checkout.log(BASELINE), 30, "no signal")
    slow.unlink()
    begun(cluster, checkout, 1)
    assert waits_for(cluster, f"{jobs[4]}_0").startswith("aftercorr:") and "recovery-train" not in checkout.log(BASELINE)
    stop_before_it_listens(cluster, checkout, task)
    assert [cluster.wait(task), cluster.wait(f"{jobs[4]}_0")] == ["FAILED", "CANCELLED"]
    log = checkout.log(BASELINE)
    assert "no work was gained since the last stop" in log and log.count(f"queued again as job {task}\n") == 1


@fast
def test_requeue_is_refused(cluster: Cluster, prepare: Prepare) -> None:
    """A job that may not be requeued is followed by another; the jobs behind it wait for that one; the restarts are counted through."""
    checkout = prepare(3)
    late(checkout).touch()
    jobs = submit(checkout, max_restarts=1)
    cluster.call("scontrol", "update", f"JobId={jobs[2]}", "Requeue=0")
    begun(cluster, checkout, 0)
    stop_before_it_listens(cluster, checkout, jobs[2])
    assert cluster.wait(jobs[2]) == "FAILED"
    (successor,) = set(cluster.states()) - set(jobs.values())
    log = checkout.log(BASELINE)
    assert "does not let a job queue itself again (scontrol: Requested operation is presently disabled" in log
    assert f"job {successor} goes on from here; the waiting jobs {jobs[4]} now wait for it" in log
    assert waits_for(cluster, jobs[4]) == f"afterok:{successor}"
    stop_before_it_listens(cluster, checkout, successor)
    assert [cluster.wait(successor), cluster.wait(jobs[4])] == ["FAILED", "CANCELLED"]
    assert "restarted 1 times, as often as the cluster file allows" in checkout.log(BASELINE) and len(cluster.states()) == 3


@fast
def test_requeue_is_forbidden_and_one_of_two_seeds_is_stopped(cluster: Cluster, prepare: Prepare, finished: Path) -> None:
    """The task that is stopped is followed by a task of the same number in another array; the other task and what waits for it go on."""
    checkout = prepare(3, 42, 7)
    late(checkout).touch()
    jobs = submit(checkout, seeds=(42, 7), requeue=False)
    assert waits_for(cluster, f"{jobs[4]}_0") == waits_for(cluster, f"{jobs[4]}_1") == f"aftercorr:{jobs[2]}_*"
    stop_before_it_listens(cluster, checkout, f"{jobs[2]}_0")
    late(checkout).unlink()
    assert cluster.wait(f"{jobs[2]}_0") == "FAILED"
    (successor,) = {job.partition("_")[0] for job in cluster.states()} - set(jobs.values())
    assert waits_for(cluster, f"{jobs[4]}_0") == f"afterok:{successor}_0"
    work = {f"{jobs[2]}_1", f"{successor}_0", f"{jobs[4]}_0", f"{jobs[4]}_1"}
    assert {cluster.wait(job) for job in work} == {"COMPLETED"}
    assert checkout.log(BASELINE).count(" min to the time limit; asked by SIGUSR1") == 2  # each knows its end
    assert cluster.states().keys() == work | {f"{jobs[2]}_0"} and same_as_straight(checkout, finished)


@fast
def test_cancelled(cluster: Cluster, prepare: Prepare) -> None:
    """A job that is cancelled stops like one at its limit, but does not come back."""
    checkout = prepare(3)
    jobs = submit(checkout)
    python = Python(cluster, jobs[2])
    with held(cluster, python, python.listens):
        cluster.call("scancel", jobs[2])
    cluster.wait_for(lambda: "ends with code 75" in checkout.log(BASELINE), 30, "the cancelled job does not end by itself")
    assert "stopped in time (signal SIG" in checkout.log(BASELINE)
    assert re.search("stopped as (CANCELLED|COMPLETING), not by the time limit: not queued again", checkout.log(BASELINE))
    assert [cluster.wait(jobs[2]), cluster.wait(jobs[4])] == ["CANCELLED", "CANCELLED"]


@real_clock
def test_deadline_without_signal(cluster: Cluster, prepare: Prepare) -> None:
    """The time of the job's end, as SLURM tells it, is enough. The site makes its jobs' time short as they begin."""
    checkout = prepare(3)
    shorten = "scontrol update JobId=$SLURM_JOB_ID EndTime=$(date -d '+10 seconds' +%FT%T)"
    jobs = submit(checkout, environment=[f'[ -z "${{SLURM_JOB_ID:-}}" ] || {shorten}'], variables=NO_SIGNAL)
    deadline = begun(cluster, checkout, 0) + 8
    set_limit(cluster, jobs[2], 60)  # the job knows its end by now: SLURM's own TERM is not to come first where Python starts slowly
    with held(cluster, Python(cluster, jobs[2]), after=lambda: training(checkout, 0) or time.monotonic() > deadline):  # the earlier
        cluster.wait_for(lambda: time.monotonic() > deadline, 10, "time stands still")
    assert cluster.wait(jobs[2], "PENDING", "COMPLETED") == "PENDING"
    assert waits_for(cluster, jobs[4]) == f"afterok:{jobs[2]}"
    assert "stopped in time (the job's time limit is near" in checkout.log(BASELINE)
    assert "asking the stage" not in checkout.log(BASELINE)


@impatient
def test_killed_at_the_limit(cluster: Cluster, prepare: Prepare, finished: Path) -> None:
    """Neither signal nor time to save, and all that waited is cancelled. Two ways to go on: --resume, and the script by hand."""
    checkout = prepare(3)
    first = submit(checkout, stages={"train_baseline": {"time": "00:01:00"}}, variables=NO_SIGNAL)
    assert [cluster.wait(first[2]), cluster.wait(first[4])] == ["TIMEOUT", "CANCELLED"]

    second = submitted(checkout.run_all("--resume", "--to", "4", **NO_SIGNAL))
    set_limit(cluster, second[2], 60)
    with held(cluster, Python(cluster, second[2]), after=partial(training, checkout, 0)):
        past_limit(cluster, checkout, second[2], 2)
    assert [cluster.wait(second[2]), cluster.wait(second[4])] == ["TIMEOUT", "CANCELLED"]

    third = checkout.type("sbatch", "--parsable", "jobs/job_2_baseline.sh").strip()
    cluster.wait_for(lambda: "job_7_aggregate" in cluster.show("%j"), 60, "the job submitted by hand does not repair the chain")
    (last,) = cluster.show("%i", "-n", "job_4_evaluate")
    cluster.call("scancel", "-n", "job_5_uat,job_6_hotflip")
    assert waits_for(cluster, last) == f"afterok:{third}"
    assert cluster.wait(third) == "COMPLETED"
    cluster.wait(last, "RUNNING", "COMPLETED")
    assert "going on from step" in checkout.log(BASELINE) and same_as_straight(checkout, finished)
