"""Divergence and mixture against torch.distributions, and their gradient against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from utils.training.losses import divergence_sum, mixed


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 5, 11, generator=random), 3 * torch.randn(2, 5, 11, generator=random)


def test_divergence_is_from_teacher_to_model(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    model, teacher = logits
    expected = kl_divergence(Categorical(logits=teacher.double()), Categorical(logits=model.double())).sum()
    assert float(divergence_sum(model, teacher)) == pytest.approx(float(expected), rel=1e-5)


def test_divergence_from_itself_is_nothing(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert float(divergence_sum(logits[0] + 5.0, logits[0])) == pytest.approx(0.0, abs=1e-5)


def test_gradient_is_the_difference_of_probabilities(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    model, teacher = logits[0].requires_grad_(True), logits[1]
    divergence_sum(model, teacher).backward()
    assert model.grad is not None
    torch.testing.assert_close(model.grad, model.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-6)


def test_bf16_logits_are_summed_in_fp32(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    rough = [one.bfloat16() for one in logits]
    value = divergence_sum(*rough)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(divergence_sum(*[one.double().float() for one in rough])), rel=1e-6)


def test_mixture() -> None:
    cross_entropy, divergence = torch.tensor(4.0), torch.tensor(1.0)
    assert float(mixed(cross_entropy, divergence, 0.25)) == pytest.approx(0.75 * 4 + 0.25 * 1)
    assert float(mixed(cross_entropy, divergence, 0.0)) == 4.0
    assert float(mixed(cross_entropy, divergence, 1.0)) == 1.0
