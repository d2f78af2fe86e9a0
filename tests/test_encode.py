"""The fast encoder gives what the stored tokenizer gives, or is not used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from utils.data import encode as encode_module
from utils.data.encode import encoded, encoder
from utils.data.tokenizer import train_tokenizer

TEXTS = [f"def f{number}(x):\n        return x**{number} # häuser and 漢字   {number * 7919}\r\n\n" for number in range(200)]
SNIPPETS = (
    *(" ", "  ", "   ", " " * 24, " " * 25, " " * 49, "\n", "\n\n", "\t", "\r\n", "\v", "\x1c", "\x85", "\u2028", "\xa0", "\u3000"),
    *(
        "'s",
        "'ll",
        "'S",
        "'",
        "a",
        "Z",
        "1",
        "12",
        "é",
        "e\u0301",
        "漢",
        "😀",
        "👍🏽",
        "!",
        "...",
        "_",
        "\x00",
        "²",
        "½",
        "ﬁ",
        "İ",
        "\u200d",
        "\ufeff",
    ),
    *("<|endoftext|>", "<|padding|>", "\ufdd0\ufdd1", "the", "ing", "return"),
)


def like_neox() -> Tokenizer:
    """As GPT-NeoX's and Pythia's: NFC, byte-level BPE, runs of 2 to 24 blanks as entries of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(" " * length, normalized=True, special=False) for length in range(24, 1, -1)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def like_gpt2() -> Tokenizer:
    tokenizer = train_tokenizer(iter(TEXTS), 400)
    tokenizer.encode_special_tokens = True
    return tokenizer


def fast(tokenizer: Tokenizer) -> encode_module.Encode:
    found = encode_module._by_tiktoken(tokenizer, encode_module._by_tokenizers(tokenizer))
    assert found is not None
    return found


def drawn(count: int) -> list[str]:
    generator = random.Random(7)
    return ["".join(generator.choices(SNIPPETS, k=generator.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("make", [like_neox, like_gpt2])
def test_fast_ids_are_the_stored_tokenizers(make: Callable[[], Tokenizer]) -> None:
    """Random mixtures of what cuts a text, and every character of the first planes in a context that would show a difference."""
    tokenizer = make()
    characters = [chr(code) for code in (*range(0x3400), *range(0xA000, 0xA800), *range(0xF900, 0x10400), *range(0x1F300, 0x1F400))]
    around = [f"a{one}b 1{one}2 {one}{one}  {one}\n" for one in characters]
    texts = [*TEXTS, *drawn(3000), *around]
    for text, one, other in zip(texts, fast(tokenizer)(texts), encode_module._by_tokenizers(tokenizer)(texts), strict=True):
        assert one.tolist() == other.tolist(), repr(text)


def test_runs_that_the_fast_pattern_gives_up_on() -> None:
    tokenizer, asked = like_neox(), []

    def slow(texts: Sequence[str]) -> list[encode_module.Ids]:
        asked.append(texts)
        return encode_module._by_tokenizers(tokenizer)(texts)

    fast = encode_module._by_tiktoken(tokenizer, slow)
    assert fast is not None
    texts = ["\n" * 1_100_000, "x" * 100_000, " " * 100_000]
    for text in texts:
        assert np.array_equal(fast([text])[0], tokenizer.encode(text, add_special_tokens=False).ids)
    assert asked == [texts[:1]]


def test_end_of_text_in_a_document_is_text() -> None:
    ids = encoder(like_neox(), TEXTS[:3])(["a<|endoftext|>b"])[0]
    assert 0 not in ids.tolist() and len(ids) > 5


def test_a_fast_encoder_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = like_neox()
    monkeypatch.setattr(encode_module, "PIECES", r"\S")  # no merging
    assert encoder(tokenizer, TEXTS[:1])(["return x"])[0].tolist() == tokenizer.encode("return x").ids
    assert fast(tokenizer)(["return x"])[0].tolist() != tokenizer.encode("return x").ids


def changed(tokenizer: Tokenizer, change: str) -> Tokenizer:
    """Merges in another order than the ids of what they make; or an entry that is not spelt in the characters for bytes."""
    stored = json.loads(tokenizer.to_str())
    if change == "other order":
        stored["model"]["merges"].reverse()
    else:
        stored["model"]["vocab"]["漢"] = stored["model"]["vocab"].pop("".join(stored["model"]["merges"].pop()))
    return Tokenizer.from_str(json.dumps(stored))


@pytest.mark.parametrize("change", ["word level", "other normaliser", "prefix space", "other added entry", "other order", "other alphabet"])
def test_other_tokenizers_take_the_slow_way(change: str) -> None:
    tokenizer = like_neox()
    if change == "word level":
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # noqa: S106 - no password
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif change == "other normaliser":
        tokenizer.normalizer = normalizers.Lowercase()
    elif change == "prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "other added entry":
        tokenizer.add_tokens([AddedToken("xyz", special=False)])
    else:
        tokenizer = changed(tokenizer, change)
    assert encode_module._by_tiktoken(tokenizer, encode_module._by_tokenizers(tokenizer)) is None
    assert encoder(tokenizer)(["a B"])[0].tolist() == tokenizer.encode("a B", add_special_tokens=False).ids


def test_threads_keep_the_order_and_pass_over_items_without_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "CHUNK", 3000)
    items = [None if number % 7 == 0 else f"{number}" for number in range(500)]
    found = list(encoded(items, lambda item: item, lambda texts: [np.array([int(text)]) for text in texts], threads=3))
    assert [item for item, _ in found] == items
    assert all(ids is None if item is None else ids is not None and ids.tolist() == [int(item)] for item, ids in found)


def test_reading_is_ahead_by_a_bounded_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "CHUNK", 3000)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "word"

    stream = encoded(endless(), lambda item: item, lambda texts: [np.array([1])] * len(texts), threads=2)
    for _ in range(10):
        next(stream)
    assert taken < 20


def test_a_long_text_is_cut_where_the_tokenizer_cuts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random mixtures of what the pattern treats in its own way, in parts of any size."""
    chance, pieces = random.Random(5), [*" \n\t\x1c\x85\u3000ab'sé\u0301中9.,", "  ", "\n\n", "'ll", "<|endoftext|>", "😀"]
    words = train_tokenizer(iter(["".join(chance.choices(pieces, k=3000))]), 400)
    slow = encode_module._by_tokenizers(words)
    for size in (1, 7, 40):
        monkeypatch.setattr(encode_module, "CHUNK", size)
        for _ in range(60):
            text = "".join(chance.choices(pieces, k=150))
            assert "".join(encode_module.parts(text)) == text
            assert slow([text])[0].tolist() == words.encode(text, add_special_tokens=False).ids
    assert max(map(len, encode_module.parts("ab cd " * 50))) < 48
