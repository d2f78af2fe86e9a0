"""What ran: versions, code revision, host. Recorded beside every result."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from utils.run.errors import InputError

REVISION = "REVISION"  # of code that was copied out of its checkout
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "scipy")


def keep_others_from_writing() -> None:
    """Whatever this process and its children make from here on, other users may not write to it, however lax the user's umask is."""
    os.umask(os.umask(0o077) | 0o002)


def now() -> str:
    """UTC time, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python and the packages whose version can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@lru_cache
def code_revision() -> str:
    """The git commit of this checkout, with '+changes' if the working tree differs from it; 'unknown' without git.

    A frozen copy of the code (see utils/slurm/snapshot.py) holds it in a file.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / REVISION).is_file():
        return (root / REVISION).read_text(encoding="utf-8").strip()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def number(name: str, otherwise: int = 0) -> int:
    """A variable of the environment that is a whole number, or empty. Raises InputError for anything else."""
    text = os.environ.get(name, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InputError(f"{name}={text[:60]!r} in the environment, expected a whole number; correct or unset it")
    return int(text) if text else otherwise


def restarted() -> bool:
    """Whether SLURM has started this job before. Its first start may still be alive, on a node that SLURM lost sight of."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def host() -> dict[str, str | int]:
    """Where this process runs; inside a SLURM job, in which job and after how many restarts of it."""
    job = (
        {"job": os.environ["SLURM_JOB_ID"], "restarts": os.environ.get("SLURM_RESTART_COUNT", "0")} if "SLURM_JOB_ID" in os.environ else {}
    )
    return {"host": socket.gethostname(), "platform": platform.platform(), "cores": os.cpu_count() or 1, **job}
