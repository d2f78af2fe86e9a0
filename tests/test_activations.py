"""Monotone activations and the check that finds the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from utils.models.activations import GELU_MINIMUM, ClampedGELU, decreases

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.ReLU(), ClampedGELU(), ACT2FN["relu"], ACT2FN["clamped_gelu"], nn.Sigmoid()])
def test_monotone_activations_never_decrease(activation: nn.Module, dtype: torch.dtype) -> None:
    assert decreases(activation, dtype) == (0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), ACT2FN["gelu"]])
def test_gelu_and_silu_decrease(activation: nn.Module, dtype: torch.dtype) -> None:
    count, deepest = decreases(activation, dtype)
    assert count > 100
    assert deepest > 1e-3


def test_the_check_is_exhaustive_in_bf16() -> None:
    class Notch(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return torch.where(z == 1.0078125, 0.5, z)  # the bf16 number that follows 1

    assert decreases(Notch(), torch.bfloat16) == (1, 0.5)


def test_the_clamp_stands_at_the_minimum_of_gelu() -> None:
    z = torch.linspace(-2, 0, 2_000_001, dtype=torch.float64)
    values = nn.functional.gelu(z)
    assert float(z[values.argmin()]) == pytest.approx(GELU_MINIMUM, abs=2e-6)
    clamped = ClampedGELU()(z)
    assert bool((clamped.diff() >= 0).all())
    assert torch.equal(clamped[z >= GELU_MINIMUM], values[z >= GELU_MINIMUM])
    assert float(clamped.min()) == pytest.approx(float(values.min()), abs=1e-12)


def test_an_activation_that_gives_nan_is_not_monotone() -> None:
    class Root(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.sqrt()

    falls, deepest = decreases(Root())
    assert falls > 30_000 and deepest == float("inf")
