"""Judge every step on the device, before its update is made: a bad one is skipped without the host having to look."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.run.errors import WorkFailed

WINDOW, JUDGED_FROM = 64, 20  # good losses remembered; how many are needed before a rise is called a spike
GOOD, NOT_FINITE, SPIKE = 0, 1, 2
NAMES = {NOT_FINITE: "not finite", SPIKE: "spike"}


class Guard:
    """Remembers the last good losses. Its state belongs to the checkpoint: a resumed run judges as an uninterrupted one."""

    def __init__(self, max_rise: float, device: torch.device) -> None:
        self.max_rise = max_rise
        self.recent = torch.full((WINDOW,), torch.inf, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, norm: Tensor, remember: bool = True) -> Tensor:
        """Loss (nats per token) and gradient norm of a step, scalars -> its verdict, (1,) on the device. A good loss is remembered,
        unless it is of another kind than those to come."""
        known = self.count.clamp(max=WINDOW)
        median = self.recent.sort().values.gather(0, ((known - 1) // 2).clamp(min=0))  # no indexing by a tensor: the host would wait
        spike = (self.count >= JUDGED_FROM) & (loss > median + self.max_rise)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        verdict = torch.where(finite, torch.where(spike, SPIKE, GOOD), NOT_FINITE)
        good, place = (verdict == GOOD) & remember, self.count % WINDOW
        self.recent.scatter_(0, place, torch.where(good, loss, self.recent.gather(0, place)))
        self.count += good
        return verdict

    def tensors(self) -> dict[str, Tensor]:
        return {"guard.recent": self.recent, "guard.count": self.count}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])


def stop_if_lost(in_a_row: int, limit: int, step: int, verdict: int, rate: float, loss: float, norm: float) -> None:
    """Raise WorkFailed when `limit` steps in a row were skipped; nothing was changed by them."""
    if in_a_row >= limit:
        raise WorkFailed(
            f"step {step}: loss {loss}, gradient norm {norm}: the last of {in_a_row} skipped steps in a row ({NAMES[verdict]}); "
            f"the state before them is kept. Lower the learning rate (now {rate:g}), give an annealed bound more steps (training.steps, "
            "monotone.anneal_share), or raise training.max_loss_rise if the loss is expected to jump, and run with --discard"
        )
