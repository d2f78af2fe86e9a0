"""What every stage does in the simulated week: steps of a moment each, each made from the one before and from the inputs, saved every few.

It is copied into a checkout's stages. A diary tells every start and every finished step.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from utils.run.artifacts import read_json, value_digest, write_json, write_text
from utils.run.errors import StoppedInTime
from utils.run.progress import Progress
from utils.run.stage import Context

SAVE_EVERY = 4
STEPS = {2: 60, 3: 60}  # of a training stage
FEW = 12  # of the others


def work(ctx: Context) -> None:
    number = int(str(ctx.identity["stage"]).split("_")[1])
    steps, file = STEPS.get(number, FEW), ctx.state / "save.json"
    saved: dict[str, Any] = read_json(file) if file.exists() else {"step": 0, "value": value_digest(ctx.identity["inputs"])}
    step, value = int(saved["step"]), str(saved["value"])
    note(number, ctx.seed, "start", step)
    progress = Progress("step", steps, step)
    while step < steps:
        time.sleep(float(os.environ["WEEK_SECONDS"]))
        step, value = step + 1, value_digest([value, step])
        stopping = ctx.stop.requested() and step < steps
        if stopping or step % SAVE_EVERY == 0:
            write_json(file, {"step": step, "value": value})
        note(number, ctx.seed, "step", step)
        progress.advance()
        if stopping:
            raise StoppedInTime(f"{ctx.stop.reason}, step {step} of {steps}")
    for name, path in ctx.writes.items():
        write_text(ctx.folder / path / "content" if not Path(path).suffix else ctx.folder / path, json.dumps(f"{name} {value}") + "\n")


def note(number: int, seed: int, what: str, step: int) -> None:
    """One line, in one write: several processes write at once."""
    line = f"{number} {seed} {os.environ.get('SLURM_JOB_ID', '-')} {os.getpid()} {what} {step}\n"
    with Path(os.environ["WEEK_DIARY"]).open("ab", buffering=0) as diary:
        diary.write(line.encode())
