"""Attention without a mask: the same numbers, no look at the position ids, and everything as before afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils

from tests.builders import small_model
from utils.models import attention
from utils.models.attention import packed_causal
from utils.run.errors import InputError

IDS = torch.arange(24).reshape(2, 12)


def test_same_numbers_without_looking_for_packed_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' search for packed texts makes the host wait for the device in every forward pass."""
    model = small_model()
    expected = model(IDS).logits
    searched = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: searched.append(1))
    model(IDS)
    assert searched == [1]
    with packed_causal(model):
        torch.testing.assert_close(model(IDS).logits, expected)
    assert searched == [1]
    assert model.config._attn_implementation == "sdpa"


def test_it_is_causal() -> None:
    model = small_model()
    with packed_causal(model), torch.no_grad():
        before = model(IDS).logits
        changed = IDS.clone()
        changed[:, 7] = 50
        after = model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_everything_is_put_back_after_an_error() -> None:
    models = [small_model(), small_model(1)]
    with pytest.raises(KeyError), packed_causal(*models):
        raise KeyError
    assert [model.config._attn_implementation for model in models] == ["sdpa", "sdpa"]


def test_a_window_shorter_than_the_sequence_is_refused() -> None:
    key = torch.zeros(1, 1, 12, 8)
    module = SimpleNamespace(is_causal=True)
    with pytest.raises(InputError, match="attention sees 4 tokens back, expected the whole sequence of 12"):
        attention._attention(module, key, key, key, None, sliding_window=4)
    assert attention._attention(module, key, key, key, None, sliding_window=12)[0].shape == (1, 12, 1, 8)


def test_on_a_gpu_the_fastest_kernels_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextmanager
    def spy(order: list[Any], set_priority: bool) -> Any:
        asked.append((order, set_priority))
        yield

    monkeypatch.setattr(attention, "sdpa_kernel", spy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = []
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), set_attn_implementation=names.append)
    with packed_causal(model):
        pass
    assert asked == [(attention.FASTEST_FIRST, True)]
    assert names == [attention.NAME, "sdpa"]
