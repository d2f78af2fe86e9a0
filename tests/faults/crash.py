"""Kill -9 and loss of power at counted file operations of every stage, then the same command again: nothing may differ or be left over."""

from __future__ import annotations

import random
import re
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from configs.presets import load
from configs.schema import Experiment
from stages.pipeline import stages
from tests.fake_stages import TINY
from tests.faults.operations import Operation, Watch
from tests.faults.outcome import Outcome
from tests.faults.power import LOSSES, Disk, Loss, after_loss
from tests.killing import differing, finish, place, results, start, upto, waited

AMOUNT = 200
WEIGHTS = (4, 1, 3, 3, 2, 3, 3, 1)  # of the stages, among the moments that are drawn
HANGS = 300.0  # seconds
CHECKPOINT = re.compile(r"(?:^|/)checkpoints/step_(\d+)$")


@dataclass(frozen=True)
class End:
    """A process ends at its operation `number` (from 1): by kill -9, a write half done (`torn`) or not, or with the power."""

    number: int
    loss: Loss | None = None
    torn: bool = False

    def __str__(self) -> str:
        how = f"power lost ({self.loss})" if self.loss else "kill -9" + (", half written" if self.torn else "")
        return f"{how} at operation {self.number}"


@dataclass(frozen=True)
class Point:
    """A stage, and the ends that its first starts come to."""

    stage: int
    ends: tuple[End, ...]


class Bench:
    """Tries points on copies of a finished run of one seed."""

    def __init__(self, config: Experiment, finished: Path, folder: Path) -> None:
        self.config, self.finished, self.folder, self.root = config, finished, folder, folder / "run"
        self.log, self.output, self.aside = folder / "operations", folder / "output", folder / "aside"

    def operations(self, stage: int) -> list[Operation]:
        """Those of an undisturbed start."""
        upto(self.finished, stage, self.root)
        if fault := self._ended(stage, None, 0):
            raise RuntimeError(f"stage {stage}: {fault}")
        return Operation.read(self.log)

    def tried(self, point: Point, chance: random.Random) -> Outcome:
        """The outcome of the ends in a row and one undisturbed start."""
        upto(self.finished, point.stage, self.root)
        logs, said = [], []
        for end in point.ends:
            if not self.died(point.stage, end):
                break
            logs.append(Operation.read(self.log))
            said.append(f"{end}, {logs[-1][-1].kind} of {logs[-1][-1].path}")
            if end.loss:
                after_loss(self.root, self.aside, end.loss, chance)
        fault = self._ended(point.stage, None, 0) or self._wrong(point.stage)
        lost = lost_steps([*logs, Operation.read(self.log)], [bool(end.loss) for end in point.ends])
        if lost:
            fault = fault or f"{lost} steps were done again"
        return Outcome(f"stage {point.stage}: {'; '.join(said) or 'over before'}", not fault, fault or "as undisturbed", lost)

    def died(self, stage: int, end: End) -> bool:
        """Whether the start was hit; another may be over before."""
        shutil.rmtree(self.aside, ignore_errors=True)
        return self._ended(stage, end, -signal.SIGKILL) is None

    def _ended(self, stage: int, end: End | None, code: int) -> str | None:
        """Start the stage; returns how it ended, in words, if not with `code`."""

        def prepare() -> None:
            place(self.root)
            disk = Disk(self.root, self.aside) if end and end.loss else None
            Watch(self.root, self.log, end.number if end else None, bool(end and end.torn), disk).install()

        self.output.write_text("")
        found = waited(start(self.config, [stage], self.output, prepare), HANGS)
        words = self.output.read_text()[-1500:]
        if code == 0 and "Traceback" in words:
            return f"a traceback: {words}"
        return None if found == code else f"ended with {found}: {words}"

    def _wrong(self, stage: int) -> str | None:
        """What differs from an undisturbed run, and what is there beside it."""
        expected, there = undisturbed(self.finished, stage)
        now = names(self.root)
        facts = {"different": differing(expected, made(self.root)), "left over": sorted(now - there), "missing": sorted(there - now)}
        return "; ".join(f"{name}: {', '.join(found[:5])}" for name, found in facts.items() if found) or None


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def made(root: Path) -> dict[str, Any]:
    """What results() finds, and the cache, which it leaves out."""
    files = {path.relative_to(root).as_posix(): path for path in root.glob("scratch/foundation_llm_cache/**/*") if path.is_file()}
    return results(root) | {name: path.read_bytes() for name, path in files.items() if path.name != ".lock"}


@cache
def undisturbed(finished: Path, stage: int) -> tuple[dict[str, Any], set[str]]:
    """What is made by an undisturbed run up to a stage, and the names of all that is there."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        upto(finished, stage + 1, root)
        return made(root), names(root)


def lost_steps(logs: Sequence[Sequence[Operation]], losses: Sequence[bool]) -> int:
    """Training steps that starts made again although a checkpoint behind them was there: published, and after a loss of power on the disk.

    A start that goes on from step s saves s + d next, d being the steps between two saves.
    """
    saved = between = lost = 0
    for log, power in zip(logs, [*losses, False][: len(logs)], strict=False):
        found = [
            (number, int(match[1])) for number, each in enumerate(log) if each.kind == "rename" and (match := CHECKPOINT.search(each.path))
        ]
        between = between or (found[0][1] if found else 0)
        if found and saved:
            lost += max(0, saved + between - found[0][1])
        for number, step in found:
            if any(
                not power or (each.kind, Path(each.path).name) == ("fsync", "checkpoints")
                for each in log[number + 1 : -1 if power else None]
            ):
                saved = max(saved, step)
    return lost


def planned(operations: Mapping[int, Sequence[Operation]], amount: int, chance: random.Random) -> list[Point]:
    """Points over all stages and kinds of operation, a third of them with two or three ends in a row."""
    by_kind: dict[tuple[int, str], list[int]] = defaultdict(list)
    by_path: dict[int, dict[Operation, list[int]]] = {stage: defaultdict(list) for stage in operations}
    for stage, found in operations.items():
        for number, operation in enumerate(found, 1):
            by_kind[stage, operation.kind].append(number)
            by_path[stage][operation].append(number)
    chosen = [(stage, chance.choice(numbers)) for (stage, _), numbers in by_kind.items()]
    chance.shuffle(chosen)
    while len(chosen) < amount:
        (stage,) = chance.choices(list(operations), [WEIGHTS[stage] for stage in operations])
        chosen.append((stage, chance.choice(chance.choice(list(by_path[stage].values())))))
    return [_point(stage, number, turn, len(operations[stage]), chance) for turn, (stage, number) in enumerate(chosen[:amount])]


def _point(stage: int, number: int, turn: int, count: int, chance: random.Random) -> Point:
    further = [chance.randint(1, count) for _ in range(chance.randint(1, 2))] if turn % 3 == 0 else []
    kinds = [chance.choice([None, None, None, *LOSSES]) for _ in range(1 + len(further))]
    return Point(stage, tuple(End(at, loss, chance.random() < 0.5) for at, loss in zip([number, *further], kinds, strict=True)))


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    config, chance, finished = load(TINY), random.Random(seed), folder / "finished"
    finish(config, finished)
    bench = Bench(config, finished, folder)
    operations = {stage.number: bench.operations(stage.number) for stage in stages()}
    for point in planned(operations, amount, chance):
        yield bench.tried(point, chance)
