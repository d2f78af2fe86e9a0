"""Work cut into units, which any number of processes take one after the other.

A unit leaves a file of rows, whole or not at all, and what is in it does not depend on who did it, nor on what was done before. So the
files together are the same for any number of processes; whoever reads them goes by the order of the units.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from utils.run.artifacts import left_behind, make_folder, read_json, read_sealed, remove, write_sealed
from utils.run.errors import InputError
from utils.run.lock import claimed
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Row

POLL_SECONDS = 0.2
TELL_SECONDS = 5.0  # between two looks at how far the others are

Step = Callable[[], None]


class Begun(TypedDict):
    """What is under way in a unit, beside what its own work keeps there."""

    steps: int


class Done(TypedDict):
    rows: list[Row]


@dataclass(frozen=True)
class Unit:
    """`name` is that of its files, `label` what the work is called, `model` the one that it needs; `steps` is its size, for progress.

    `work(begun, step)` returns its rows. It keeps what is under way in the JSON file `begun`, with {"steps": how many are made}, and calls
    `step` when that is on the disk, which may raise.
    """

    name: str
    label: str
    model: str
    steps: int
    work: Callable[[Path, Step], list[Row]]


@dataclass(frozen=True)
class Place:
    """This process among `count` that share the work. `waits`: whether it stays until the others have done theirs."""

    number: int = 0
    count: int = 1
    waits: bool = True


def done_in(folder: Path) -> set[str]:
    """Names of the units that are done."""
    return {path.stem for path in folder.glob("*.done")}


def rows_in(folder: Path, units: Iterable[Unit]) -> list[Row]:
    """All rows, in the order of the units."""
    return [row for unit in units for row in read_sealed(folder / f"{unit.name}.done", Done)["rows"]]


class Share:
    """What one process does of the work in a folder. `ready(names of what is done)` lists the units whose inputs are there, in order.

    A process begins at its own place in the list, and stays with a model while there is work for it.
    """

    def __init__(
        self, ready: Callable[[Set[str]], Sequence[Unit]], folder: Path, stop: Stop, place: Place | None = None, speaks: bool = True
    ) -> None:
        make_folder(folder)
        for path in sorted(folder.glob("*.done")):
            if left_behind(path, Done) is None:
                path.unlink(missing_ok=True)  # another process may have seen it too
        self.ready, self.folder, self.stop, self.place, self.speaks = ready, folder, stop, place or Place(), speaks
        self.units: Sequence[Unit] = ()
        self.model = ""
        self.progress: Progress | None = None
        self.told = 0.0

    def run(self) -> None:
        """Take units until all are done, or, without waiting, until there is none to take."""
        while left := self._left():
            with ExitStack() as claims:
                mine = next((unit for unit in left if claims.enter_context(claimed(self.folder / f"{unit.name}.lock"))), None)
                if mine is not None:
                    self._do(mine)
                elif self.place.waits:
                    self._step(left[0])
                    time.sleep(POLL_SECONDS)
                else:
                    break
        self._end()

    def _left(self) -> list[Unit]:
        """What is not done, in the order in which this process would take it."""
        done = done_in(self.folder)
        self.units = self.ready(done)
        start = len(self.units) * self.place.number // self.place.count
        left = [unit for unit in (*self.units[start:], *self.units[:start]) if unit.name not in done]
        return sorted(left, key=lambda unit: unit.model != self.model)

    def _do(self, unit: Unit) -> None:
        target, begun = (self.folder / f"{unit.name}{suffix}" for suffix in (".done", ".json"))
        if target.exists():
            return  # since the list was made
        self.stop.check()
        self._tell(unit)
        self.model = unit.model
        write_sealed(target, {"rows": unit.work(begun, lambda: self._step(unit))})
        remove(begun)
        self._tell(unit)

    def _step(self, unit: Unit) -> None:
        if time.monotonic() - self.told >= TELL_SECONDS:
            self._tell(unit)
        self.stop.check()

    def _tell(self, unit: Unit) -> None:
        """How far all processes are with work of this kind, in steps."""
        if not self.speaks:
            return
        self.told = time.monotonic()
        if self.progress is None or self.progress.label != unit.label:
            self._end()
            made, total = self._made(unit.label)
            self.progress = Progress(unit.label, total, made)
        self.progress.reach(*self._made(unit.label), unit.name)

    def _end(self) -> None:
        """The others may have made the last steps."""
        if self.progress is not None:
            self.progress.reach(*self._made(self.progress.label))
            self.progress.close()
            self.progress = None

    def _made(self, label: str) -> tuple[int, int]:
        """(steps that are made, all steps) of the units of a kind."""
        done, begun = done_in(self.folder), {path.stem for path in self.folder.glob("*.json")}
        units, made = [unit for unit in self.units if unit.label == label], 0
        for unit in units:
            if unit.name in done:
                made += unit.steps
            elif unit.name in begun:
                with suppress(InputError, OSError):  # done in this moment
                    made += read_json(self.folder / f"{unit.name}.json", Begun)["steps"]
        return made, sum(unit.steps for unit in units)
