"""Mean token loss of a language model over packed sequences."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from utils.models.head import token_nll
from utils.models.loading import autocast, product_dtype


def last_hidden(model: PreTrainedModel, ids: Tensor, precision: str) -> Tensor:
    """ids (b, T) -> (b*T, d) what the unembedding reads."""
    with autocast(model.device, precision):
        return model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def mean_nll(model: PreTrainedModel, sequences: NDArray[np.int64], batch_size: int, precision: str) -> float:
    """sequences (n, T + 1) -> negative log-likelihood of the n*T predicted tokens, nats per token; every token counts alike.

    Every forward pass has `batch_size` rows (the last is filled up, and the surplus not counted): a compiled model knows one shape.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    head, dtype = model.get_output_embeddings(), product_dtype(precision)
    for start in range(0, len(sequences), batch_size):
        rows = sequences[start : start + batch_size]
        ids = torch.from_numpy(np.resize(rows, (batch_size, rows.shape[1]))).to(model.device)
        losses = token_nll(last_hidden(model, ids[:, :-1], precision), head, ids[:, 1:].flatten(), dtype)
        total += losses[: rows.shape[0] * (rows.shape[1] - 1)].double().sum()
    return float(total) / (sequences.shape[0] * (sequences.shape[1] - 1))
