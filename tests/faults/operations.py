"""File operations below a folder, counted: a child process dies at the n-th of them, as by `kill -9`, or as by a loss of power.

Python's own operations are seen one by one. What a library writes without Python (safetensors, tokenizers, numpy) is seen when the file
is brought to the disk.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.power import Disk

NAMES = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "ftruncate", "fsync", "write", "pwrite", "sendfile")
KINDS = {"remove": "unlink", "replace": "rename", "pwrite": "write", "sendfile": "write", "ftruncate": "truncate"}
WRITING = set("wax+")
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
RANDOM = re.compile(r"-[0-9a-f]{8}(?=/|$)")  # of the names of temporary files


@dataclass(frozen=True)
class Operation:
    """`path` below the watched folder, without what is random in it."""

    kind: str
    path: str

    @classmethod
    def read(cls, log: Path) -> list[Operation]:
        """Those that were begun, in order; the last one of a process that died was not carried out."""
        return [cls(*line.split("\t")) for line in log.read_text().splitlines()] if log.exists() else []


class Raw(io.FileIO):
    """A file whose writes are operations."""

    watch: Watch

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]
        def half() -> None:
            super(Raw, self).write(memoryview(data).cast("B")[: len(data) // 2])

        with self.watch.lock:
            self.watch.count("write", self.watch.place(self.name), half)
            return super().write(data)

    def truncate(self, size: int | None = None, /) -> int:
        with self.watch.lock:
            self.watch.count("truncate", self.watch.place(self.name))
            return super().truncate(size)


class Watch:
    """Counts the operations of this process below `root` into the file `log`, and ends the process at number `last` (from 1)."""

    def __init__(self, root: Path, log: Path, last: int | None = None, torn: bool = False, disk: Disk | None = None) -> None:
        self.root, self.last, self.torn, self.disk = root.resolve(), last, torn, disk
        self.number, self.lock = 0, threading.RLock()
        self.opened: set[Path] = set()
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.real = {name: getattr(os, name) for name in ("write", "readlink")}

    def count(self, kind: str, path: Path, half: Callable[[], None] | None = None) -> None:
        """Call it with the lock held, before the operation. A write that is the last one may get half of its bytes to the disk."""
        if not self.below(path):
            return
        self.number += 1
        name = RANDOM.sub("", path.relative_to(self.root).as_posix())
        self.real["write"](self.log, f"{kind}\t{name}\n".encode())
        if self.number == self.last:
            if self.torn and half is not None:
                half()
            if self.disk is not None:
                self.disk.fail()
            os.kill(os.getpid(), signal.SIGKILL)

    def below(self, path: Path) -> bool:
        return self.root in (path, *path.parents)

    def place(self, path: Any, folder: int | None = None) -> Path:
        """Where what an operation was given lies: a path, one below an open folder, or an open file."""
        if isinstance(path, int):
            return Path(self.real["readlink"](f"/proc/self/fd/{path}"))
        given = Path(os.fsdecode(path)).absolute() if folder is None else self.place(folder) / os.fsdecode(path)
        return given.parent.resolve() / given.name

    def install(self) -> None:
        """From now on, for good: this process will not live long."""
        Raw.watch = self
        builtins.open = io.open = self._opener(io.open)
        for name in NAMES:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.open = self._os_open(os.open)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        kind = KINDS.get(name, name)

        def called(*given: Any, **named: Any) -> Any:
            with self.lock:
                folder = named.get("dir_fd", named.get("src_dir_fd"))
                path = self.place(given[0], folder)
                others = [self.place(given[1])] if kind in ("rename", "link") else []
                self.count(kind, (others or [path])[0], self._torn(path) if kind == "fsync" else None)
                if self.disk is not None and self.below(path):
                    self.disk.before(kind, path)
                result = real(*given, **named)
                if self.disk is not None and self.below(path):
                    self.disk.after(kind, path, *others)
                return result

        return called

    def _torn(self, path: Path) -> Callable[[], None] | None:
        """Leave half of a file that a library has written: so it would look if the process had died meanwhile."""
        if path in self.opened or not path.is_file() or path.stat().st_nlink > 1:
            return None
        return lambda: os.truncate(path, path.stat().st_size // 2)

    def _os_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def called(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if not flags & CHANGING:
                return real(path, flags, mode, dir_fd=dir_fd)
            with self.lock:
                return self._opening(self.place(path, dir_fd), lambda: real(path, flags, mode, dir_fd=dir_fd))

        return called

    def _opening(self, path: Path, really: Callable[[], Any]) -> Any:
        self.count("open", path)
        self.opened.add(path)
        watched = self.disk is not None and self.below(path)
        new = not path.exists()
        if watched and self.disk is not None:
            self.disk.before("open", path)
        opened = really()
        if watched and self.disk is not None and new:
            self.disk.after("create", path)
        return opened

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The built-in open, with a Raw below the buffers of a file that is written."""

        def called(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if opener is not None or isinstance(file, int) or not WRITING & set(mode) or not self.below(self.place(file)):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            with self.lock:
                raw = self._opening(self.place(file), lambda: Raw(file, mode.replace("b", "").replace("t", "")))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return called
