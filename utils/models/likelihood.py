"""Token losses of a language model, and their mean over packed sequences."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from utils.models.loading import autocast


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V), targets (B, T) -> scalar, nats summed over the B*T tokens, in fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def mean_nll(model: PreTrainedModel, sequences: NDArray[np.int64], batch_size: int, precision: str) -> float:
    """sequences (n, T + 1) -> negative log-likelihood of the n*T predicted tokens, nats per token; every token counts alike."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for part in np.array_split(sequences, math.ceil(len(sequences) / batch_size)):
        ids = torch.from_numpy(part).to(model.device)
        with autocast(model.device, precision):
            logits = model(ids[:, :-1], use_cache=False).logits
        total += cross_entropy_sum(logits, ids[:, 1:]).double()
    return float(total) / (sequences.shape[0] * (sequences.shape[1] - 1))
