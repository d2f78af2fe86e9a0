"""Boards on which people watch a run: TensorBoard or Weights & Biases, as far as installed and asked for (telemetry.log_to).

They get a copy of every row of metrics.jsonl and telemetry.jsonl. Nothing is ever read back from them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.run.artifacts import value_digest
from utils.run.records import Row

Board = Callable[[Row], None]  # takes a row with "step" and numbers
PROJECT = "monotone-lm"


def no_board(row: Row) -> None:
    """Nobody watches."""


@contextmanager
def opened(name: str, folder: Path, step: int) -> Iterator[Board]:
    """The board called `none`, `tensorboard` or `wandb`; its files go below `folder`, which also tells one run from another.

    A run that goes on from `step` goes on on its board too.
    """
    if name == "tensorboard":
        yield from _tensorboard(folder / name, step)
    elif name == "wandb":
        yield from _wandb(folder, step)
    else:
        yield no_board


def _tensorboard(folder: Path, step: int) -> Iterator[Board]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)  # what a killed start wrote after it is hidden

    def show(row: Row) -> None:
        for key, value in _numbers(row).items():
            writer.add_scalar(key, value, row["step"])

    try:
        yield show
    finally:
        writer.close()


def _wandb(folder: Path, step: int) -> Iterator[Board]:
    """Rows carry their step as a value: its own counter refuses to go back to a checkpoint."""
    import wandb

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # WANDB_MODE is its own affair
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=PROJECT,
        name="/".join(folder.absolute().parts[-3:]),
        id=value_digest(str(folder.absolute()))[:16],
        resume="allow",
        dir=str(folder),
        mode="offline" if offline else None,
    )
    run.define_metric("*", step_metric="step")

    try:
        yield lambda row: run.log(_numbers(row) | {"step": row["step"]})
    finally:
        run.finish()


def _numbers(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
