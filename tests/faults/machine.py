"""A process in which stages meet a faulty machine: python -m tests.faults.machine, with machine.c preloaded; one JSON request a line.

Every stage runs in a fork of it, which spares the import of torch. A request says `root`, where the run's folders are, `stage`, `pipeline`
(real or fake), `log`, and the faults: see `Faults`. The answer is a JSON line: `code` (negative: the signal that ended it, SIGALRM: it
hung), and what it came to: `operations` on the disk that need room, `looks` at the clock, `products` by torch, and bytes of address space
at the beginning (`idle`) and at most (`memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.presets import load
from stages.pipeline import stages
from tests import fake_stages
from tests.killing import place, waited
from utils.run import artifacts, stage
from utils.run.preemption import Stop
from utils.run.stage import Stage, run_stage

PATIENCE = 600.0  # seconds after which a stage is said to hang
NEVER = 2**62
HEAVY: tuple[str, ...] = (
    "torch",
    "transformers",
    "utils.models.convert",
    "utils.report.page",
    "utils.training.recovery",
    "utils.data.tokenise",
)
HEAVY += tuple(f"utils.{name}" for name in ("attacks.flip_study", "attacks.trigger_study", "evaluation.generation", "evaluation.order"))


@dataclass(frozen=True)
class Faults:
    """Numbers count from 1; 0 is never."""

    disk_at: int = 0  # the first operation below the run's folders that fails, with this error
    disk_until: int = NEVER
    error: int = 0
    slow: int = 0  # microseconds that every operation takes more
    jump_at: int = 0  # the look at the clock from which on it is so many seconds ahead
    jump: int = 0
    memory: int = 0  # bytes of address space that the process may have
    device_at: int = 0  # the product of matrices that raises this: memory or lost
    device: str = ""
    ends_in: int = 0  # seconds to the end of the job that this is
    planted: str = ""  # a fault of the program


def ended(root: Path, number: int, pipeline: str, log: Path, faults: Faults) -> dict[str, Any]:
    """Run a stage in a fork and say what became of it."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _run(root, number, pipeline, log, answer, faults)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    ending = waited(child, PATIENCE)
    return (json.loads(answer.read_text()) if answer.exists() else {}) | {"code": ending}


def _run(root: Path, number: int, pipeline: str, log: Path, answer: Path, faults: Faults) -> int:
    place(root)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout = sys.stderr = os.fdopen(sink, "w", buffering=1)
    if faults.ends_in:
        os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + faults.ends_in)
    _plant(faults.planted)
    config = load(fake_stages.TINY)
    chosen: tuple[Stage, ...] = stages() if pipeline == "real" else fake_stages.PIPELINE
    products = _device(faults) if pipeline == "real" else [0]
    stop, idle = Stop(), _bytes("VmSize")
    if faults.memory:
        resource.setrlimit(resource.RLIMIT_AS, (faults.memory, faults.memory))
    machine = ctypes.CDLL(None)
    machine.machine_plan.argtypes = [ctypes.c_char_p, *[ctypes.c_long] * 6]
    machine.machine_plan(
        os.fsencode(root), faults.disk_at, faults.disk_until, faults.error, faults.slow, faults.jump_at or NEVER, faults.jump
    )
    code = run_stage(chosen[number], config, config.seeds[0], chosen, stop)
    facts = {"operations": machine.machine_operations(), "looks": machine.machine_looks(), "products": products[0]}
    machine.machine_plan(b"", 0, 0, 0, 0, 0, 0)
    answer.write_text(json.dumps(facts | {"idle": idle, "memory": _bytes("VmPeak")}))
    return code


def _device(faults: Faults) -> list[int]:
    """Count the products of matrices; from number `device_at` on each fails as on a GPU that is full, or gone."""
    import torch
    from torch.nn import functional

    count, real = [0], functional.linear

    def product(*given: Any, **named: Any) -> torch.Tensor:
        count[0] += 1
        if faults.device_at and count[0] >= faults.device_at:
            if faults.device == "memory":
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.02 GiB is free."
                )
            raise torch.AcceleratorError(
                "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported at some other API call, "
                "so the stacktrace below might be incorrect."
            )
        return real(*given, **named)

    functional.linear = product
    return count


def _bytes(name: str) -> int:
    """A number that the kernel tells of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def _plant(fault: str) -> None:
    if fault == "no words":
        stage.explained = lambda error, folder: None
    elif fault == "in place":

        @contextlib.contextmanager
        def published(path: Path, near: Path | None = None) -> Any:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

        artifacts.published = published


def main() -> int:
    for name in HEAVY if sys.argv[1:] == ["real"] else ():
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        faults = Faults(**asked.get("faults", {}))
        answer = ended(Path(asked["root"]), asked["stage"], asked["pipeline"], Path(asked["log"]), faults)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
