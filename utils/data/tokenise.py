"""All splits of an experiment, tokenised once, without overlap between them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema import Experiment
from utils.data.attack_texts import wanted
from utils.data.sources import SPLITS, Row, describe, rows
from utils.data.tokenizer import fetch_tokenizer, load_tokenizer, published_identity, save_tokenizer, train_tokenizer
from utils.data.tokens import write_split
from utils.run.artifacts import write_json
from utils.run.cache import cached
from utils.run.errors import InputError
from utils.run.preemption import Stop

VERSION = 1  # raise it when a change of this package changes the tokens


def token_cache(config: Experiment, root: Path, stop: Stop) -> Path:
    """Folder with tokenizer/, tokens/{test,attack,validation,train} and counts.json, built if it is not there."""
    shape, limits = config.model.scratch, _limits(config)
    identity: dict[str, Any] = {"train here": shape.vocabulary} if shape else published_identity(config.model)
    description = {"version": VERSION, "source": describe(config.data), "tokenizer": identity, "limits": limits}

    def build(target: Path, state: Path) -> None:
        if shape:
            save_tokenizer(train_tokenizer((row.text for row in rows(config.data, "train")), shape.vocabulary), target / "tokenizer")
            end_of_text = 0
        else:
            end_of_text = fetch_tokenizer(config.model.name, config.model.revision, target / "tokenizer")
        write_json(target / "counts.json", tokenise(config, target / "tokenizer", end_of_text, limits, target / "tokens"))

    return cached(root, "tokens", description, build, stop)


def _limits(config: Experiment) -> dict[str, list[int | None]]:
    """{split: [tokens at most, tokens of a document at most]}; an attack text is the beginning of a document."""
    sets = wanted(config).values()
    longest = max(length for _, length in sets)
    stock = 8 * sum(count for count, _ in sets) * (longest + 1)  # many documents are too short to be used
    data = config.data
    return {
        "train": [data.train_tokens, None],
        "validation": [data.validation_tokens, None],
        "test": [data.test_tokens, None],
        "attack": [stock, longest],
    }


def tokenise(
    config: Experiment, tokenizer: Path, end_of_text: int, limits: dict[str, list[int | None]], target: Path
) -> dict[str, dict[str, int]]:
    """Write target/<split> for every split; return the counts of each.

    Held-out splits are written first. A later document whose text (white space apart) is already in another split is left
    out and counted as `duplicates`.
    """
    words = load_tokenizer(tokenizer)
    seen: dict[bytes, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        fresh = _Fresh(rows(config.data, split), seen, remember=split != "train")
        limit, longest = limits[split]
        assert limit is not None
        counts[split] = write_split(target / split, fresh, words, end_of_text, limit, longest)
        counts[split]["duplicates"] = fresh.dropped
        if counts[split]["tokens"] <= counts[split]["documents"]:  # end-of-text alone
            raise InputError(f"data: found no text for the split {split!r}, expected at least one document; give more text (data.*)")
    return counts


class _Fresh:
    """The rows whose text is in no earlier split; counts the others."""

    def __init__(self, stream: Iterator[Row], seen: dict[bytes, str], remember: bool) -> None:
        self.stream, self.seen, self.remember, self.dropped = stream, seen, remember, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.stream:
            key = hashlib.blake2b(re.sub(r"\s+", " ", row.text).strip().encode(errors="replace"), digest_size=16).digest()
            if self.seen.get(key, row.split) != row.split:
                self.dropped += 1
                continue
            if self.remember:
                self.seen[key] = row.split
            yield row
