"""telemetry.jsonl: what depends on the clock and on the machine. Everything that does not is in metrics.jsonl.

It lies beside metrics.jsonl and is not one of the stage's declared outputs: those are digested, and the digests are the identity of the
stages behind. Two runs that differ in nothing but the moment must have the same digests, so no later stage may read this file, and
whoever compares runs leaves it out. For the same reason a damaged or missing one is no fault of the stage.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from utils.run.records import Row, json_line, whole_lines
from utils.training.boards import Board
from utils.training.run import Run
from utils.training.throughput import flops_per_token, peak_flops

NAME = "telemetry.jsonl"
GIB = 2**30


class Telemetry:
    """Appends a row at each flush of the metrics and one at each validation, over all starts. It never makes the host wait for the device.

    Steps that a killed start had made after its last checkpoint are there twice: the time was spent twice. `start` tells them apart.
    """

    def __init__(self, run: Run, path: Path | None, step: int, seconds: float, board: Board) -> None:
        """Go on after `seconds` of training in earlier starts. A line that a killed process left torn is cut. No path: nothing is kept."""
        self.run, self.board, self.step, self.earlier = run, board, step, seconds
        self.began = self.last = time.monotonic()
        self.stall: float | None = None
        self.handle = None
        self.flops = flops_per_token(run.model, run.train.length) * run.tokens_per_step
        self.peak = peak_flops(run.device, run.precision)
        self.card = _card_readings(run.device) if path else dict
        if path is not None:
            lines = whole_lines(path)
            self.place: Row = {"start": 1 + lines[-1][1].get("start", 0) if lines else 1, "host": socket.gethostname()}
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = path.open("ab")
            self.handle.truncate(sum(len(line) for line, _ in lines))

    @property
    def seconds(self) -> float:
        """Of training, over all starts up to the last checkpoint and in this one."""
        return self.earlier + time.monotonic() - self.began

    def steps(self, step: int) -> None:
        """Note the steps since the last row. Call it where the host has just waited for them, else the rate is that of the host."""
        now = time.monotonic()
        gained, passed = step - self.step, now - self.last
        self.step, self.last = step, now
        if self.handle is None or not gained:
            return
        rate = gained / passed if passed > 0 else math.nan
        flops = rate * self.flops
        row: Row = {
            "tokens_per_second": rate * self.run.tokens_per_step,
            "tflops_per_second": flops / 1e12,
            "model_flop_utilisation": flops / (self.peak * self.run.world.size) if self.peak else None,
        }
        if self.stall is not None:
            row["checkpoint_stall_seconds"], self.stall = self.stall, None
        self._write(row | _memory(self.run.device) | self.card())

    def validation(self, nll: float) -> None:
        """Note a validation that has just ended; the next steps are counted from here."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        self._write({"validation_seconds": passed, "validation_nll": nll})

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Take the seconds that a checkpoint keeps the loop; they are told with the next steps."""
        began = time.monotonic()
        yield
        self.stall = time.monotonic() - began

    def _write(self, row: Row) -> None:
        if self.handle is None:
            return
        known = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        told = {"step": self.step, "tokens": self.step * self.run.tokens_per_step, "seconds": self.seconds} | known
        self.handle.write(json_line(told | self.place).encode())
        self.handle.flush()
        self.board(told)

    def close(self) -> None:
        if self.handle is not None:
            os.fsync(self.handle.fileno())
            self.handle.close()


def _memory(device: torch.device) -> Row:
    """GiB of the device, as its allocator counts them on the host; the peak is that of this start."""
    if device.type != "cuda":
        return {}
    return {
        "memory_allocated_gib": torch.cuda.memory_allocated(device) / GIB,
        "memory_reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        "memory_peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }


def _card_readings(device: torch.device) -> Callable[[], Row]:
    """Asks the driver for utilisation and power; finds nothing where the package nvidia-ml-py or the driver's library is missing."""

    def asked() -> Row:
        return {"gpu_utilisation_percent": torch.cuda.utilization(device), "gpu_power_watts": torch.cuda.power_draw(device) / 1e3}

    with suppress(Exception):  # the package's errors are kinds of its own, and the readings are no reason to stop
        if device.type == "cuda" and asked():
            return asked
    return dict
