"""Token files: one memory map for a split, its document index, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from utils.data.sources import Row
from utils.run.artifacts import read_json, write_json
from utils.run.errors import InputError
from utils.run.progress import Progress

ENCODE_ROWS = 256


def write_split(
    folder: Path, rows: Iterable[Row], tokenizer: Tokenizer, end_of_text: int, limit: int, longest: int | None = None
) -> dict[str, int]:
    """Tokenise rows to `folder`: tokens.bin (each document ends in end-of-text) and index.json.

    Stops at `limit` tokens; keeps at most `longest` tokens of a document. Memory is bounded by one batch of rows.
    Returns {documents, tokens, bytes}.
    """
    folder.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4")
    ends, sizes, subsets, total = [0], [], [], 0
    names: dict[str, int] = {}
    progress = Progress(f"tokenise {folder.name}", limit)
    stream = iter(rows)
    with (folder / "tokens.bin").open("wb") as handle:
        while limit - total >= 2 and (batch := list(islice(stream, ENCODE_ROWS))):
            for row, encoding in zip(batch, tokenizer.encode_batch([row.text for row in batch], add_special_tokens=False), strict=True):
                room = limit - total
                if room < 2:
                    break
                kept = encoding.ids[: min(room - 1, longest or room)]
                ids = np.array([*kept, end_of_text], dtype=dtype)
                handle.write(ids.tobytes())
                total += len(ids)
                ends.append(total)
                text = row.text if len(kept) == len(encoding.ids) else row.text[: encoding.offsets[len(kept) - 1][1]]
                sizes.append(len(text.encode(errors="replace")))
                subsets.append(names.setdefault(row.subset, len(names)))
            progress.advance(total - progress.done)
    progress.close()
    index = {"dtype": dtype.str, "end_of_text": end_of_text, "ends": ends, "bytes": sizes, "subset": subsets, "subsets": list(names)}
    write_json(folder / "index.json", index)
    return {"documents": len(sizes), "tokens": total, "bytes": sum(sizes)}


@dataclass(frozen=True)
class Tokens:
    """A tokenised split on disk."""

    folder: Path

    @cached_property
    def index(self) -> dict:
        return read_json(self.folder / "index.json")

    @cached_property
    def ids(self) -> NDArray[np.unsignedinteger]:
        """(N,) all tokens, memory-mapped."""
        return np.memmap(self.folder / "tokens.bin", dtype=self.index["dtype"], mode="r")

    @property
    def end_of_text(self) -> int:
        return self.index["end_of_text"]

    def documents(self) -> list[NDArray[np.int64]]:
        """Ids of each document, without its end-of-text."""
        ends = self.index["ends"]
        return [self.ids[start : end - 1].astype(np.int64) for start, end in pairwise(ends)]

    def subset_names(self) -> list[str]:
        """Subset of each document."""
        return [self.index["subsets"][number] for number in self.index["subset"]]


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
