"""Token files and packed batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.builders import token_folder
from utils.data import tokens as tokens_module
from utils.data.sources import Row
from utils.data.tokenizer import train_tokenizer
from utils.data.tokens import PackedBatches, Tokens, write_split
from utils.run.errors import InputError

TEXTS = [f"document {number} says häuser and 漢字 {number * 7919}" for number in range(20)]
ROWS = [Row(text, "even" if number % 2 == 0 else "odd", "train") for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 300)


def test_documents_come_back_as_they_were(tokenizer: Tokenizer, tmp_path: Path) -> None:
    counts = write_split(tmp_path / "s", ROWS, tokenizer, 0, limit=100_000)
    split = Tokens(tmp_path / "s")
    assert [tokenizer.decode(ids.tolist()) for ids in split.documents()] == TEXTS
    assert split.subset_names() == ["even", "odd"] * 10
    assert split.index["bytes"] == [len(text.encode()) for text in TEXTS]
    assert split.ids.dtype == np.dtype("<u2")
    assert (split.ids == 0).sum() == len(TEXTS)  # one end-of-text a document
    assert split.ids[-1] == split.end_of_text == 0
    assert counts == {"documents": 20, "tokens": len(split.ids), "bytes": sum(len(text.encode()) for text in TEXTS)}


def test_rows_are_encoded_in_batches_without_a_trace(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path / "large", ROWS, tokenizer, 0, limit=200)
    monkeypatch.setattr(tokens_module, "ENCODE_ROWS", 3)
    write_split(tmp_path / "small", ROWS, tokenizer, 0, limit=200)
    for name in ("tokens.bin", "index.json"):
        assert (tmp_path / "large" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


def test_the_limit_is_never_exceeded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for limit in (*range(2, 40), 200):
        counts = write_split(tmp_path / str(limit), ROWS, tokenizer, 0, limit=limit)
        split = Tokens(tmp_path / str(limit))
        assert limit - 1 <= counts["tokens"] == len(split.ids) <= limit
        assert split.ids[-1] == 0
        assert all(len(ids) for ids in split.documents())


def test_of_a_document_its_beginning_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_split(tmp_path / "s", ROWS, tokenizer, 0, limit=100_000, longest=5)
    split = Tokens(tmp_path / "s")
    for text, ids, size in zip(TEXTS, split.documents(), split.index["bytes"], strict=True):
        kept = tokenizer.decode(ids.tolist())
        assert len(ids) == 5
        assert text.startswith(kept)
        assert size == len(kept.encode())


def test_an_empty_text_is_an_empty_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    counts = write_split(tmp_path / "s", [Row("", "x", "test"), Row("a", "x", "test")], tokenizer, 0, limit=10)
    assert [len(ids) for ids in Tokens(tmp_path / "s").documents()] == [0, 1]
    assert counts == {"documents": 2, "tokens": 3, "bytes": 1}


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=min(words)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write_split(tmp_path / "s", [Row("w69999 w5", "x", "train")], tokenizer, 0, limit=10)
    assert Tokens(tmp_path / "s").ids.tolist() == [69_999, 5, 0]


@pytest.fixture
def counting(tmp_path: Path) -> Tokens:
    """121 tokens: 1, 2, ... 120 and end-of-text; 12 sequences of 10 predictions."""
    return token_folder(tmp_path / "counting", [range(1, 121)])


def test_every_token_but_the_first_is_predicted_exactly_once_an_epoch(counting: Tokens) -> None:
    packed = PackedBatches(counting, 10, seed=1)
    assert packed.count == 12
    for epoch in range(3):
        predicted = np.concatenate([packed.batch(step, 4)[:, 1:].ravel() for step in range(3 * epoch, 3 * epoch + 3)])
        assert Counter(predicted.tolist()) == Counter([*range(2, 121), 0])


def test_batches_are_unpadded_pieces_of_the_stream(counting: Tokens) -> None:
    batch = PackedBatches(counting, 10, seed=1).batch(5, 7)
    assert batch.shape == (7, 11) and batch.dtype == np.int64
    stream = [*range(1, 121), 0]
    assert all(row == stream[row[0] - 1 : row[0] + 10] for row in batch.tolist())


def test_a_batch_depends_on_seed_and_step_alone(counting: Tokens) -> None:
    straight = [PackedBatches(counting, 10, seed=1).batch(step, 5).tolist() for step in range(9)]
    resumed = PackedBatches(counting, 10, seed=1)
    assert [resumed.batch(step, 5).tolist() for step in reversed(range(9))] == straight[::-1]
    flat = PackedBatches(counting, 10, seed=1).batch(0, 45).tolist()
    assert [row for batch in straight for row in batch] == flat  # also where a batch crosses the end of an epoch
    assert flat[:12] != flat[12:24]
    assert sorted(flat[:12]) == sorted(flat[12:24])


def test_different_seeds_give_different_orders(counting: Tokens) -> None:
    orders = [PackedBatches(counting, 10, seed=seed).batch(0, 12).tolist() for seed in range(5)]
    assert all(orders[first] != orders[second] for first in range(5) for second in range(first))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_all_sequences_are_in_order_and_a_short_rest_is_left_out(counting: Tokens) -> None:
    assert PackedBatches(counting, 10, seed=1).all_sequences()[:, 0].tolist() == list(range(1, 121, 10))
    assert PackedBatches(counting, 50, seed=1).all_sequences().shape == (2, 51)


def test_too_few_tokens_are_refused(counting: Tokens) -> None:
    assert PackedBatches(counting, 120, seed=1).count == 1
    with pytest.raises(InputError, match=r"counting: found 121 tokens, expected at least 122 \(sequence_length \+ 1\)"):
        PackedBatches(counting, 121, seed=1)


def test_a_limit_that_leaves_room_for_one_token_reads_no_further(tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[Row]:
        nonlocal taken
        while taken < 100_000:
            taken += 1
            yield Row("a b c d", "prose", "train")

    tokenizer = Tokenizer(models.WordLevel({"<e>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, unk_token="a"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    counts = write_split(tmp_path / "train", endless(), tokenizer, 0, 11)
    assert counts["tokens"] == 10 and taken < 1000
