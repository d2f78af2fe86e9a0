"""The referee: plain fp32 scores of whole texts, for everything that is reported.

It shares nothing with the engine of scoring.py but the model: all logits of a text, no cache, no copy in another format, TensorFloat-32
off, and attention as the model was loaded. What a search believes about its own finds counts only if the referee agrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from utils.run.errors import InputError

TEXTS = 8  # of one pass, which holds all their logits


class Referee:
    """Scores token ids under one model. Raises InputError for weights that are not fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        if model.dtype != torch.float32:
            raise InputError(
                f"model: found weights in {model.dtype}, expected torch.float32 for the reported losses; load it with load_model"
            )
        self.model, self.device = model.eval(), model.device

    def nll(self, ids: Tensor, scored: int) -> Tensor:
        """ids (N, T) -> (N,) mean negative log-likelihood of the last `scored` tokens, nats per token."""
        return self.token_nll(ids, scored).mean(dim=1)

    @torch.no_grad()
    def token_nll(self, ids: Tensor, scored: int) -> Tensor:
        """ids (N, T) -> (N, S) negative log-likelihood of each of the last `scored` tokens, nats."""
        with _full_products():
            return torch.cat([self._losses(texts, scored) for texts in ids.split(TEXTS)])

    def _losses(self, ids: Tensor, scored: int) -> Tensor:
        logits = self.model(inputs_embeds=self.model.get_input_embeddings()(ids), use_cache=False).logits  # (n, T, V)
        predicted = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])
        return -predicted[:, -scored:, 0]


@contextmanager
def _full_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
