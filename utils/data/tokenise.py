"""All splits of an experiment, tokenised once, without overlap between them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from configs.schema import Data, Experiment
from utils.data.attack_texts import wanted
from utils.data.encode import Encode, Ids, encoded, encoder
from utils.data.published import published_at, published_identity
from utils.data.shards import KEY_BYTES, Shards
from utils.data.sources import SPLITS, Row, Source, TextUnavailable, describe
from utils.data.tokenizer import copy_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from utils.data.tokens import Tokens
from utils.run.artifacts import inventory, left_behind, link_or_copy, remove, write_json, write_sealed
from utils.run.cache import cached
from utils.run.errors import InputError
from utils.run.preemption import Stop
from utils.run.progress import Progress

VERSION = 3  # raise it when a change of this package changes the tokens
PROOF_TEXTS = 64
WHITE_SPACE = b" \t\n\r\v\f"
SAME_SHARE = 0.95  # the parts at the ends of a packed sequence may be cut within a word
COUNTED = ("documents", "tokens", "bytes", "duplicates")


@dataclass(frozen=True)
class Limits:
    """At most so many `tokens` in the split, and of a document, its end-of-text not counted."""

    tokens: int
    longest: int | None = None


@dataclass(frozen=True)
class Piece:
    """One document of a source: `place` counts the pieces of the split up to it, `duplicates` those among them that were left out."""

    row: Row
    key: bytes
    place: int
    duplicates: int


def token_cache(config: Experiment, root: Path, stop: Stop, check: Callable[[Path], None] | None = None) -> Path:
    """Folder with tokenizer/, tokens/{test,attack,validation,train}, unigram_counts.npy, counts.json and source.json.

    It is built if it is not there. If the hub cannot give the configured text, the configuration's fallback is read instead, and that is
    said. A published model's folder or GGUF file is given to `check` before any text is read. Raises InputError.
    """
    try:
        return _cache_of(config, config.data, root, stop, check, None)
    except TextUnavailable as error:
        if config.data.fallback is None:
            raise InputError(f"{error}. (data.fallback can name other text to be read in such a case)") from None
        print(f"  WARNING: the configured text cannot be had: {error}", flush=True)
        print(f"  WARNING: data.fallback is read instead: {', '.join(config.data.fallback.train)}", flush=True)
        data = config.data.model_copy(update={"files": config.data.fallback, "fallback": None})
        return _cache_of(config, data, root, stop, check, str(error))


def _cache_of(config: Experiment, data: Data, root: Path, stop: Stop, check: Callable[[Path], None] | None, instead: str | None) -> Path:
    """`instead`: why `data` stands in for what was configured."""
    shape, limits = config.model.scratch, _limits(config)
    identity: dict[str, Any] = {"train here": shape.vocabulary} if shape else published_identity(config.model)
    description = {"version": VERSION, "source": describe(data), "tokenizer": identity}
    description["limits"] = {split: [limit.tokens, limit.longest] for split, limit in limits.items()}

    def build(target: Path, state: Path) -> None:
        source = Source.of(data, root, stop)
        if shape:
            save_tokenizer(train_tokenizer((row.text for row in source.rows("train")), shape.vocabulary), target / "tokenizer")
            end_of_text = 0
        else:
            published = published_at(config.model, root, stop)
            if check:
                check(published)
            end_of_text = copy_tokenizer(config.model, published, target / "tokenizer")
        words = load_tokenizer(target / "tokenizer")
        _keep_only_if_made_from({"text": source.origins, "tokenizer": inventory(target / "tokenizer")}, state)
        counts = tokenise(source, words, end_of_text, limits, state / "tokens", stop)
        link_or_copy(state / "tokens", target / "tokens")
        np.save(target / "unigram_counts.npy", Tokens(target / "tokens" / "train").counts(words.get_vocab_size()))
        write_json(target / "counts.json", counts)
        write_json(target / "source.json", {"fallback_because": instead, "origins": source.origins} | describe(data))

    return cached(root, "tokens", description, build, stop)


def _keep_only_if_made_from(inputs: dict[str, Any], state: Path) -> None:
    """Give up the shards of an interrupted build if they were made from something else: a branch on the hub may have moved since."""
    noted = state / "inputs.json"
    if left_behind(noted) != inputs:
        remove(state / "tokens")
        write_sealed(noted, inputs)


def _limits(config: Experiment) -> dict[str, Limits]:
    """Of every split; an attack text is the beginning of a document."""
    sets = wanted(config).values()
    longest = max(length for _, length in sets)
    stock = 8 * sum(count for count, _ in sets) * (longest + 1)  # many documents are too short to be used
    data = config.data
    return {
        "train": Limits(data.train_tokens),
        "validation": Limits(data.validation_tokens),
        "test": Limits(data.test_tokens),
        "attack": Limits(stock, longest),
    }


def tokenise(
    source: Source, words: Tokenizer, end_of_text: int, limits: dict[str, Limits], folder: Path, stop: Stop
) -> dict[str, dict[str, int]]:
    """Write folder/<split> for every split, going on after the shards that are there; returns the counts of each.

    Held-out splits are written first. A later document whose text (white space apart) is already in another split is left
    out and counted as `duplicates`. Memory is bounded by some shards and the keys of the held-out documents.
    """
    encode = encoder(words, [row.text for row in islice(source.rows("test"), PROOF_TEXTS) if row.ids is None])
    held_out: set[bytes] = set()
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        shards = Shards(folder / split, words.get_vocab_size(), end_of_text)
        if not shards.complete:
            rows = _documents(source.rows(split), words, end_of_text)
            _write(shards, _Fresh(rows, held_out, shards), words, encode, limits[split], stop)
        tokens = Tokens(folder / split)
        if tokens.index["tokens"] <= tokens.index["documents"]:  # end-of-text alone
            raise InputError(f"data: found no text for the split {split!r}, expected at least one document; give more text (data.*)")
        counts[split] = {name: int(tokens.column("bytes").sum()) if name == "bytes" else tokens.index[name] for name in COUNTED}
        if split != "train":
            held_out |= {bytes(key) for key in tokens.column("keys")}
    return counts


def _write(shards: Shards, fresh: _Fresh, words: Tokenizer, encode: Encode, limits: Limits, stop: Stop) -> None:
    """Documents until the text or the limit ends."""
    progress = Progress(f"tokenise {shards.folder.name}", limits.tokens, done=shards.tokens)
    place, duplicates = shards.marks[-1].pieces, shards.marks[-1].duplicates
    for piece, made in encoded(iter(fresh), lambda piece: piece.row.text if piece.row.ids is None else None, encode):
        room = limits.tokens - shards.tokens
        if room < 2:
            break
        ids = piece.row.ids if made is None else made
        assert ids is not None
        kept = ids[: min(room - 1, limits.longest or room)]
        shards.add(kept, _size(piece.row.text, kept, ids, words), piece.row.subset, piece.key)
        place, duplicates = piece.place, piece.duplicates
        if shards.full:
            shards.mark(place, duplicates)
            progress.advance(shards.tokens - progress.done)
            stop.check()
    else:
        place, duplicates = fresh.place, fresh.duplicates
    shards.mark(place, duplicates, complete=True)
    progress.advance(shards.tokens - progress.done)
    progress.close()


def _size(text: str, kept: Ids, ids: Ids, words: Tokenizer) -> int:
    """Bytes of UTF-8 of the text that the kept ids stand for."""
    if len(kept) == len(ids):
        return len(text.encode(errors="replace"))
    if not len(kept):
        return 0
    shown = len(words.decode(kept.tolist(), skip_special_tokens=False))
    for end in (2 * shown + 1000, len(text)):  # most often the beginning tells
        encoding = words.encode(text[:end], add_special_tokens=False)
        if encoding.ids[: len(kept)] == kept.tolist():
            break
    return len(text[: encoding.offsets[len(kept) - 1][1]].encode(errors="replace"))


class _Fresh:
    """The documents that are in no held-out split before this one, after those that the shards hold; counts what it passes over."""

    def __init__(self, rows: Iterator[Row], held_out: set[bytes], shards: Shards) -> None:
        self.rows, self.held_out = rows, held_out
        self.place, self.duplicates = shards.marks[-1].pieces, shards.marks[-1].duplicates

    def __iter__(self) -> Iterator[Piece]:
        for row in islice(self.rows, self.place, None):
            self.place += 1
            if (key := key_of(row.text)) in self.held_out:
                self.duplicates += 1
            else:
                yield Piece(row, key, self.place, self.duplicates)


def key_of(text: str) -> bytes:
    """What two texts that differ in white space (of ASCII) alone have in common."""
    return hashlib.blake2b(text.encode(errors="replace").translate(None, WHITE_SPACE), digest_size=KEY_BYTES).digest()


def _documents(rows: Iterator[Row], words: Tokenizer, end_of_text: int) -> Iterator[Row]:
    """Rows of text as they are; a packed sequence of ids as the documents in it, the first and the last of which may be parts."""
    proven = False
    for row in rows:
        if row.ids is None:
            yield row
            continue
        proven = proven or _proven(row.ids, words, end_of_text)
        for ids in _split(row.ids, end_of_text):
            yield Row(words.decode(ids.tolist(), skip_special_tokens=False), row.subset, row.split, ids)


def _split(ids: NDArray[np.int64], end_of_text: int) -> list[NDArray[np.int64]]:
    parts = np.split(ids, np.flatnonzero(ids == end_of_text) + 1)
    return [part for part in (part[part != end_of_text] for part in parts) if len(part)]


def _proven(ids: NDArray[np.int64], words: Tokenizer, end_of_text: int) -> bool:
    """Refuse ids that another tokenizer made: decoded and encoded again, nearly all must come back."""
    parts, same = [part.tolist() for part in _split(ids, end_of_text)], 0
    if ids.min() >= 0 and ids.max() < words.get_vocab_size():
        texts = words.decode_batch(parts, skip_special_tokens=False)
        again = words.encode_batch(texts, add_special_tokens=False)
        same = sum((Counter(part) & Counter(encoding.ids)).total() for part, encoding in zip(parts, again, strict=True))
    if same < SAME_SHARE * sum(map(len, parts)):
        raise InputError(
            f"data.files: found token_ids of which {same} of {sum(map(len, parts))} come back after decoding and encoding; "
            "expected those of this model's own tokenizer. Name text, or ids made by it"
        )
    return True
