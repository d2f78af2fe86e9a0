"""What a machine can fail at, in words, with what to do: disks, memory, devices."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOSYS, errno.EIO, errno.ESTALE}
LOST_NAMES = ("ETIMEDOUT", "ESHUTDOWN", "ENOTCONN", "EREMOTEIO", "ECOMM", "EHOSTDOWN", "ENOLINK", "ENODEV", "ENXIO")
LOST = {getattr(errno, name) for name in LOST_NAMES if hasattr(errno, name)}  # a file system of the network
NOT_A_PLACE = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
DISK_FAILS = DISK_FULL | NO_ACCESS | LOST
DISK_TROUBLE = DISK_FAILS | NOT_A_PLACE
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|[Cc]annot allocate memory|can't start new thread"
    r"|failed to map segment from shared object$"
)
NO_DEVICE = re.compile(r"CUDA error|CUDA driver|CUBLAS_STATUS|CUDNN_STATUS|NCCL|No CUDA GPUs")
KEPT = "What is complete is kept"


def explained(error: Exception, folder: Path | None) -> str | None:
    """Why the work in `folder` ended, and what to do; None for an error that is no fault of the machine.

    A full disk and want of memory are found behind another error too: a library that cleans up after one may fail again, and hide it.
    """
    return next(filter(None, (_said(each, folder) for each in (*_wants_behind(error), error))), None)


def _wants_behind(error: BaseException) -> Iterator[Exception]:
    """Full disks and wants of memory in whose handling an error came up, unless its raiser says that they have nothing to do with it."""
    while (behind := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        full = isinstance(behind, OSError) and behind.errno in DISK_FULL
        if isinstance(behind, Exception) and (full or exhausted(behind)):
            yield behind
        error = behind


def _said(error: Exception, folder: Path | None) -> str | None:
    named = (error.filename2 or error.filename or folder or "a file") if isinstance(error, OSError) else ""
    if isinstance(error, OSError) and (error.errno in DISK_TROUBLE or os.path.islink(named)):  # noqa: PTH114 - Path.is_symlink raises
        return (
            f"cannot write or read {named}: {error.strerror or error}{_inodes(error, folder)}. {KEPT}: "
            "make room or give access, or choose other folders (paths.work, paths.results, paths.cache), then run again."
        )
    return exhausted(error)


def of_machine(error: Exception) -> bool:
    """Whether disk, memory or device failed: what a reader must not take for a fault of the file that it reads."""
    return exhausted(error) is not None or (isinstance(error, OSError) and error.errno in DISK_FAILS)


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def exhausted(error: Exception) -> str | None:
    """As `explained`, of memory and devices alone.

    torch is not imported here; its errors are known by their names and words.
    """
    kind, text = type(error).__name__, str(error)
    said = (text.splitlines() or [""])[0][:300] or kind
    if kind == "OutOfMemoryError":
        return (
            f"the device ran out of memory ({said}). {KEPT}: is another process on the device? Take a larger one, or smaller batches "
            "(evaluate.batch_size, hotflip.batch_size, training.micro_batch), then run again."
        )
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM) or NO_MEMORY.search(text):
        return f"the machine ran out of memory ({said}). {KEPT}: give it more (`memory` in the cluster file), then run again."
    if kind == "AcceleratorError" or (isinstance(error, RuntimeError) and NO_DEVICE.search(text)):
        return f"the device failed ({said}). {KEPT}: run again, on another machine if the same one fails once more."
    return None


def _inodes(error: OSError, folder: Path | None) -> str:
    """A disk can have room, and no entry left for another file."""
    with suppress(OSError):
        if error.errno == errno.ENOSPC and folder is not None and (there := os.statvfs(folder)).f_files and not there.f_favail:
            return " (no inodes: too many files)"
    return ""
