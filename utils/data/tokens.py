"""Token files: one memory map for a split, its document index, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from typing_extensions import TypedDict

from configs.schema import Count
from utils.run.artifacts import read_json
from utils.run.errors import InputError

# the columns of a split beside its tokens, one entry a document: where it ends in tokens.bin, its size in bytes of UTF-8, the number of its
# subset, and the key of its whole text
COLUMNS = {"ends": "<i8", "bytes": "<i8", "subset": "<u2", "keys": "V16"}


@dataclass(frozen=True)
class Mark:
    """Where a shard ends: pieces of the source that were used up and those of them left out as duplicates, documents and tokens
    written, all counted from the beginning of the split, and the SHA-256 of what the shard added to the files."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pieces: Count = 0
    duplicates: Count = 0
    documents: Count = 0
    tokens: Count = 0
    sha256: str = ""


class Index(TypedDict):
    """index.json of a split."""

    dtype: Literal["<u2", "<u4"]
    end_of_text: int
    subsets: list[str]
    documents: int
    tokens: int
    duplicates: int
    complete: bool
    shards: list[Mark]


@dataclass(frozen=True)
class Tokens:
    """A tokenised split on disk: tokens.bin (each document ends in end-of-text), a file for each column, index.json."""

    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        return read_json(self.folder / "index.json", Index)

    @cached_property
    def ids(self) -> NDArray[np.unsignedinteger]:
        """(N,) all tokens, memory-mapped."""
        return self._mapped("tokens", self.index["dtype"], self.index["tokens"])

    def column(self, name: str) -> NDArray[Any]:
        """(documents,) one of COLUMNS, memory-mapped."""
        return self._mapped(name, COLUMNS[name], self.index["documents"])

    def _mapped(self, name: str, dtype: str, count: int) -> NDArray[Any]:
        path, expected = self.folder / f"{name}.bin", count * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected or not expected:
            raise InputError(f"{path}: expected a file of {expected} bytes, as index.json says, and more than none; remove its folder")
        return np.memmap(path, dtype=dtype, mode="r")

    @property
    def end_of_text(self) -> int:
        return self.index["end_of_text"]

    def documents(self) -> list[NDArray[np.int64]]:
        """Ids of each document, without its end-of-text."""
        ends = self.column("ends").tolist()
        return [self.ids[start : end - 1].astype(np.int64) for start, end in zip([0, *ends], ends, strict=False)]

    def subset_names(self) -> list[str]:
        """Subset of each document."""
        return [self.index["subsets"][number] for number in self.column("subset").tolist()]

    def counts(self, vocabulary: int) -> NDArray[np.int64]:
        """(vocabulary,) how often each id occurs."""
        counts = np.zeros(vocabulary, dtype=np.int64)
        for start in range(0, len(self.ids), 1 << 24):
            counts += np.bincount(self.ids[start : start + (1 << 24)], minlength=vocabulary)
        return counts


class PackedBatches:
    """Training sequences cut from the token stream, each predicting `length` tokens.

    Neighbouring sequences share one token, so that every token but the first is predicted exactly once an epoch (the last
    tokens, too few for a sequence, are left out).
    """

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.ids, self.length, self.seed = tokens.ids, length, seed
        self.count = (len(self.ids) - 1) // length
        if self.count < 1:
            raise InputError(f"{tokens.folder}: found {len(self.ids)} tokens, expected at least {length + 1} (sequence_length + 1)")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int, size: int) -> NDArray[np.int64]:
        """(size, length + 1) ids of optimiser step `step`: a pure function of (seed, step, size)."""
        places = np.arange(step * size, (step + 1) * size)
        return self.sequences(np.array([self._permuted(*divmod(place, self.count)) for place in places.tolist()]))

    def all_sequences(self) -> NDArray[np.int64]:
        """(count, length + 1) ids of the whole split, in order."""
        return self.sequences(np.arange(self.count))

    def sequences(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(numbers), length + 1) ids of the numbered sequences."""
        return np.stack([self.ids[number * self.length : (number + 1) * self.length + 1] for number in numbers.tolist()]).astype(np.int64)

    def _permuted(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])
