"""One process at a time in a folder, on one machine or on a file system that several share.

The operating system releases a lock when its owner dies. On some shared file systems (Lustre mounted with `localflock`, BeeGFS by
default) it knows the locks of its own machine alone. There the owner's mark in the file decides, and two that come at once are told
apart by Fischer's algorithm (Lamport 1987, A fast mutual exclusion algorithm, section 2): write, wait until all see it, read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.run.artifacts import make_folder
from utils.run.errors import FAILED, InputError
from utils.run.mark import Mark
from utils.run.places import LOCAL_FILE_SYSTEMS, file_system
from utils.run.preemption import Stop

POLL_SECONDS = 0.2
BEAT_SECONDS = 10.0  # between two changes of the mark
SILENT_SECONDS = 60.0  # an owner on another machine whose mark does not change for so long is dead
SETTLE_SECONDS = 1.0  # until all machines see what one has written


@contextmanager
def locked(folder: Path, *, queue: Stop | None = None, shared: bool = False) -> Iterator[None]:
    """Hold the lock of `folder`. If another process has it: with `queue` wait, unless asked to stop; otherwise raise InputError.

    Both name the owner, its machine and its job. What a dead owner held is taken over: on a shared file system after SILENT_SECONDS if it
    ran on another machine, else at once. A `shared` lock can be held by several processes, and then by no other one alone; where a file
    system knows the locks of one machine alone, those on other machines do not see it.
    """
    mark, path = Mark.own(shared), folder / ".lock"
    handle = _entered(path, mark, queue)
    ending = threading.Event()
    pulse = threading.Thread(target=_live, args=(path, handle, mark, ending), name="lock", daemon=True)
    try:
        if not shared:
            pulse.start()
        yield
    finally:
        ending.set()
        if pulse.is_alive():
            pulse.join()
        with suppress(OSError):
            if not shared and Mark.read(path).name in ("", mark.name):  # else another has taken the folder over
                os.ftruncate(handle, 0)
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child that a library has forked may hold the open file too
        os.close(handle)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the lock of the file `path`, for as long as the block runs. It does not wait."""
    handle = _file(path)
    taken = False
    try:
        taken = _taken(handle)
        yield taken
    finally:
        if taken:
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _entered(path: Path, mark: Mark, queue: Stop | None) -> int:
    """The open file, once the lock is ours."""
    told = False
    while True:
        handle = _opened(path)
        try:
            owner = _owner(handle, path, mark, queue)
            if owner is None and _same(handle, path):  # else the folder was moved aside, and the lock with it
                return handle
            if owner is not None and queue is None:
                raise InputError(f"{path.parent}: {owner.words} is at work here; wait for it to end or stop it, then run again")
            if owner is not None and queue is not None:
                if not told:
                    print(f"  waiting for {owner.words}, which is at work in {path.parent}", flush=True)
                told = True
                queue.check()
                time.sleep(POLL_SECONDS)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _opened(path: Path) -> int:
    while True:
        try:
            make_folder(path.parent)
        except FileNotFoundError as error:  # a place like /proc, where the kernel knows no folders of ours
            raise PermissionError(errno.EACCES, "no folder can be made here", str(path.parent)) from error
        with suppress(FileNotFoundError):  # the folder was moved aside just now
            return _file(path)


def _file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path}: found a link, expected a file of ours, which is emptied; find out who made it") from None


def _same(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int, path: Path, mark: Mark, queue: Stop | None) -> Mark | None:
    """Who has the lock; None if we have it now."""
    end = time.monotonic() + SETTLE_SECONDS
    while not _taken(handle, mark.shared):  # without a mark it was taken just now, or is given back just now
        if (there := Mark.read(path)).name or time.monotonic() > end:
            return there
        time.sleep(POLL_SECONDS / 10)
    if file_system(path.parent) in LOCAL_FILE_SYSTEMS:
        mark.write(handle)
        return None
    while (there := Mark.read(path)).elsewhere:
        now = _changed(path, there, queue)
        if now is None:
            break
        if now.name == there.name:
            return there
    if mark.shared:
        mark.write(handle)
        return None
    return _settled(handle, path, mark, there)


def _settled(handle: int, path: Path, mark: Mark, free: Mark) -> Mark | None:
    """Who has the lock, of those that found it free at once; None if it is us.

    Where it took long to write, another may have entered between our look and our write; seeing our mark, that one ends.
    """
    looked = time.monotonic()
    if (there := Mark.read(path)) != free:
        return there
    mark.write(handle)
    os.fsync(handle)
    slow = time.monotonic() - looked > SETTLE_SECONDS / 2
    time.sleep(3 * BEAT_SECONDS if slow else SETTLE_SECONDS)
    there = Mark.read(path)
    return None if there.name == mark.name else there


def _taken(handle: int, shared: bool = False) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _changed(path: Path, there: Mark, queue: Stop | None) -> Mark | None:
    """What the mark changes to: another beat of its owner, or what somebody else has written; None if it does not change."""
    print(f"  looking for {SILENT_SECONDS:.0f} s whether {there.words} is still at work in {path.parent}", flush=True)
    end = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        if queue is not None:
            queue.check()
        time.sleep(POLL_SECONDS)
        if (now := Mark.read(path)) != there:
            return now
    return None


def _live(path: Path, handle: int, mark: Mark, ending: threading.Event) -> None:
    """Give signs of life. If we were silent for so long that another has taken the lock, nothing more may be written: end at once."""
    beat = 0
    while not ending.wait(BEAT_SECONDS):
        beat += 1
        with suppress(OSError):
            there = Mark.read(path) if _same(handle, path) else mark
            if there.name not in ("", mark.name):
                words = f"{path.parent}: {there.words} has taken this folder over, for no sign of life came from here; this process ends"
                print(words, file=sys.stderr, flush=True)
                os._exit(FAILED)
            mark.write(handle, beat)
            os.fsync(handle)
