"""The learning rate of a step: linear warm-up, then a cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, peak: float, warmup_share: float, final_share: float) -> float:
    """Rate of the 0-based `step`: rises linearly over the first `warmup_share` of the steps, falls to `final_share` of the peak."""
    warmup = round(steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return peak * (final_share + (1 - final_share) * (1 + math.cos(math.pi * along)) / 2)
