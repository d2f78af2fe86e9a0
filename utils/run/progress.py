"""Progress bars with the time left; plain lines, at most one every few seconds, where standard error is no terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """A bar over `total` units that may start at `done` (a resumed run)."""

    def __init__(self, label: str, total: int, done: int = 0, every_seconds: float = 15.0) -> None:
        self.label, self.total, self.done, self.start_at = label, total, done, done
        self.every = every_seconds
        self.began = self.spoken = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=label, leave=False) if sys.stderr.isatty() else None

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done += units
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(units)
        elif time.monotonic() - self.spoken >= self.every or self.done >= self.total:
            self.spoken = time.monotonic()
            print(f"  {self.label}: {self.done}/{self.total}{self._left()}{'  ' + note if note else ''}", flush=True)

    def _left(self) -> str:
        gained = self.done - self.start_at
        if not gained or self.done >= self.total:
            return f", {duration(time.monotonic() - self.began)}"
        seconds = (time.monotonic() - self.began) / gained * (self.total - self.done)
        return f", {duration(seconds)} left"

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
