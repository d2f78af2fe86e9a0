"""What the stages ask of the file systems that hold work, results and cache, done there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.schema import Experiment
from utils.run.artifacts import damage, inventory, link_or_copy, published, write_text
from utils.run.checks import Finding
from utils.run.errors import InputError
from utils.run.folders import Folders
from utils.run.lock import locked
from utils.run.places import file_system, free_space, unwritable, visited
from utils.verify.child import killed_child

OWNER = """
import sys
from pathlib import Path
from utils.run.lock import locked
from utils.verify.child import wait
with locked(Path(sys.argv[1])):
    wait()
"""


def files(folders: Folders) -> Finding:
    """Each folder of the run: files and folders are replaced in one step, locks keep others out, links and memory maps hold."""
    kinds, merged = {}, []
    for key, path in {"paths.work": folders.work, "paths.results": folders.results, "paths.cache": folders.cache}.items():
        with visited(path):
            if fault := unwritable(key, path):
                return "no", fault
            kinds[path] = file_system(path) or "a file system of unknown kind"
            with tempfile.TemporaryDirectory(prefix=".verify ", dir=path) as trial:
                if fault := first_fault(Path(trial)):
                    return "no", f"{path} (on {kinds[path]}): {fault}; choose another folder ({key}, $SCRATCH, $PROJECT)"
                if _merges_case(Path(trial)):
                    merged.append(str(path))
    if merged:
        return "warn", f"names that differ in case alone are one file in {', '.join(merged)}; give runs names that differ otherwise"
    return "ok", "renames, fsync, locks, links and memory maps hold in " + ", ".join(f"{path} ({kind})" for path, kind in kinds.items())


def space(config: Experiment, folders: Folders) -> Finding:
    """Free space against an estimate of the need."""
    found = free_space(config, folders)
    return found.verdict, found.words


def first_fault(folder: Path) -> str | None:
    """The first operation that does not do in `folder` what it must, in words."""
    for name, operation in OPERATIONS.items():
        try:
            fault = operation(folder)
        except OSError as error:
            fault = f"refused ({error.strerror})"
        if fault:
            return f"{name}: {fault}"
    return None


def _replaces_a_file(folder: Path) -> str | None:
    path = folder / "a file"
    write_text(path, "old")
    with path.open(encoding="utf-8") as reader:
        with published(path) as aside:
            aside.write_text("new", encoding="utf-8")
            number = aside.stat().st_ino
        if reader.read() != "old":
            return "a reader sees the old file change, expected it whole until it is closed"
    found = path.read_text(encoding="utf-8")
    return None if (found, path.stat().st_ino) == ("new", number) else f"found a copy with {found!r}, expected the renamed file itself"


def _replaces_a_folder(folder: Path) -> str | None:
    path = folder / "a folder"
    for name in ("old", "new"):
        with published(path) as aside:
            aside.mkdir()
            (aside / name).write_text(name, encoding="utf-8")
            number = aside.stat().st_ino
    found = sorted(file.name for file in path.iterdir())
    return None if (found, path.stat().st_ino) == (["new"], number) else f"found a copy with {found}, expected the renamed folder itself"


def _locks(folder: Path) -> str | None:
    with killed_child("-c", OWNER, str(folder)):
        if _can_lock(folder):
            return "two processes hold it at the same time"
    return None if _can_lock(folder) else "it stays when its owner dies, expected it to be released"


def _can_lock(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except InputError:
        return False


def _links(folder: Path) -> str | None:
    source, target = folder / "a source", folder / "a target"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    link_or_copy(source, target)
    return damage(target, inventory(source))


def _maps(folder: Path) -> str | None:
    ids = np.arange(100_000, dtype="<u4")
    ids.tofile(folder / "ids")
    mapped = np.memmap(folder / "ids", dtype="<u4", mode="r")
    return None if np.array_equal(mapped, ids) else "found other numbers than were written"


OPERATIONS: dict[str, Callable[[Path], str | None]] = {
    "replacing a file": _replaces_a_file,
    "replacing a folder": _replaces_a_folder,
    "locking": _locks,
    "linking or copying": _links,
    "mapping a file to memory": _maps,
}


def _merges_case(folder: Path) -> bool:
    (folder / "Case").touch()
    return (folder / "case").exists()
