"""Files that exist completely or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from utils.run.errors import InputError

TEMPORARY = ".tmp-"
SEAL = "sha256_of_the_rest"
_PART = r"([^/.][^/]*|\.[^/.][^/]*|\.\.[^/]+)"
Name = Annotated[str, Field(pattern=rf"^(\.|{_PART}(/{_PART})*)$")]  # of a file below a folder, never outside of it; "." is the file itself


class Facts(TypedDict):
    """What an inventory says of a file."""

    sha256: str
    bytes: int


Inventory = dict[Name, Facts]


class Listed(TypedDict):
    """A file with an inventory."""

    files: Inventory


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are not there, so that all their names survive a power loss."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def settle(path: Path) -> None:
    """Bring a file, or a folder with all files and names in it, to the disk."""
    for part in (*sorted(path.rglob("*")), path):
        sync(part)


@contextmanager
def published(path: Path, near: Path | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to fill (a file or a folder); move it to `path` only if the block succeeds.

    With `near`, a folder on the same file system, the temporary lies there: for a place that no stage sweeps.
    A file that is there is replaced in one step. A folder that is there is removed just before the move: call this on
    a folder only where it is derived data that its manifest no longer vouches for.
    """
    make_folder(path.parent)
    aside = (near or path.parent) / f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        yield aside
        settle(aside)
        if aside.is_dir() and path.is_dir():
            shutil.rmtree(path)
        aside.replace(path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say where
        raise
    except Exception as error:  # the writers of safetensors and tokenizers hide the OSError in a text
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    finally:
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder that may or may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`, at any depth."""
    for leftover in list(folder.rglob(f"{TEMPORARY}*")):
        remove(leftover)


def write_text(path: Path, text: str, near: Path | None = None) -> None:
    with published(path, near) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: NaN and infinity raise ValueError before anything is touched."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


MADE_AGAIN = "remove it to have it made again"


def read_json(path: Path, shape: Any = Any, cure: str = MADE_AGAIN) -> Any:
    """The value in a JSON file if it has the type `shape`, as pydantic understands it; of a dataclass an instance.

    Raises InputError, with what to do, for what is no such file. One that cannot be read now may be as good as ever, and is not to be
    removed or made again for that: it raises OSError.
    """
    return _shaped(path, _parsed(path, cure), shape, cure)


def _parsed(path: Path, cure: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found{', a link to nothing; put back what it named' if path.is_symlink() else ''}") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise InputError(f"{path}: expected a JSON file, found something else ({error}); {cure}") from None
    except OSError as error:
        error.filename = error.filename or str(path)  # a read that fails does not say where
        raise


def _shaped(path: Path, value: Any, shape: Any, cure: str) -> Any:
    try:
        made = _checked(shape).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))[:80]
        raise InputError(f"{path}: expected a file of ours, found {place!r}: {fault['msg']}; {cure}") from None
    return made if is_dataclass(shape) else value


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON that carries its own checksum: for what no manifest vouches for."""
    written = json.loads(json.dumps(value, allow_nan=False))  # as it is read again: keys are text there
    write_json(path, {**written, SEAL: value_digest(written)})


def read_sealed(path: Path, shape: Any = Any, cure: str = MADE_AGAIN, always: bool = True) -> Any:
    """As `read_json`; InputError also for what is not as it was written. Unless `always`, a file without a checksum is taken as it is."""
    value = _parsed(path, cure)
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if (always or seal is not None) and not _is_digest(seal, value):
        raise InputError(f"{path}: expected what its own checksum stands for, found a damaged file; {cure}")
    return _shaped(path, value, shape, cure)


def _is_digest(seal: Any, value: Any) -> bool:
    try:
        return bool(seal == value_digest(value))
    except (ValueError, RecursionError):  # we write no NaN, and nothing deep
        return False


def left_behind(path: Path, shape: Any = Any) -> Any:
    """What an earlier start wrote with `write_sealed`; None if there is nothing, and if it is damaged, which is said."""
    try:
        return read_sealed(path, shape) if path.exists() else None
    except InputError as error:
        print(f"  {error.args[0].rpartition(';')[0]}; it is made again")
        return None


@lru_cache
def _checked(shape: Any) -> TypeAdapter[Any]:
    if is_dataclass(shape):
        with_config(ConfigDict(extra="forbid"))(shape)  # type: ignore[type-var]
    return TypeAdapter(shape)


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files of a folder in a fixed order."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:
    """Python 3.10 has no hashlib.file_digest."""
    state = hashlib.sha256()
    while block := handle.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def inventory(path: Path) -> Inventory:
    """{relative name: {sha256, bytes}} of a file (name ".") or of every file of a folder."""
    return {file.relative_to(path).as_posix(): Facts(sha256=file_digest(file), bytes=file.stat().st_size) for file in files_below(path)}


def damage(path: Path, expected: Inventory, contents: bool = True) -> str | None:
    """What is wrong with a file or folder against its inventory, in words; None if it is intact. Without `contents` by size alone."""
    for name, facts in expected.items():
        file = path if name == "." else path / name
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{file} has {size} bytes, expected {facts['bytes']}"
        if contents and file_digest(file) != facts["sha256"]:
            return f"{file} differs from its SHA-256 checksum"
    return None


def link_or_copy(source: Path, target: Path) -> None:
    """Place a file or folder at `target` by hard links, by copies where links are not possible."""
    with published(target) as aside:
        for file in files_below(source):
            place = aside if file == source else aside / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:
                shutil.copyfile(file, place)
