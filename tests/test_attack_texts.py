"""Disjoint sets of attack texts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from configs.schema import Experiment
from tests.builders import token_folder
from utils.data.attack_texts import Alphabet, read_attack_texts, wanted, write_attack_texts
from utils.data.tokenizer import END_OF_TEXT
from utils.run.errors import InputError

Documents = list[list[int]]


@pytest.fixture
def stock() -> Documents:
    """60 different documents of 10 to 40 tokens."""
    draw = np.random.default_rng(0)
    return [draw.integers(1, 90, size).tolist() for size in draw.integers(10, 41, 60)]


def sets_of(stock: Documents, config: Experiment, root: Path) -> dict[str, list[dict]]:
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 1, "b": 2, "pad": 3}, unk_token="a"))  # noqa: S106 - no password
    tokenizer.add_special_tokens([END_OF_TEXT, "pad"])
    sizes = write_attack_texts(token_folder(root / "attack", stock), tokenizer, config, root / "texts.json")
    sets, alphabet = read_attack_texts(root / "texts.json")
    assert alphabet == Alphabet(end_of_text=0, entries=4, special=(0, 3))
    assert alphabet.writable().tolist() == [1, 2]
    assert sizes == {name: len(texts) for name, texts in sets.items()}
    return sets


def test_sets_have_the_wanted_sizes_and_lengths(stock: Documents, tiny: Experiment, tmp_path: Path) -> None:
    sets = sets_of(stock, tiny, tmp_path)
    assert wanted(tiny) == {"hotflip": (6, 16), "report": (6, 16), "search": (4, 16), "select": (4, 16)}
    for name, (count, length) in wanted(tiny).items():
        assert [len(text["ids"]) for text in sets[name]] == [length] * count


def test_a_text_is_the_beginning_of_its_document(stock: Documents, tiny: Experiment, tmp_path: Path) -> None:
    for texts in sets_of(stock, tiny, tmp_path).values():
        for text in texts:
            assert text["ids"] == stock[int(text["id"].removeprefix("attack-"))][:16]
            assert text["subset"] == "prose"


def test_no_document_and_no_text_is_in_two_sets(stock: Documents, tiny: Experiment, tmp_path: Path) -> None:
    repeated = [document for document in stock for _ in range(3)] + [[*document[:16], 1, 2, 3] for document in stock]
    sets = sets_of(repeated, tiny, tmp_path)
    for key in ("id", "ids"):
        members = {name: {str(text[key]) for text in texts} for name, texts in sets.items()}
        assert all(len(members[name]) == len(texts) for name, texts in sets.items())
        assert not any(members[first] & members[second] for first, second in combinations(members, 2))


def test_too_little_text_is_refused_with_numbers(stock: Documents, tiny: Experiment, tmp_path: Path) -> None:
    long = [document for document in stock if len(document) >= 16]
    expected = r"found 3 unused documents of at least 16 tokens for the set 'select', expected 4; give more text \(data\.\*\)"
    with pytest.raises(InputError, match=expected):
        sets_of(long[:19], tiny, tmp_path)
    assert not (tmp_path / "texts.json").exists()
