"""Start the processes of a stage that takes several GPUs, and hand them the request to stop.

The stage's own process keeps the books (lock, manifest, results) and touches no GPU meanwhile.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from utils.run.artifacts import TEMPORARY, remove, write_text
from utils.run.environment import number
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.preemption import SIGNALS, Stop, die_with_parent
from utils.run.trouble import explained

RUN = "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
POLL_SECONDS = 0.2
PATIENCE = 30.0  # seconds that the others get when one has crashed: to say why, if they know
WHEN_TOLD = 2.0  # seconds that they get when one has said why: on a GPU they wait for it, and would for ever
CRASHED = 70  # exit code of a launched process that ends with an error which nobody has words for
TAIL = 2000  # characters of a failed process's output that are shown
PLACES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))  # torchrun's, srun's


class StopFile(Stop):
    """The request to stop, as a file that the stage's process writes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def requested(self) -> bool:
        if self.reason is None and self.path.exists():
            self.reason = self.path.read_text(encoding="utf-8").strip() or "asked to stop"
        return super().requested()


def place() -> tuple[int, int, int]:
    """(rank, number of processes, number on this node) as torchrun or srun say."""
    for names in PLACES:
        if all(name in os.environ for name in names):
            rank, size, local = map(number, names)
            return rank, size, local
    raise InputError(f"found neither {', '.join(PLACES[0])} nor {', '.join(PLACES[1])} in the environment; start with torchrun or srun")


def of_several(work: Callable[[], None]) -> int:
    """Do the work of one launched process; returns its exit code. Signals are for the stage's process, which asks through a file."""
    die_with_parent()
    if os.environ.get("LAUNCHED_BY", str(os.getppid())) != str(os.getppid()):
        return FAILED  # it died before, and its successor may be at work
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    try:
        work()
    except StoppedInTime as reason:
        print(f"  {reason}", flush=True)
        return STOPPED
    except (InputError, WorkFailed) as error:
        print(f"  {error}", file=sys.stderr, flush=True)
        return REFUSED if isinstance(error, InputError) else FAILED
    except Exception as error:
        if (words := explained(error, None)) is None:
            raise
        print(f"  {words}", file=sys.stderr, flush=True)
        return FAILED
    return DONE


def end_of_several(work: Callable[[], None]) -> NoReturn:
    """Do the work of one launched process, and end it. After a failure at once: libraries would wait for the others, who wait for it."""
    code = CRASHED
    try:
        code = of_several(work)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (DONE, STOPPED):
        os._exit(code)
    sys.exit(code)


def launch(module: str, arguments: Sequence[str], count: int, state: Path, stop: Stop) -> None:
    """Run the module with these arguments in `count` processes a node, until all have ended; their output goes to state/process_*.log.

    On one node the processes are started here; on several nodes of a SLURM job by srun. Raises StoppedInTime if they stopped in time,
    WorkFailed with the end of its output if one of them failed, InputError likewise if it was refused.
    """
    state.mkdir(parents=True, exist_ok=True)
    remove(state / "stop")
    code = str(Path(__file__).resolve().parents[2])  # not the folder that we stand in: a job's code is a frozen copy
    with ExitStack() as stack:
        commands = _commands([sys.executable, "-c", RUN, code, module, *arguments], count)
        logs = [state / f"process_{number}.log" for number in range(len(commands))]
        children = []
        for (command, environment), log in zip(commands, logs, strict=True):
            output = None if log is logs[0] else stack.enter_context(log.open("wb"))  # the first one speaks for all
            children.append(subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output))
            stack.callback(_end, children[-1])
        codes, failed = _wait(children, state / "stop", stop)
    if failed:
        first = min(failed, key=lambda child: not _told(codes[child]))
        told = logs[first].read_text(errors="replace")[-TAIL:] if first else "its messages are above"
        words = f"process {first} of {len(codes)} ended with code {codes[first]}: {told.strip()}"
        raise InputError(words) if codes[first] == REFUSED else WorkFailed(words)
    if STOPPED in codes:
        raise StoppedInTime(stop.reason or "the processes were asked to stop")


def _commands(command: list[str], count: int) -> list[tuple[list[str], dict[str, str]]]:
    """What to start, with what in the environment: one line for each process, or one srun for all of them."""
    meeting = {"MASTER_PORT": str(_free_port())}
    nodes = number("SLURM_JOB_NUM_NODES", 1)
    if nodes > 1:
        share = max(1, number("SLURM_CPUS_ON_NODE", 1) // count)
        tasks = [f"--nodes={nodes}", f"--ntasks={nodes * count}", f"--ntasks-per-node={count}", f"--cpus-per-task={share}"]
        return [(["srun", *tasks, "--kill-on-bad-exit=1", "--label", *command], meeting | {"MASTER_ADDR": socket.gethostname()})]
    meeting |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count), "LAUNCHED_BY": str(os.getpid())}
    return [(command, meeting | {"RANK": str(number), "LOCAL_RANK": str(number)}) for number in range(count)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait(children: Sequence[subprocess.Popen[bytes]], request: Path, stop: Stop) -> tuple[list[int], list[int]]:
    """(exit codes of all, numbers of those that failed, the first one first); once one has failed, the others are ended."""
    failed: list[int] = []
    waited = 0.0
    while True:
        ended = all(child.poll() is not None for child in children)
        failed += [number for number, child in enumerate(children) if number not in failed and _failed(child)]
        told = any(_told(int(children[number].returncode)) for number in failed)
        soon = told and not any(request.parent.rglob(f"{TEMPORARY}*"))  # a checkpoint that one of them is writing is worth some patience
        if ended or waited >= (WHEN_TOLD if soon else PATIENCE):
            break
        if stop.requested() and not request.exists():
            write_text(request, stop.reason or "")
        waited += POLL_SECONDS if failed else 0.0
        time.sleep(POLL_SECONDS)
    for child in children:
        _end(child)
    return [int(child.returncode) for child in children], failed


def _failed(child: subprocess.Popen[bytes]) -> bool:
    return child.poll() not in (None, DONE, STOPPED)


def _told(code: int) -> bool:
    """Whether a failed process left by itself with a message. One that only lost the others crashes, or is ended by a signal."""
    return code >= 0 and code != CRASHED


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()
