"""The referee against the loss that transformers itself computes from labels."""

from __future__ import annotations

import pytest
import torch

from tests import architectures
from tests.tiny_models import random_ids, random_model, slow_nll
from utils.attacks.referee import Referee
from utils.run.errors import InputError


@pytest.mark.parametrize("scored", [1, 6, 14])
def test_every_text_and_token(scored: int) -> None:
    """More texts than one pass holds."""
    model, ids = random_model(), random_ids(11, 14)
    referee = Referee(model)
    assert referee.nll(ids, scored).tolist() == pytest.approx([slow_nll(model, row, scored) for row in ids.tolist()], rel=1e-6)
    single = [slow_nll(model, ids[3].tolist()[: 15 - back], 1) for back in reversed(range(scored))]
    assert referee.token_nll(ids, scored)[3].tolist() == pytest.approx(single, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_other_architectures(kind: str) -> None:
    model = architectures.architecture(kind)
    ids = torch.randint(1, architectures.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    assert Referee(model).nll(ids, 5).tolist() == pytest.approx([slow_nll(model, row, 5) for row in ids.tolist()], rel=1e-5)


def test_products_are_full_while_it_scores_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    found = []
    model.register_forward_pre_hook(lambda module, args: found.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        Referee(model).nll(random_ids(2, 14), 3)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["highest"]


def test_weights_in_another_format_are_refused() -> None:
    with pytest.raises(InputError, match=r"found weights in torch.bfloat16, expected torch.float32 for the reported losses"):
        Referee(random_model().bfloat16())
