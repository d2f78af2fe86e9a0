"""What one planted fault came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """`survived`: the results are those of an undisturbed run, or the fault was refused with one clear reason and nothing was lost."""

    fault: str
    survived: bool
    found: str
    lost_steps: int = 0  # finished training steps that had to be done again, beyond the last due save
