"""What a lock file says of its owner. It changes while the owner lives, so whether it does needs no clock that two machines share."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

STRANGER = "another process"


@dataclass(frozen=True)
class Mark:
    """Four lines: the owner in words, its machine, a name that no other owner has, a number that grows.

    The last one who came to a shared lock leaves its words alone, without a name: such a lock is not taken by a mark.
    """

    words: str = STRANGER
    machine: str = ""
    name: str = ""
    beat: int = 0

    @classmethod
    def own(cls, shared: bool = False) -> Mark:
        job = f" (job {os.environ['SLURM_JOB_ID']})" if "SLURM_JOB_ID" in os.environ else ""
        machine = socket.gethostname()
        return cls(f"process {os.getpid()} on {machine}{job}", machine, "" if shared else uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> Mark:
        """The mark in a file, opened anew so that a network file system asks its server; an empty one if there is none."""
        try:
            words, machine, name, beat = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return cls(words or STRANGER, machine, name, int(beat))
        except (FileNotFoundError, ValueError):
            return cls()

    def write(self, handle: int, beat: int = 0) -> None:
        text = f"{self.words}\n{self.machine}\n{self.name}\n{beat:012d}".encode()
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))

    @property
    def shared(self) -> bool:
        return not self.name

    @property
    def elsewhere(self) -> bool:
        """Whether the owner is on another machine; False if there is none."""
        return bool(self.name) and self.machine != socket.gethostname()
