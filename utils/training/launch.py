"""Start the processes of a training run that takes several GPUs, and hand them the request to stop.

The stage's own process keeps the books (lock, manifest, final model) and touches no GPU meanwhile.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from configs.schema import Compute
from utils.run.artifacts import remove, write_text
from utils.run.environment import number
from utils.run.errors import DONE, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.preemption import Stop

POLL_SECONDS = 0.2
PATIENCE = 30.0  # seconds that the others get when one has failed: to say why, if they know
TAIL = 2000  # characters of a failed process's output that are shown


class StopFile(Stop):
    """The request to stop, as a file that the stage's process writes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def requested(self) -> bool:
        if self.reason is None and self.path.exists():
            self.reason = self.path.read_text(encoding="utf-8").strip() or "asked to stop"
        return super().requested()


def launch(module: str, arguments: Sequence[str], compute: Compute, state: Path, stop: Stop) -> None:
    """Run `python -m module arguments` once for each GPU, until all have ended; their output goes to state/process_*.log.

    On one node the processes are started here; on several nodes of a SLURM job by srun. Raises StoppedInTime if they stopped in time,
    WorkFailed with the end of its output if one of them failed.
    """
    state.mkdir(parents=True, exist_ok=True)
    remove(state / "stop")
    with ExitStack() as stack:
        commands = _commands([sys.executable, "-m", module, *arguments], compute)
        logs = [state / f"process_{number}.log" for number in range(len(commands))]
        children = []
        for (command, environment), log in zip(commands, logs, strict=True):
            output = None if log is logs[0] else stack.enter_context(log.open("wb"))  # the first one speaks for all
            children.append(subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output))
            stack.callback(_end, children[-1])
        codes = _wait(children, state / "stop", stop)
    failed = [number for number, code in enumerate(codes) if code not in (DONE, STOPPED)]
    if failed:
        # the one that knows why left by itself with a message; those that only lost the others were ended by a signal
        number = min(failed, key=lambda number: (codes[number] < 0, number))
        told = logs[number].read_text(errors="replace")[-TAIL:] if number else "its messages are above"
        raise WorkFailed(f"process {number} of {len(codes)} ended with code {codes[number]}: {told.strip()}")
    if STOPPED in codes:
        raise StoppedInTime(stop.reason or "the processes were asked to stop")


def _commands(command: list[str], compute: Compute) -> list[tuple[list[str], dict[str, str]]]:
    """What to start, with what in the environment: one line for each process, or one srun for all of them."""
    count = compute.processes or torch.cuda.device_count()
    if count < 1:
        raise InputError(f"compute.parallel={compute.parallel}: found no GPU, expected some; ask for them, or set compute.processes")
    meeting = {"MASTER_PORT": str(_free_port())}
    nodes = number("SLURM_JOB_NUM_NODES", 1)
    if nodes > 1:
        share = max(1, number("SLURM_CPUS_ON_NODE", 1) // count)
        tasks = [f"--nodes={nodes}", f"--ntasks={nodes * count}", f"--ntasks-per-node={count}", f"--cpus-per-task={share}"]
        return [(["srun", *tasks, "--kill-on-bad-exit=1", "--label", *command], meeting | {"MASTER_ADDR": socket.gethostname()})]
    meeting |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count)}
    return [(command, meeting | {"RANK": str(number), "LOCAL_RANK": str(number)}) for number in range(count)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait(children: Sequence[subprocess.Popen[bytes]], request: Path, stop: Stop) -> list[int]:
    """Exit codes of all; once one has failed, the others are ended."""
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if stop.requested() and not request.exists():
            write_text(request, stop.reason or "")
        if any(child.poll() not in (None, DONE, STOPPED) for child in children):
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at >= PATIENCE:
                for child in children:
                    _end(child)
        time.sleep(POLL_SECONDS)
    return [int(child.returncode) for child in children]


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()
