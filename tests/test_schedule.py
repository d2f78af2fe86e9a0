"""The learning rate against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from utils.training.schedule import learning_rate


def scheduled(steps: int, warmup: int, final_share: float) -> list[float]:
    """Linear warm-up from the first step, then a cosine, both by torch, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    rates = []
    for _ in range(warmup):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rising.step()
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=final_share)
    for _ in range(steps - warmup):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        falling.step()
    return rates


@pytest.mark.parametrize(("steps", "share", "final"), [(100, 0.1, 0.1), (37, 0.25, 0.0), (20, 0.5, 1.0), (9, 0.15, 0.3)])
def test_equals_torch(steps: int, share: float, final: float) -> None:
    rates = [learning_rate(step, steps=steps, peak=3e-4, warmup_share=share, final_share=final) for step in range(steps)]
    assert rates == pytest.approx([3e-4 * rate for rate in scheduled(steps, round(steps * share), final)], rel=1e-9)


def test_the_peak_is_reached_and_no_step_is_wasted() -> None:
    rates = [learning_rate(step, steps=50, peak=1e-3, warmup_share=0.2, final_share=0.1) for step in range(50)]
    assert max(rates) == 1e-3
    assert min(rates) > 0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_all_or_nothing_of_warm_up(steps: int, share: float) -> None:
    rates = [learning_rate(step, steps=steps, peak=1.0, warmup_share=share, final_share=0.5) for step in range(steps)]
    assert rates[-1 if share else 0] == 1.0
    assert all(0 < rate <= 1 for rate in rates)
