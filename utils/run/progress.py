"""Progress bars with the time left; plain lines, at most one every few seconds, where standard error is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict

from utils.run.artifacts import write_json
from utils.run.environment import now

REPORT_EVERY = 10.0  # seconds between two reports to the file that others read


class Reported(TypedDict):
    """What progress.json says. Rates and times may not be known yet."""

    label: str
    done: int
    total: int
    note: str
    tokens_per_second: float | None
    seconds_left: float | None
    deadline: NotRequired[float | None]
    fits: NotRequired[bool | None]


class Report:
    """progress.json of the stage at work: what another process can know of it. One stage runs at a time in a process."""

    path: Path | None = None
    facts: dict[str, Any] | None = None
    written = 0.0
    deadline: float | None = None  # epoch seconds at which the job's work has to be saved

    @classmethod
    @contextmanager
    def into(cls, path: Path, deadline: float | None = None) -> Iterator[None]:
        """Keep `path` up to date while the block runs, and exact when it is left. The deadline (Stop's) is told with every progress."""
        cls.path, cls.facts, cls.written, cls.deadline = path, None, 0.0, deadline
        try:
            yield
        finally:
            cls.write()
            cls.path = cls.deadline = None

    @classmethod
    def update(cls, facts: dict[str, Any]) -> None:
        cls.facts = facts
        if time.monotonic() - cls.written >= REPORT_EVERY:
            cls.write()

    @classmethod
    def write(cls) -> None:
        cls.written = time.monotonic()
        if cls.path is not None and cls.facts is not None:
            with suppress(OSError):  # a report that cannot be written is no reason to stop the work
                write_json(cls.path, cls.facts | {"at": now()})


class Progress:
    """A bar over `total` units that may start at `done` (a resumed run)."""

    def __init__(self, label: str, total: int, done: int = 0, every_seconds: float = 15.0, tokens_per_unit: int = 0) -> None:
        self.label, self.total, self.done, self.start_at = label, total, done, done
        self.every, self.tokens_per_unit, self.note = every_seconds, tokens_per_unit, ""
        self.began = self.spoken = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=label, leave=False) if sys.stderr.isatty() else None
        Report.update(self._facts())

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done += units
        self.note = note or self.note
        Report.update(self._facts())
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(filter(None, (note, self._limit().removeprefix(", ")))), refresh=False)
            self.bar.update(units)
        elif time.monotonic() - self.spoken >= self.every or self.done >= self.total:
            self.spoken = time.monotonic()
            print(f"  {self.label}: {self.done}/{self.total}{self._left()}{self._limit()}{'  ' + note if note else ''}", flush=True)

    def reach(self, done: int, total: int, note: str = "") -> None:
        """Other processes advance too, and there may be more to do than was known."""
        self.total = total
        if self.bar is not None:
            self.bar.total = total
        if done > self.done:
            self.advance(done - self.done, note)

    def _facts(self) -> dict[str, Any]:
        """Units done, units a second of this start, seconds left, tokens a second where a unit is a number of tokens."""
        gained, seconds = self.done - self.start_at, time.monotonic() - self.began
        rate = gained / seconds if gained and seconds else None
        left = (self.total - self.done) / rate if rate else None
        return {
            "label": self.label,
            "done": self.done,
            "total": self.total,
            "note": self.note,
            "tokens_per_second": round(rate * self.tokens_per_unit, 1) if rate and self.tokens_per_unit else None,
            "seconds_left": None if left is None else round(left, 1),
            "deadline": Report.deadline,
            "fits": None if left is None or Report.deadline is None else time.time() + left <= Report.deadline,
        }

    def _left(self) -> str:
        gained = self.done - self.start_at
        if not gained or self.done >= self.total:
            return f", {duration(time.monotonic() - self.began)}"
        seconds = (time.monotonic() - self.began) / gained * (self.total - self.done)
        return f", {duration(seconds)} left"

    def _limit(self) -> str:
        """Inside a job: how long it may go on, and whether this work will be done by then."""
        facts = self._facts()
        if facts["deadline"] is None or self.done >= self.total:
            return ""
        verdict = {None: "", True: ": enough", False: ": not enough, another start goes on"}[facts["fits"]]
        return f", {duration(max(0.0, facts['deadline'] - time.time()))} left in the job{verdict}"

    def close(self) -> None:
        """The work is done, perhaps with less than `total` (a search that converged, a text that ended)."""
        if self.bar is not None:
            self.bar.close()
        elif self.done < self.total:
            print(f"  {self.label}: done after {self.done} of at most {self.total}, {duration(time.monotonic() - self.began)}", flush=True)


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s or 7 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
