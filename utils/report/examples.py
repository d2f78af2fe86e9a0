"""Attacked texts to look at: the worst and typical ones of each arm, token by token. Their text is hostile: it is made visible here
and escaped where it is shown."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

from utils.report.robustness import LONGER
from utils.report.study import ARMS, Study


@dataclass(frozen=True)
class Token:
    """`old` is the token that stood here, where it was changed; `scored` tokens are never touched."""

    text: str
    old: str | None
    scored: bool


@dataclass(frozen=True)
class Example:
    """One text under the attack that raised its loss most; losses in nats per untouched token."""

    model: str
    kind: str  # worst or typical
    attack: str
    text: str
    subset: str
    seed: int
    clean: float
    attacked: float
    tokens: list[Token]


def examples(study: Study) -> list[Example]:
    """`report.examples` of the largest rises and as many around the median, for each arm."""
    wanted, needed = study.config.report.examples, {"tokenizer", "attack_texts"}
    tokenizers = {seed: _tokenizer(paths["tokenizer"]) for seed, paths in study.files.items() if needed <= set(paths)}
    found = []
    for model in ARMS:
        rows = _worst_of_each_text(study, model, set(tokenizers))
        middle = max(wanted, (len(rows) - wanted) // 2)
        chosen = [("worst", rows.iloc[:wanted]), ("typical", rows.iloc[middle : middle + wanted])]
        found += [_example(study, kind, row, tokenizers[row["seed"]]) for kind, some in chosen for _, row in some.iterrows()]
    return found


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _worst_of_each_text(study: Study, model: str, seeds: set[int]) -> pd.DataFrame:
    """The row of the largest rise for each text over attacks of the common budget and seeds, largest first; only rows that say which
    tokens were changed."""
    rows = study.flips[(study.flips["model"] == model) & study.flips["seed"].isin(seeds) & (study.flips["attack"] != LONGER)]
    rows = rows.loc[rows["flips"].map(lambda flips: isinstance(flips, list)).astype(bool)]
    return rows.sort_values(["rise", "seed", "text"], ascending=[False, True, True]).drop_duplicates("text")


def _example(study: Study, kind: str, row: pd.Series, tokenizer: Tokenizer) -> Example:
    texts = {text["id"]: text["ids"] for text in study.json[row["seed"]]["attack_texts"]["sets"]["hotflip"]}
    flips = row["flips"][: study.config.hotflip.flips]
    attack = f"{row['attack']}:{row['found_on']}".rstrip(":")
    tokens = tokens_of(texts[row["text"]], flips, study.config.hotflip.prefix_tokens, tokenizer)
    clean, attacked = float(row["clean"]), float(row["clean"] + row["rise"])
    return Example(row["model"], kind, attack, row["text"], row["subset"], int(row["seed"]), clean, attacked, tokens)


def tokens_of(ids: list[int], flips: list[dict[str, Any]], prefix: int, tokenizer: Tokenizer) -> list[Token]:
    """The attacked text; flips are {position, old, new}, positions counted from the first token of the text."""
    changed = {flip["position"]: flip for flip in flips}

    def word(number: int) -> str:
        return visible(tokenizer.decode([number], skip_special_tokens=False))

    return [
        Token(word(changed[place]["new"]), word(changed[place]["old"]).replace("\n", ""), False)
        if place in changed
        else Token(word(number), None, place >= prefix)
        for place, number in enumerate(ids)
    ]


def visible(text: str) -> str:
    """Characters that show nothing, or that turn the direction of what follows, become their code; a line end is marked and kept."""
    return "".join(_shown(each) for each in text)


def _shown(each: str) -> str:
    if each == "\n":
        return "\u23ce\n"
    hidden = unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return f"\\u{ord(each):04x}" if hidden else each
