"""Token files and packed batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.builders import token_folder
from utils.data.tokens import PackedBatches, Tokens
from utils.run.errors import InputError


def test_documents_and_their_columns(tmp_path: Path) -> None:
    split = token_folder(tmp_path / "s", [[5, 6, 7], [], [8]], ["prose", "code", "prose"])
    assert [ids.tolist() for ids in split.documents()] == [[5, 6, 7], [], [8]]
    assert split.ids.tolist() == [5, 6, 7, 0, 0, 8, 0]
    assert split.subset_names() == ["prose", "code", "prose"]
    assert split.column("ends").tolist() == [4, 5, 7]
    assert split.column("bytes").tolist() == [30, 0, 10]
    assert split.end_of_text == 0
    assert split.counts(10).tolist() == [3, 0, 0, 0, 0, 1, 1, 1, 1, 0]


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
