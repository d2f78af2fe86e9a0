"""metrics.jsonl of a training run."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from utils.run.artifacts import make_folder, sync
from utils.run.errors import InputError
from utils.run.records import Row, json_line, read_rows
from utils.training.boards import Board, no_board
from utils.training.checkpoint import TrainState
from utils.training.guard import GOOD, NAMES, stop_if_lost

CURE = "put a copy of it back, or start the stage again with --discard"


class MetricsLog:
    """One row a step and one a validation, without clock times, so that resumed and straight runs agree."""

    def __init__(self, path: Path, size: int, board: Board = no_board, sha256: str = "") -> None:
        """Go on after the first `size` bytes, which have this checksum if one is given."""
        self.board = board
        self.waiting: list[tuple[int, float, Tensor]] = []
        make_folder(path.parent)
        there = path.read_bytes()[:size] if path.exists() else b""
        if len(there) < size:
            raise InputError(f"{path}: found {len(there)} bytes, expected at least {size}; it was cut: {CURE}")
        self.digest = hashlib.sha256(there)
        if sha256 and self.digest.hexdigest() != sha256:
            raise InputError(f"{path}: differs from its checksum in the newest checkpoint; it was damaged: {CURE}")
        self.handle = path.open("ab")
        self.handle.truncate(size)
        sync(path.parent)  # a checkpoint must not outlive its metrics

    def add(self, step: int, rate: float, values: Tensor) -> None:
        """Remember what a step gave, without waiting for it."""
        self.waiting.append((step, rate, values))

    def flush(self, tokens_per_step: int, state: TrainState, max_bad_steps: int) -> str:
        """Write the waiting steps and count the skipped ones. Raises WorkFailed when too many in a row were skipped."""
        if not self.waiting:
            return ""
        table = torch.stack([values for _, _, values in self.waiting]).tolist()
        for (step, rate, _), (loss, cross_entropy, divergence, norm, judged) in zip(self.waiting, table, strict=True):
            verdict = int(judged)
            layerwise = math.isfinite(loss) and math.isnan(cross_entropy)
            self.write(
                {
                    "step": step + 1,
                    "tokens": (step + 1) * tokens_per_step,
                    **({"layerwise_loss": loss} if layerwise else {}),
                    "loss": None if layerwise else _number(loss),
                    "cross_entropy": _number(cross_entropy),
                    "divergence": _number(divergence),
                    "learning_rate": rate,
                    "gradient_norm": _number(norm),
                    **({"skipped": NAMES[verdict]} if verdict != GOOD else {}),
                }
            )
            state.skipped += verdict != GOOD
            state.bad_in_a_row = state.bad_in_a_row + 1 if verdict != GOOD else 0
            stop_if_lost(state.bad_in_a_row, max_bad_steps, step + 1, verdict, rate, loss, norm)
        self.waiting.clear()
        return f"loss {loss:.4f}" + (f", {state.skipped} steps skipped" if state.skipped else "")

    def write(self, row: Row) -> None:
        line = json_line(row).encode()
        self.handle.write(line)
        self.digest.update(line)
        self.board(row)

    def close(self) -> None:
        self.handle.close()

    def sync(self) -> tuple[int, str]:
        """Bring the file to the disk; returns its size in bytes and its SHA-256."""
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return os.fstat(self.handle.fileno()).st_size, self.digest.hexdigest()


def _number(value: float) -> float | None:
    """Strict JSON has no NaN."""
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """(rows of steps, rows of validations)."""
    rows = read_rows(path)
    return [row for row in rows if "validation_nll" not in row], [row for row in rows if "validation_nll" in row]
