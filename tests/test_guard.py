"""The judge of steps: against a slow list, with planted spikes and infinities, and after a restart."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from utils.run.errors import WorkFailed
from utils.training.guard import GOOD, JUDGED_FROM, NOT_FINITE, SPIKE, WINDOW, Guard, stop_if_lost

CPU = torch.device("cpu")


def judge(guard: Guard, loss: float, norm: float = 1.0) -> int:
    return int(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def slow(losses: list[float], rise: float) -> list[int]:
    """The rule in plain Python: a list of good losses, and statistics.median_low of the last ones."""
    good: list[float] = []
    verdicts = []
    for loss in losses:
        if not math.isfinite(loss):
            verdicts.append(NOT_FINITE)
        elif len(good) >= JUDGED_FROM and loss > statistics.median_low(good[-WINDOW:]) + rise:
            verdicts.append(SPIKE)
        else:
            verdicts.append(GOOD)
            good.append(loss)
    return verdicts


def test_against_a_slow_list() -> None:
    chance = random.Random(0)
    losses = [5 - step / 60 + chance.gauss(0, 0.3) for step in range(300)]
    for step in (3, 25, 26, 90, 200):
        losses[step] = math.nan
    for step in (10, 40, 41, 150, 299):
        losses[step] += 2.0
    losses = [float(torch.tensor(loss)) for loss in losses]
    guard = Guard(1.0, CPU)
    found = [judge(guard, loss) for loss in losses]
    assert found == slow(losses, 1.0)
    assert {GOOD, NOT_FINITE, SPIKE} == set(found)
    assert found[10] == GOOD  # too early to judge


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_bad_and_not_remembered(loss: float, norm: float) -> None:
    guard = Guard(1.0, CPU)
    assert judge(guard, 2.0) == GOOD
    assert judge(guard, loss, norm) == NOT_FINITE
    assert int(guard.count) == 1
    assert math.isinf(float(guard.recent[1]))


def test_a_restored_guard_judges_alike() -> None:
    chance = random.Random(1)
    losses = [chance.gauss(3, 0.6) for _ in range(200)]
    one = Guard(1.0, CPU)
    straight = [judge(one, loss) for loss in losses]
    first = Guard(1.0, CPU)
    before = [judge(first, loss) for loss in losses[:97]]
    second = Guard(1.0, CPU)
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    assert before + [judge(second, loss) for loss in losses[97:]] == straight
    assert SPIKE in straight


def test_too_many_in_a_row_end_the_run() -> None:
    stop_if_lost(2, 3, 7, SPIKE, 1e-3, 9.0, 1.0)
    with pytest.raises(WorkFailed, match=r"^step 7: loss 9.0, gradient norm 1.0: the last of 3 skipped steps.*\(spike\).*now 0.001"):
        stop_if_lost(3, 3, 7, SPIKE, 1e-3, 9.0, 1.0)
