"""The folders of a run as places on disks: can they be written, who else sees them, is there room."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.schema import Experiment
from utils.run.checks import Check
from utils.run.folders import Folders

LOCAL_FILE_SYSTEMS = {"tmpfs", "ramfs", "overlay", "ext4", "ext3", "xfs", "btrfs"}


def unwritable(name: str, path: Path) -> str | None:
    """Why a folder, of the configuration's key `name`, cannot take a file, and what to do; None if it can."""
    probe = path / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}; choose another folder ({name}, $SCRATCH, $PROJECT)"
    return None


@contextmanager
def visited(path: Path) -> Iterator[None]:
    """Remove the folders again that are made in this block on the way to `path` and are empty at its end."""
    absent = [folder for folder in (path, *path.parents) if not _there(folder)]
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in absent:
                folder.rmdir()


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def file_system(path: Path) -> str:
    """Type of the file system that holds a folder, from the kernel's list of mounts."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    named = [(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point), kind) for point, kind in mounts]
    held = [(point, kind) for point, kind in reversed(named) if path.is_relative_to(point)]  # of two mounts in one place the later one
    return max(held, key=lambda mount: len(mount[0]), default=("", ""))[1]


def free_space(config: Experiment, folders: Folders) -> Check:
    """Free space against an estimate."""
    place = next(folder for folder in (folders.work, *folders.work.parents) if _there(folder))
    free = shutil.disk_usage(place).free / 1e9
    need = needed_gigabytes(config)
    if need is None:
        return Check("disk", "warn", f"{free:.0f} GB free; the need is not known, as the size of {config.model.name} is not")
    if free < need:
        return Check("disk", "no", f"{folders.work}: {free:.0f} GB free, about {need:.0f} GB needed; make room or set paths.work")
    return Check("disk", "ok", f"{free:.0f} GB free, about {need:.1f} GB needed")


def needed_gigabytes(config: Experiment) -> float | None:
    """Models, checkpoints of both arms and tokens, in 10^9 bytes; None if the model's size is not known.

    fp32: 4 bytes a parameter in each model (base, its earlier checkpoints, two controls of equal quality, three of each seed) and 12 in
    each checkpoint (weights, two moments); checkpoints: those kept, the best one, and the one being written. Tokens: 4 bytes at most.
    """
    parameters = parameters_of(config)
    if parameters is None:
        return None
    checkpoints = 2 * (config.training.keep_last + 2) * 12
    scratch = config.model.scratch
    shared = 3 + len(scratch.earlier if scratch else config.model.earlier_revisions)
    return (parameters * (4 * shared + len(config.seeds) * (3 * 4 + checkpoints)) + 4 * config.data.train_tokens) / 1e9


def parameters_of(config: Experiment) -> float | None:
    """From the shape of a scratch model, or from the size in a published model's name, such as pythia-1.4b."""
    if shape := config.model.scratch:
        return shape.vocabulary * shape.hidden * 2 + shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate)
    named = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", config.model.name.lower())
    return float(named[1]) * {"b": 1e9, "m": 1e6}[named[2]] if named else None
