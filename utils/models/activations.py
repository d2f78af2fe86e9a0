"""Activations that are monotone, and an exhaustive check that an implementation is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation

GELU_MINIMUM = -0.751791524693564  # where GELU has its only minimum: Phi(z) + z phi(z) = 0
FAR = -6.0  # a clamp there changes GELU by less than 1e-8


class ClampedGELU(nn.Module):
    """GELU(max(z, z0)) with z0 the place of GELU's minimum: non-decreasing, and equal to GELU above z0."""

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.gelu(z.clamp(min=GELU_MINIMUM))


ACT2FN["clamped_gelu"] = ClampedGELU


class Annealed(nn.Module):
    """On the way from `old` (a = 1) to `new` (a = 0). From GELU to clamped GELU the clamp moves in from FAR; others are mixed:
    a old + (1 - a) new."""

    share: Tensor

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        super().__init__()
        self.old, self.new = old, new
        exact = isinstance(old, GELUActivation) or (isinstance(old, nn.GELU) and old.approximate == "none")
        self.moves_clamp = exact and isinstance(new, ClampedGELU)
        self.register_buffer("share", torch.ones(()), persistent=False)  # a tensor, so that compiled code need not change with it

    def forward(self, z: Tensor) -> Tensor:
        if self.moves_clamp:
            return nn.functional.gelu(torch.maximum(z, (GELU_MINIMUM + self.share * (FAR - GELU_MINIMUM)).to(z.dtype)))
        return self.share * self.old(z) + (1 - self.share) * self.new(z)


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


def negative_outputs(activation: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> bool:
    """Whether it gives a negative value on the same numbers. A non-decreasing function has its smallest value at the lowest."""
    lowest = torch.tensor([torch.finfo(torch.bfloat16).min, -1e4, -1.0], device=device, dtype=dtype)
    with torch.no_grad():
        return bool((activation(lowest) < 0).any())
