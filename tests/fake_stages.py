"""A pipeline of three short stages for tests of the contract: numbers, their squares (resumable), the total over all seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from configs.presets import load
from utils.run.artifacts import read_json, write_json
from utils.run.preemption import Stop
from utils.run.records import Records, grouped
from utils.run.stage import Context, Stage, run_stage

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "tiny.yaml")


def write_numbers(ctx: Context) -> None:
    write_json(ctx.write("numbers"), [ctx.seed + step for step in range(ctx.config.training.steps)])


def write_squares(ctx: Context) -> None:
    records = Records(ctx.state / "squares.jsonl")
    for group in records.pending(grouped(read_json(ctx.read("numbers")), 5)):
        ctx.stop.check()
        records.append({"number": number, "square": number**2} for number in group)
    write_json(ctx.write("squares"), records.rows())


def write_total(ctx: Context) -> None:
    there = [inputs for inputs in ctx.inputs.values() if inputs]
    write_json(ctx.write("total"), sum(row["square"] for inputs in there for row in read_json(inputs["squares"])))


NUMBERS = Stage(0, "numbers", "write numbers", (), {"numbers": "below/numbers.json"}, ("training.steps",), write_numbers)
SQUARES = Stage(1, "squares", "square them", ("numbers",), {"squares": "squares.json"}, ("uat.sweeps",), write_squares)
TOTAL = Stage(2, "total", "add them up", ("squares",), {"total": "total.json"}, ("report",), write_total, every_seed=False)
PIPELINE = (NUMBERS, SQUARES, TOTAL)
SQUARES_OF_42 = [{"number": number, "square": number**2} for number in range(42, 54)]


class StopAt(Stop):
    """Asks to stop from the given look at the flag on."""

    def __init__(self, look: int) -> None:
        super().__init__()
        self.looks_left = look

    def requested(self) -> bool:
        self.looks_left -= 1
        if self.looks_left <= 0:
            self.reason = "the test says so"
        return super().requested()


def run(stage: Stage, *overrides: str, seed: int = 42, stop: Stop | None = None, discard: bool = False) -> int:
    """Exit code of one stage on the tiny experiment with overrides."""
    return run_stage(stage, load(TINY, overrides), seed, PIPELINE, stop or Stop(), discard)


def folder_of(stage: Stage, root: Path, seed: int = 42) -> Path:
    if stage is TOTAL:
        return root / "project/foundation_llm_final_results/tiny"
    return root / f"scratch/foundation_llm_work/tiny/seed_{seed}" / f"stage_{stage.number}_{stage.name}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def in_child(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that may import tests.fake_stages in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
