"""Fixed-length texts for the attacks: disjoint sets of documents for search, selection, report and HotFlip."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from configs.schema import Experiment
from utils.data.tokens import Tokens
from utils.run.artifacts import read_json, write_json
from utils.run.errors import InputError

Text = dict[str, Any]  # id, subset, ids


class StoredText(TypedDict):
    id: str
    subset: str
    ids: list[int]


class StoredAlphabet(TypedDict):
    end_of_text: int
    entries: int
    special: list[int]


class Stored(TypedDict):
    """attack_texts.json."""

    alphabet: StoredAlphabet
    sets: dict[str, list[StoredText]]


@dataclass(frozen=True)
class Alphabet:
    """The ids that an attack may write: the tokenizer's entries without special tokens. A model may have more rows than that
    (Pythia's embedding is padded), and an id without a token cannot be typed by anybody."""

    end_of_text: int
    entries: int
    special: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, end_of_text: int) -> Alphabet:
        special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return cls(end_of_text, tokenizer.get_vocab_size(), tuple(sorted(special | {end_of_text})))

    def writable(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(self.entries), self.special)


def wanted(config: Experiment) -> dict[str, tuple[int, int]]:
    """{set: (number of texts, tokens of each)}."""
    uat, flips = config.uat, config.hotflip
    return {
        "hotflip": (flips.texts, flips.prefix_tokens + flips.scored_tokens),
        "report": (uat.report_texts, uat.text_tokens),
        "search": (uat.search_texts, uat.text_tokens),
        "select": (uat.select_texts, uat.text_tokens),
    }


def write_attack_texts(tokens: Tokens, tokenizer: Tokenizer, config: Experiment, path: Path) -> dict[str, int]:
    """Cut the first tokens of attack documents, one text a document, and no document in two sets. Returns the set sizes.

    Of documents that begin alike (copies, licence headers) only the first is used.
    """
    shortest = min(length for _, length in wanted(config).values())
    distinct: dict[tuple[int, ...], Text] = {}
    for number, (ids, subset) in enumerate(zip(tokens.documents(), tokens.subset_names(), strict=True)):
        text = {"id": f"attack-{number}", "subset": subset, "ids": ids.tolist()}
        distinct.setdefault(tuple(text["ids"][:shortest]), text)
    stock = list(distinct.values())
    sets: dict[str, list[Text]] = {}
    for name, (count, length) in wanted(config).items():
        fitting = [text for text in stock if len(text["ids"]) >= length][:count]
        if len(fitting) < count:
            raise InputError(
                f"attack texts: found {len(fitting)} unused documents of at least {length} tokens for the set {name!r}, "
                f"expected {count}; give more text (data.*) or ask for fewer texts (uat.*_texts, hotflip.texts)"
            )
        used = {text["id"] for text in fitting}
        stock = [text for text in stock if text["id"] not in used]
        sets[name] = [{**text, "ids": text["ids"][:length]} for text in fitting]
    write_json(path, {"alphabet": asdict(Alphabet.of(tokenizer, tokens.end_of_text)), "sets": sets})
    return {name: len(texts) for name, texts in sets.items()}


def read_attack_texts(path: Path) -> tuple[dict[str, list[Text]], Alphabet]:
    """(texts of every set, what an attack may write)."""
    stored = read_json(path, Stored)
    alphabet = stored["alphabet"]
    return stored["sets"], Alphabet(alphabet["end_of_text"], alphabet["entries"], tuple(alphabet["special"]))
