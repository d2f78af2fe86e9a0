"""One of several processes that want the same folder: python -m tests.faults.rival JSON. Exits with the stage's code.

The JSON says: `work` (numbers, squares, total, cache); `diary`, a file in which it notes when its work began and ended; `machine`, the
name of the machine that it pretends to be, with the others on a shared file system; `blind`, whether a machine knows its own locks alone
there; `seed`, `sweeps`, `discard`; `slow`, how many times as long the work takes; `held`, a file as long as which is there it does not go
on; `power` in place of 2; `planted`, a fault of the program, see `disguise`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.fake_stages import NUMBERS, SQUARES, TOTAL, run, write_total
from utils.run import lock, stage
from utils.run.artifacts import read_json, write_json
from utils.run.cache import cached
from utils.run.preemption import Stop
from utils.run.records import Records, grouped
from utils.run.stage import Context, set_aside

BEAT, SILENT, SETTLE = 0.1, 2.0, 0.5  # seconds, in place of the program's own
SQUARE_SECONDS = 0.25  # of a group of five numbers, of which there are three


class Rival:
    """What the JSON says, done."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = {"seed": 42, "sweeps": 2, "slow": 1, "power": 2} | told
        self.held: dict[int, int] = {}  # by the number of the file on its disk

    def disguise(self) -> None:
        """Be on another machine; have a fault."""
        lock.BEAT_SECONDS, lock.SILENT_SECONDS, lock.SETTLE_SECONDS = BEAT, SILENT, SETTLE
        if machine := self.told.get("machine"):
            socket.gethostname = lambda: machine
            lock.file_system = lambda path: "nfs"
        if self.told.get("blind"):
            lock.fcntl = self  # type: ignore[assignment]
        stage.set_aside = self.move
        match self.told["planted"]:
            case "no lock":
                lock._taken = lambda *_: True
            case "no mark":
                lock._changed = lambda path, there, queue: None
            case "no second look at the inputs":
                stage._made_again = lambda stage, context, pipeline: None

    LOCK_EX, LOCK_SH, LOCK_NB, LOCK_UN = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_NB, fcntl.LOCK_UN

    def flock(self, handle: int, how: int) -> None:
        """A lock that is known on this machine alone: it lies beside the real one."""
        number = os.fstat(handle).st_ino
        if how & self.LOCK_UN:
            os.close(self.held.pop(number))
        elif number not in self.held:
            beside = os.open(f"{Path(f'/proc/self/fd/{handle}').readlink()}.{socket.gethostname()}", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(beside, how)
            self.held[number] = beside

    # --- work

    def note(self, what: str) -> None:
        with Path(self.told["diary"]).open("a") as diary:
            diary.write(f"{os.getpid()} {what}\n")

    def wait(self) -> None:
        while "held" in self.told and Path(self.told["held"]).exists():
            time.sleep(0.01)

    @contextmanager
    def noted(self) -> Iterator[None]:
        self.note("began")
        yield
        self.note("ended")

    def squares(self, ctx: Context) -> None:
        with self.noted():
            records = Records(ctx.state / "squares.jsonl")
            for group in records.pending(grouped(read_json(ctx.read("numbers")), 5)):
                self.wait()
                time.sleep(SQUARE_SECONDS * self.told["slow"])
                records.append({"number": number, "square": number ** self.told["power"]} for number in group)
            write_json(ctx.write("squares"), records.rows())

    def total(self, ctx: Context) -> None:
        with self.noted():
            time.sleep(self.told["slow"] / 2)
            write_total(ctx)
            time.sleep(self.told["slow"] / 2)

    def build(self, target: Path, state: Path) -> None:
        with self.noted():
            for part in range(4):
                (target / f"part_{part}").write_text("content")
                time.sleep(SQUARE_SECONDS)

    def move(self, folder: Path) -> Path:
        self.note("moves")
        self.wait()
        return set_aside(folder)

    def work(self) -> int:
        work = self.told["work"]
        if work == "cache":
            cached(Path(self.told["diary"]).with_name("cache"), "kind", {}, self.build, Stop())
            return 0
        chosen = {
            "numbers": NUMBERS,
            "squares": replace(SQUARES, run=self.squares),
            "total": replace(TOTAL, run=self.total),
        }[work]
        settings = [f"uat.sweeps={self.told['sweeps']}", *(["seeds=[42, 7]"] if work == "total" else [])]
        return run(chosen, *settings, seed=self.told["seed"], discard=bool(self.told.get("discard")))


def main() -> int:
    rival = Rival(json.loads(sys.argv[1]))
    rival.disguise()
    return rival.work()


if __name__ == "__main__":
    sys.exit(main())
