"""One process at a time in a folder. The operating system releases the lock when its owner dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.run.errors import InputError
from utils.run.preemption import Stop

POLL_SECONDS = 0.2


@contextmanager
def locked(folder: Path, *, queue: Stop | None = None) -> Iterator[None]:
    """Hold the lock of `folder`. If another process has it: with `queue` wait, unless asked to stop; otherwise raise InputError.

    Both name the owner.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # a place like /proc, where the kernel knows no folders of ours
        raise PermissionError(errno.EACCES, "no folder can be made here", str(folder)) from error
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{folder / '.lock'}: found a link, expected a file of ours, which is emptied; find out who made it") from None
    try:
        if not _taken(handle):
            owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            if queue is None:
                raise InputError(f"{folder}: {owner} is at work here; wait for it to end or stop it, then run again")
            print(f"  waiting for {owner}, which is at work in {folder}", flush=True)
            while not _taken(handle):
                queue.check()
                time.sleep(POLL_SECONDS)
        os.ftruncate(handle, 0)
        job = f" (job {os.environ['SLURM_JOB_ID']})" if "SLURM_JOB_ID" in os.environ else ""
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}{job}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
