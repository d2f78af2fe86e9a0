"""The best of many edits for all texts together, without scoring all of them on all texts.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): all edits are scored on a few texts, the better ones on more. Scores
are exact all along, and those of the winners are over all texts; what may differ from scoring everything is which edit wins.

K edits of m tokens, M texts of T tokens, S scored tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.attacks.scoring import Scorer

FIRST = 4  # texts of the first round


@torch.no_grad()
def race(
    scorer: Scorer, ids: Tensor, places: Tensor, tokens: Tensor, scored: int, keep: float = 0.5, least: int = 1
) -> tuple[Tensor, Tensor]:
    """(numbers (F,), mean NLL over all texts (F,) in nats per token, fp64) of the edits that reach the last round, best first.

    ids (M, T), places and tokens (K, m). Every round has twice the texts of the one before and the share `keep` of its edits, but no
    fewer than `least`. Results stay on the device.
    """
    alive, seen = torch.arange(len(places), device=ids.device), 0
    total = torch.zeros(len(places), dtype=torch.float64, device=ids.device)
    while seen < len(ids):
        texts = ids[seen : max(FIRST, 2 * seen)]
        which = torch.arange(len(texts), device=ids.device).repeat(len(alive))
        where, what = (each[alive].repeat_interleave(len(texts), dim=0) for each in (places, tokens))
        total[alive] += scorer.edited_nll(texts, which, where, what, scored).view(len(alive), -1).double().sum(dim=1)
        seen += len(texts)
        left = len(alive) if seen == len(ids) else min(len(alive), max(least, math.ceil(len(alive) * keep)))
        alive = alive[total[alive].topk(left).indices]
    return alive, total[alive] / len(ids)
