"""Activations that are monotone, and an exhaustive check that an implementation is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

GELU_MINIMUM = -0.751791524693564  # where GELU has its only minimum: Phi(z) + z phi(z) = 0


class ClampedGELU(nn.Module):
    """GELU(max(z, z0)) with z0 the place of GELU's minimum: non-decreasing, and equal to GELU above z0."""

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.gelu(z.clamp(min=GELU_MINIMUM))


ACT2FN["clamped_gelu"] = ClampedGELU


def decreases(activation: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[int, float]:
    """How often the running implementation falls between neighbours of all finite bf16 numbers, and by how much at most.

    Exhaustive for bf16 inputs; for fp32 a test on 65,280 points from -3.4e38 to 3.4e38 (rounding of 1e-6 is allowed there).
    """
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    grid = codes.view(torch.bfloat16)
    grid = grid[torch.isfinite(grid)].float().sort().values
    with torch.no_grad():
        values = activation(grid.to(device, dtype)).float()
    if values.isnan().any():
        return int(values.isnan().sum()), float("inf")
    falls = values[:-1] - values[1:]
    falls = falls[falls > (1e-6 if dtype == torch.float32 else 0.0)]
    return falls.numel(), float(falls.max()) if falls.numel() else 0.0
