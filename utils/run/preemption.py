"""Stop in time: a signal or a deadline sets a flag, and the loop that does the work decides when to save and leave."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from types import FrameType

from utils.run.errors import StoppedInTime

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


MARGIN = 300.0  # seconds to save the state of a billion parameters on a slow file system


def job_end() -> float | None:
    """When the job around this process ends, epoch seconds; None where nobody says so, or not in seconds."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if re.fullmatch("[0-9]{1,12}", end) else None


class Stop:
    """The flag. It rises by itself some time before the job's end (SLURM_JOB_END_TIME, epoch seconds), for sites that send no signal.

    That is MARGIN before the end, but never more than a quarter of the time that there is.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None
        if (end := job_end()) is not None:
            clock = time.time()
            left = end - clock
            left -= min(MARGIN, max(0.0, left / 4))
            self.deadline, self._until = clock + left, time.monotonic() + left  # the clock of the day may be set back meanwhile

    def listen(self) -> None:
        """Let SIGUSR1, SIGTERM and Ctrl-C set the flag; a second Ctrl-C ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = f"signal {signal.Signals(number).name}"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        if self.reason is None and self.deadline is not None and (time.time() >= self.deadline or time.monotonic() >= self._until):
            self.reason = "the job's time limit is near"
        return self.reason is not None

    def check(self) -> None:
        """Raise StoppedInTime if asked to stop. Call it only where everything done so far is on disk."""
        if self.requested():
            raise StoppedInTime(self.reason)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: the parent holds the lock of the folder that this one writes to."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
