"""What a gradient is worth on a text: whether it foretells the true gain of substitutions, and whether bf16 gives the same one."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import HotFlip
from utils.attacks.controls import random_substitutions
from utils.attacks.hotflip import rank_correlation
from utils.attacks.scoring import Scorer

SUBSTITUTIONS = 64  # random ones for each text


def gradient_facts(exact: Scorer, rough: Scorer, ids: Tensor, text_id: str, spec: HotFlip, allowed: Tensor) -> dict[str, float | None]:
    """Facts of one clean text ids (T,), by scorers of one model in fp32 (`exact`) and bf16 (`rough`).

    `random_rank_correlation`: Spearman's, of predicted and true gain of random substitutions. Unlike that of the candidates,
    which are the best ones by prediction, it is over the whole range. `bf16_cosine`: cosine of the gradients of bf16 and fp32, all
    prefix tokens in one vector; None where one of them is zero.
    """
    prefix = slice(1, 1 + spec.prefix_tokens)
    slope, rounded = (each.gradient(ids[None], spec.scored_tokens, prefix)[0] for each in (exact, rough))
    current, tokens = ids[prefix], np.flatnonzero(allowed.cpu().numpy())
    key = ("foretold", text_id)
    drawn = random_substitutions(spec.seed, key, SUBSTITUTIONS, current.cpu().numpy(), np.arange(spec.prefix_tokens), tokens)
    places, new = torch.from_numpy(drawn).to(ids.device).T
    predicted = (slope[places] * (exact.embeddings[new] - exact.embeddings[current[places]])).sum(dim=1)
    which = torch.zeros_like(places)
    true = exact.edited_nll(ids[None], which, 1 + places[:, None], new[:, None], spec.scored_tokens)
    known = bool(slope.any()) and bool(rounded.any())
    return {
        "random_rank_correlation": rank_correlation(predicted.cpu().numpy(), true.cpu().numpy()),
        "bf16_cosine": float(F.cosine_similarity(slope.flatten(), rounded.flatten(), dim=0)) if known else None,
    }
