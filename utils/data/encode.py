"""Texts to token ids on all cores: tiktoken where it proves equal to the stored tokenizer, the tokenizers library elsewhere."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.integer]
Encode = Callable[[Sequence[str]], list[Ids]]  # texts -> ids of each; may be called by several threads at once
T = TypeVar("T")

PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"  # Radford et al. 2019, as the tokenizers library writes it
BLANKS = r"|\s++$|\s+(?!\S)|\s"
CHUNK = 1 << 20  # characters that a thread encodes at a time


SEAM = re.compile(r"(?<=\S)[ \n](?=\S)")  # where PIECES and BLANKS cut in any case, whatever stands around


def encoder(tokenizer: Tokenizer, proof: Sequence[str] = ()) -> Encode:
    """The fastest way to the ids that `tokenizer` gives, without special tokens.

    tiktoken is used if it agrees on every entry of the vocabulary and on the texts of `proof`.
    """
    slow = _by_tokenizers(tokenizer)
    if (fast := _by_tiktoken(tokenizer, slow)) is None:
        return slow
    texts = [*tokenizer.decode_batch([[number] for number in tokenizer.get_vocab().values()], skip_special_tokens=False), *proof]
    same = all(np.array_equal(one, other) for one, other in zip(fast(texts), slow(texts), strict=True))
    return fast if same else slow


def encoded(
    items: Iterable[T], text: Callable[[T], str | None], encode: Encode, threads: int | None = None
) -> Iterator[tuple[T, Ids | None]]:
    """Items with the ids of their texts, in order; None for an item without a text. Reading goes on while threads encode."""
    threads = threads or len(os.sched_getaffinity(0))
    waiting: deque[tuple[list[T], Future[list[Ids]]]] = deque()

    def first() -> Iterator[tuple[T, Ids | None]]:
        chunk, future = waiting.popleft()
        ids = iter(future.result())
        return ((item, None if text(item) is None else next(ids)) for item in chunk)

    with ThreadPoolExecutor(threads) as pool:
        for chunk in _chunks(items, text):
            waiting.append((chunk, pool.submit(encode, [found for item in chunk if (found := text(item)) is not None])))
            if len(waiting) > threads:
                yield from first()
        while waiting:
            yield from first()


def _chunks(items: Iterable[T], text: Callable[[T], str | None]) -> Iterator[list[T]]:
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += len(text(item) or "") + 1000  # many empty ones are a chunk too
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def parts(text: str) -> list[str]:
    """A long text, cut where the byte-level pattern cuts it in any case: the library needs some 200 bytes of memory a character."""
    found, start = [], 0
    while len(text) - start > CHUNK and (seam := SEAM.search(text, start + CHUNK)):
        found.append(text[start : seam.start()])
        start = seam.start()
    return [*found, text[start:]]


def _by_tokenizers(tokenizer: Tokenizer) -> Encode:
    cut = parts if _pattern(json.loads(tokenizer.to_str())) else lambda text: [text]

    def one(text: str) -> Ids:
        found = (tokenizer.encode_batch_fast([part], add_special_tokens=False)[0].ids for part in cut(text))
        return np.concatenate([np.array(ids, dtype=np.uint32) for ids in found])

    def encode(texts: Sequence[str]) -> list[Ids]:
        if any(len(text) > CHUNK for text in texts):
            return [one(text) for text in texts]
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    return encode


def _by_tiktoken(tokenizer: Tokenizer, slow: Encode) -> Encode | None:
    """The same byte-level BPE in tiktoken; None where the tokenizer is of another kind."""
    stored = json.loads(tokenizer.to_str())
    model, added, pattern = stored["model"], stored["added_tokens"], _pattern(stored)
    if (
        model["type"] != "BPE"
        or pattern is None
        or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "byte_fallback"))
    ):
        return None
    byte = _byte_characters()
    special = {token["content"] for token in added if token["special"]}
    try:
        ranks = {bytes(byte[character] for character in entry): number for entry, number in model["vocab"].items() if entry not in special}
    except KeyError:  # an entry that is not spelt in the 256 characters for bytes
        return None
    ranks |= {token["content"].encode(): token["id"] for token in added if not token["special"]}
    merges = [model["vocab"]["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    if any(first > second for first, second in pairwise(merges)) or not all(bytes([code]) in ranks for code in range(256)):
        return None  # tiktoken takes the id for the priority of the merge
    # Without any special token tiktoken looks for one at every character, and takes half as long again. This one is never allowed.
    core = tiktoken.Encoding("stored", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"\ufdd0\ufdd1": max(ranks.values()) + 1})
    normalise = stored["normalizer"] is not None

    def one(text: str) -> Ids:
        if normalise and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        try:
            return core.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its pattern gives up on very long runs of line ends
            return slow([text])[0]

    return lambda texts: [one(text) for text in texts]


def _pattern(stored: dict[str, Any]) -> str | None:
    """How a text is cut before merging. Added entries, which GPT-NeoX has for runs of blanks, are cut out first."""
    added = [token["content"] for token in stored["added_tokens"] if not token["special"]]
    if (stored["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return None
    cut = stored["pre_tokenizer"] or {}
    if cut.get("type") != "ByteLevel" or cut.get("add_prefix_space") or not cut.get("use_regex", True):
        return None
    if not added:
        return PIECES + BLANKS
    lengths = sorted(map(len, added))
    if any(entry.strip(" ") for entry in added) or lengths != list(range(2, lengths[-1] + 1)):
        return None
    blank = r"(?:(?! {2})\s)"  # one that begins no run
    return rf"{PIECES}| {{2,{lengths[-1]}}}|{blank}+(?= {{2}}|$)|{blank}+(?!\S)|{blank}"


def _byte_characters() -> dict[str, int]:
    """{character of a byte-level vocabulary: byte}: printable bytes stand for themselves, the others are counted from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [code for code in range(256) if code not in shown]
    return {chr(code): code for code in shown} | {chr(256 + place): code for place, code in enumerate(hidden)}
