"""The price of a token row against PyTorch's own count of operations, and sums of work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from tests import architectures
from utils.attacks.work import Prices, Work


def test_pythia_1_4b() -> None:
    """N without embeddings = 1,208,602,624."""
    config = GPTNeoXConfig(vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192)
    with torch.device("meta"):
        prices = Prices.of(AutoModelForCausalLM.from_config(config))
    assert prices == Prices(2 * 1_208_602_624, 2 * 50304 * 2048)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2", "opt"])
def test_products_are_what_pytorch_counts(kind: str) -> None:
    """It counts matrix products alone: attention's, which are not charged, are left out; vectors, which it leaves out, are small."""
    model = architectures.architecture(kind)
    ids = torch.ones(1, 9, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    work = Prices.of(model).scoring(1, 9, 9)
    vectors = sum(parameter.numel() for parameter in model.base_model.parameters() if parameter.ndim == 1)
    assert work.flops - 2 * 9 * vectors == products


def test_a_gradient_costs_three_times_as_much() -> None:
    prices = Prices(10, 3)
    assert prices.gradient(2, 8, 4) == Work(0, 2, 8, 8, 4, 0, 3 * prices.scoring(2, 8, 4).flops)
    assert prices.scoring(2, 8, 4, cached=5) == Work(2, 0, 8, 0, 4, 5, 92)


def test_work_adds_and_subtracts() -> None:
    one, two = Work(1, 2, 3, 4, 5, 6, 7), Work(10, 10, 10, 10, 10, 10, 10)
    assert two - one + one == two
    assert sum([one, one], Work()) == Work(2, 4, 6, 8, 10, 12, 14)
