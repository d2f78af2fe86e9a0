"""metrics.jsonl of a training run."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from utils.run.errors import InputError
from utils.run.records import Row, json_line, read_rows
from utils.training.boards import Board, no_board
from utils.training.checkpoint import TrainState
from utils.training.guard import GOOD, NAMES, stop_if_lost


class MetricsLog:
    """One row a step and one a validation, without clock times, so that resumed and straight runs agree."""

    def __init__(self, path: Path, size: int, board: Board = no_board) -> None:
        self.board = board
        self.waiting: list[tuple[int, float, Tensor]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise InputError(f"{path}: found {found} bytes, expected at least {size}; it was cut, start the stage again with --discard")
        self.handle = path.open("ab")
        self.handle.truncate(size)

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
        self.handle.write(json_line(row).encode())
        self.board(row)

    def close(self) -> None:
        self.handle.close()

    def sync(self) -> int:
        """Bring the file to the disk; returns its size in bytes."""
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return os.fstat(self.handle.fileno()).st_size


def _number(value: float) -> float | None:
    """Strict JSON has no NaN."""
    return value if math.isfinite(value) else None


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """(rows of steps, rows of validations)."""
    rows = read_rows(path)
    return [row for row in rows if "validation_nll" not in row], [row for row in rows if "validation_nll" in row]
