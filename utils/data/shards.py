"""Write a split shard by shard: a shard counts once it is wholly on the disk, so a killed setup goes on after the last one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.data.tokens import COLUMNS, Index, Mark
from utils.run.artifacts import left_behind, make_folder, write_sealed

SHARD_TOKENS = 1 << 22
KEY_BYTES = 16


class Shards:
    """The files of a split (see Tokens), and how far they are. What a killed process wrote after the last mark is cut off."""

    def __init__(self, folder: Path, vocabulary: int, end_of_text: int) -> None:
        make_folder(folder)
        self.folder, self.end_of_text = folder, end_of_text
        self.dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
        self.kinds = {"tokens": self.dtype} | {name: np.dtype(kind) for name, kind in COLUMNS.items()}
        self.subsets: dict[str, int] = {}
        self.marks, self.complete = [Mark()], False
        self._clear()
        self._take_up()

    @property
    def tokens(self) -> int:
        """Tokens so far, those not yet on the disk among them."""
        return self.marks[-1].tokens + self.waiting

    @property
    def documents(self) -> int:
        return self.marks[-1].documents + len(self.columns["ends"])

    @property
    def full(self) -> bool:
        return self.waiting >= SHARD_TOKENS

    def add(self, ids: NDArray[np.integer], size: int, subset: str, key: bytes) -> None:
        """One document without its end-of-text, which is put behind it; `size` in bytes of UTF-8, `key` of its text, 16 bytes."""
        self.ids += [ids.astype(self.dtype), np.array([self.end_of_text], dtype=self.dtype)]
        self.waiting += len(ids) + 1
        number = self.subsets.setdefault(subset, len(self.subsets))
        for name, value in (("ends", self.tokens), ("bytes", size), ("subset", number), ("keys", key)):
            self.columns[name].append(value)

    def mark(self, pieces: int, duplicates: int, complete: bool = False) -> None:
        """Bring the shard to the disk, then count it."""
        documents, tokens, digest = self.documents, self.tokens, hashlib.sha256()
        for name, kind in self.kinds.items():
            added = np.concatenate(self.ids) if name == "tokens" and self.ids else np.array(self.columns.get(name, []), dtype=kind)
            digest.update(added.tobytes())
            with self._path(name).open("ab") as handle:
                handle.write(added.tobytes())
                handle.flush()
                os.fsync(handle.fileno())
        self.marks.append(Mark(pieces, duplicates, documents, tokens, digest.hexdigest()))
        self.complete = complete
        self._clear()
        self._write_index()

    def _write_index(self) -> None:
        last = self.marks[-1]
        index = {"dtype": self.dtype.str, "end_of_text": self.end_of_text, "subsets": list(self.subsets)}
        index |= {"documents": last.documents, "tokens": last.tokens, "duplicates": last.duplicates, "complete": self.complete}
        write_sealed(self.folder / "index.json", index | {"shards": [asdict(mark) for mark in self.marks[1:]]})

    def _clear(self) -> None:
        self.ids: list[NDArray[np.unsignedinteger]] = []
        self.columns: dict[str, list[int | bytes]] = {name: [] for name in COLUMNS}
        self.waiting = 0

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _take_up(self) -> None:
        """Go on after the last shard that is intact, if there is one."""
        index = left_behind(self.folder / "index.json", Index) or {"shards": []}
        stored = [Mark(**mark) for mark in index["shards"]]
        for mark in stored:
            if self._digest(self.marks[-1], mark) != mark.sha256:
                print(f"  {self.folder}: a shard is damaged and made again, with those after it")
                break
            self.marks.append(mark)
        self.complete = bool(index.get("complete")) and len(self.marks) == len(stored) + 1
        last = self.marks[-1]
        for name, kind in self.kinds.items():
            with self._path(name).open("ab") as handle:
                handle.truncate(kind.itemsize * (last.tokens if name == "tokens" else last.documents))
        known = np.fromfile(self._path("subset"), dtype=COLUMNS["subset"])
        self.subsets = {name: number for number, name in enumerate(index.get("subsets", [])[: int(known.max()) + 1 if len(known) else 0])}

    def _digest(self, start: Mark, end: Mark) -> str:
        digest = hashlib.sha256()
        for name, kind in self.kinds.items():
            low, high = (start.tokens, end.tokens) if name == "tokens" else (start.documents, end.documents)
            if self._path(name).is_file():
                with self._path(name).open("rb") as handle:
                    handle.seek(low * kind.itemsize)
                    digest.update(handle.read((high - low) * kind.itemsize))
        return digest.hexdigest()
