"""What SLURM and our job scripts cost: `python -m tests.benchmarks.slurm_overhead`. Needs an idle machine and a SLURM installation.

A real cluster on this machine with the real clock. The alternative to a chain of eight jobs is the same experiment in one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import Cluster, running
from tests.slurm.conftest import Checkout, make_checkout

LONG = ["--set", "training.steps=20000", "--set", "training.validate_every=20000"]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, running(speed=1) as cluster:
        revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        print(f"{cluster.call('sbatch', '--version').strip()}, {os.cpu_count()} cores, commit {revision}")
        checkout = make_checkout(Path(folder, "checkout"), cluster, Path(folder))
        local = Checkout(checkout.root, checkout.environment | {"SCRATCH": f"{folder}/local", "PROJECT": f"{folder}/local"})
        began = time.monotonic()
        local.run_all("--local", "--config", "tests/tiny.yaml")
        report("the tiny experiment in one process", time.monotonic() - began)
        began = time.monotonic()
        checkout.submit()
        report("run_all.sh: checks, snapshot and eight submissions", time.monotonic() - began)
        await_(lambda: set(cluster.states().values()) == {"COMPLETED"})
        report("the same as a chain of eight jobs on an idle cluster", time.monotonic() - began)
        began = time.monotonic()
        checkout.submit()
        report("run_all.sh again, nothing to do", time.monotonic() - began)
        began = time.monotonic()
        checkout.run_all("--status")
        report("run_all.sh --status", time.monotonic() - began)
        one_job(cluster, checkout)
    return 0


def one_job(cluster: Cluster, checkout: Checkout) -> None:
    """A training job: start, signal, return."""
    checkout.submit("--to", "2", "--run-name", "long", *LONG)
    job = [name for name, state in cluster.states().items() if state != "COMPLETED"][-1]
    state = checkout.work.with_name("long") / "seed_42/stage_2_train_baseline/state"
    await_(lambda: cluster.states()[job] == "RUNNING")
    began = time.monotonic()
    await_(lambda: (state / "progress.json").exists())
    report("job start to first step", time.monotonic() - began)
    time.sleep(2)
    began = time.monotonic()
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    await_(lambda: "queued again" in checkout.log("job_2_baseline"))
    report("signal to saved, stopped and queued again", time.monotonic() - began)
    reported = (state / "progress.json").stat().st_mtime_ns
    began = time.monotonic()
    await_(lambda: cluster.states()[job] == "RUNNING")
    report("queued again to running (SLURM's own wait)", time.monotonic() - began)
    began = time.monotonic()
    await_(lambda: (state / "progress.json").stat().st_mtime_ns != reported)
    report("running again to first new step", time.monotonic() - began)
    cluster.call("scancel", job)


def await_(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the cluster did not get there")
        time.sleep(0.02)


def report(name: str, seconds: float) -> None:
    print(f"{name:<56} {seconds:7.2f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
