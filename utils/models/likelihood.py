"""Mean token loss of a language model over packed sequences."""

from __future__ import annotations

from collections.abc import Callable

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


def token_losses(model: PreTrainedModel, ids: Tensor, precision: str) -> Tensor:
    """ids (b, T + 1) -> (b*T,) nats of each predicted token, without gradient."""
    hidden = last_hidden(model, ids[:, :-1], precision)
    return token_nll(hidden, model.get_output_embeddings(), ids[:, 1:].flatten(), product_dtype(precision))


def mean_nll(model: PreTrainedModel, sequences: NDArray[np.int64], batch_size: int, precision: str) -> float:
    """sequences (n, T + 1) -> negative log-likelihood of the n*T predicted tokens, nats per token; every token counts alike."""
    total = summed_nll(lambda ids: token_losses(model, ids, precision), sequences, batch_size, model.device)
    return float(total) / (sequences.shape[0] * (sequences.shape[1] - 1))


@torch.no_grad()
def summed_nll(
    losses: Callable[[Tensor], Tensor], sequences: NDArray[np.int64], batch_size: int, device: torch.device, rank: int = 0, size: int = 1
) -> Tensor:
    """Scalar in fp64 on the device: nats summed over the sequences that fall to process `rank` of `size`.

    losses: ids (batch_size, T + 1) -> (batch_size*T,). Every pass of every process has `batch_size` rows (the last is filled up, and the
    surplus not counted): a compiled model knows one shape, and no process waits for another's pass.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(sequences), batch_size * size):
        rows = sequences[start : start + batch_size * size]
        filled = np.resize(rows, (batch_size * size, rows.shape[1]))[rank * batch_size : (rank + 1) * batch_size]
        counted = min(max(len(rows) - rank * batch_size, 0), batch_size)
        total += losses(torch.from_numpy(filled).to(device))[: counted * (rows.shape[1] - 1)].double().sum()
    return total
