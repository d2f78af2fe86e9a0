"""Rows of text with their subset and split, from installed packages or from files, here or on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.schema import Data, Files
from utils.data import embedded
from utils.data.formats import SUFFIXES, items, readable
from utils.run import hub
from utils.run.errors import InputError
from utils.run.patience import Unavailable
from utils.run.preemption import Stop

Split = Literal["train", "validation", "attack", "test"]
SPLITS: tuple[Split, ...] = ("test", "attack", "validation", "train")  # held-out text first: it wins over a duplicate in train


@dataclass(frozen=True)
class Row:
    """A document: its text, or, from a source that was tokenised before, its ids."""

    text: str
    subset: str
    split: Split
    ids: NDArray[np.int64] | None = None


class TextUnavailable(Unavailable):
    """The hub cannot give the text. (That it cannot give the model is no reason to read another text.)"""


@dataclass(frozen=True)
class Source:
    """The text of an experiment as it lies on this machine: installed packages, or the files of every entry."""

    data: Data
    paths: dict[str, list[Path]]
    origins: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, data: Data, cache: Path, stop: Stop) -> Source:
        """Fetch what is on the hub, complete and checked. Raises TextUnavailable or InputError before anything is read."""
        if data.files is None:
            return cls(data, {}, {})
        try:
            return cls._fetched(data, data.files, cache, stop)
        except Unavailable as error:
            raise TextUnavailable(str(error)) from None

    @classmethod
    def _fetched(cls, data: Data, files: Files, cache: Path, stop: Stop) -> Source:
        repositories = {repository: hub.fetch(repository, patterns, hub.root(cache), stop) for repository, patterns in hub.of_files(files)}
        paths: dict[str, list[Path]] = {}
        origins: dict[str, dict[str, Any]] = {}
        for entry in files.named:
            if entry.startswith("hf:"):
                repository, pattern = hub.of_entry(entry)
                there = hub.listing(repository, hub.root(cache), ask=False)
                names = there.matching([pattern])
                paths[entry] = [repositories[repository].paths[name] for name in names]
                origins[entry] = {"commit": there.commit} | {
                    name: {"bytes": there.files[name].size, "sha256": there.files[name].sha256} for name in names
                }
            else:
                paths[entry] = local_files(entry)
                origins[entry] = {str(path): {"bytes": path.stat().st_size} for path in paths[entry]}
        _refuse_shared(files, paths)
        return cls(data, paths, origins)

    def rows(self, split: Split) -> Iterator[Row]:
        """All rows of one split, in a fixed order."""
        files = self.data.files
        if files is None:
            assert self.data.embedded is not None
            for document in embedded.documents(self.data.embedded):
                if (found := _embedded_split(document.module)) == split:
                    yield Row(document.text, document.subset, found)
            return
        for entry in {"train": files.train, "test": files.test}.get(split, files.validation):
            for path in self.paths[entry]:
                yield from _of_file(path, split)


def _of_file(path: Path, split: Split) -> Iterator[Row]:
    for text, subset, ids in items(path):
        key = text if ids is None else ids.tobytes().hex()
        if split in ("validation", "attack") and (unit(key) < 0.5) != (split == "attack"):
            continue
        yield Row(text, subset, split, ids)


def describe(data: Data) -> dict[str, Any]:
    """What identifies the text of a source, for the cache: package versions, names on the hub, names, sizes and times of local files."""
    if data.embedded:
        return {"embedded": data.embedded.model_dump(mode="json"), "packages": embedded.package_versions(data.embedded.packages)}
    assert data.files is not None
    stats = {str(path): path.stat() for entry in data.files.named if not entry.startswith("hf:") for path in local_files(entry)}
    return {
        "files": data.files.model_dump(mode="json"),
        "local": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def local_files(entry: str) -> list[Path]:
    """The files of a local entry, in order: itself, those below a folder, or those that fit a pattern. Raises InputError."""
    path = Path(entry).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and readable(file))
    else:
        base = Path(path.anchor)
        found = sorted(file for file in base.glob(str(path.relative_to(base))) if file.is_file())
    if not found:
        raise InputError(f"data.files: found no file {path}; expected a file, a folder or a pattern of files, correct the path")
    if unreadable := [file for file in found if not readable(file)]:
        raise InputError(f"data.files: {unreadable[0]} is of no known kind; expected {', '.join(SUFFIXES)}")
    return found


def _refuse_shared(files: Files, paths: dict[str, list[Path]]) -> None:
    """No file may serve two splits, whatever the entries are called."""
    seen: dict[Path, str] = {}
    for split, entries in (("train", files.train), ("validation", files.validation), ("test", files.test)):
        for path in (path for entry in entries for path in paths[entry]):
            if (other := seen.setdefault(path.resolve(), split)) != split:
                raise InputError(f"data.files: {path} is in {other} and in {split}; splits must not share files, correct the patterns")


def unit(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64


def _embedded_split(module: str) -> Split:
    place = unit(module)
    return "test" if place < 0.08 else "attack" if place < 0.18 else "validation" if place < 0.22 else "train"
