"""Prefetching: the same batches in the same order, errors come through, the thread ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.tiny_models import write_tokens
from utils.data.tokens import PackedBatches
from utils.training.batches import AHEAD, prefetched

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> PackedBatches:
    return PackedBatches(write_tokens(tmp_path / "tokens", 100), 8, seed=5)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("steps", [range(0), range(1), range(7), range(3, 9), range(2, 3)])
def test_batches_are_those_of_their_steps(source: PackedBatches, tmp_path: Path, steps: range) -> None:
    found = list(prefetched(source, 4, steps, CPU))
    assert len(found) == len(steps)
    assert all((ids.numpy() == source.batch(step, 4)).all() for step, ids in zip(steps, found, strict=True))
    assert threads() == []


def test_coming_batches_are_read_ahead_and_no_more(source: PackedBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = source.batch
    monkeypatch.setattr(source, "batch", lambda step, size: asked.append(step) or real(step, size))
    stream: Iterator[torch.Tensor]
    with closing(prefetched(source, 2, range(20), CPU)) as stream:
        next(stream)
        next(stream)
        assert set(asked) <= set(range(2 + AHEAD))
    assert threads() == []
    assert max(asked) <= 1 + AHEAD


def test_an_error_of_the_reader_is_raised(source: PackedBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    real = source.batch

    def fail(step: int, size: int) -> object:
        if step == 2:
            raise OSError(5, "Input/output error", "tokens.bin")
        return real(step, size)

    monkeypatch.setattr(source, "batch", fail)
    stream = prefetched(source, 2, range(5), CPU)
    next(stream)
    next(stream)
    with pytest.raises(OSError, match="Input/output error"):
        next(stream)
    assert threads() == []
