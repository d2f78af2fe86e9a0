"""Exact scores of edited texts on a fixed set of untouched tokens.

Shapes: N edited texts, T tokens of each, S scored tokens at the end, V vocabulary, d width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from utils.models.loading import autocast

ADMITTED = 1e-6  # nats per token; a smaller gain is rounding, and no edit is accepted for it
ROW_BUDGET = 16_384  # tokens of one forward pass; bounds memory whatever the number of candidates


class Scorer:
    """Scores token ids under one model. Only the rows that are scored go through the unembedding."""

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        self.model, self.precision = model.eval(), precision
        model.requires_grad_(False)
        self.embeddings: Tensor = model.get_input_embeddings().weight  # (V, d)
        self.device = model.device
        self.forwards = 0  # sequences scored
        self.backwards = 0  # sequences differentiated

    @torch.no_grad()
    def nll(self, ids: Tensor, scored: int) -> Tensor:
        """ids (N, T) -> (N,) mean negative log-likelihood of the last `scored` tokens, nats per token, fp32."""
        return self.token_nll(ids, scored).mean(dim=1)

    @torch.no_grad()
    def token_nll(self, ids: Tensor, scored: int) -> Tensor:
        """ids (N, T) -> (N, S) negative log-likelihood of each of the last `scored` tokens, nats."""
        self.forwards += len(ids)
        return torch.cat([self._losses(part, self._embed(part), scored) for part in self._parts(ids)])

    def edited_nll(self, ids: Tensor, which: Tensor, places: Tensor, tokens: Tensor, scored: int) -> Tensor:
        """(K,) as `nll`, of edited texts: edit k writes tokens (K, m) at places (K, m) of text ids[which[k]]; ids (B, T), which (K,)."""
        copies = ids[which]
        return self.nll(copies.scatter_(1, places, tokens), scored)

    def gradient(self, ids: Tensor, scored: int, edited: slice) -> Tensor:
        """d NLL / d embedding of the tokens in `edited`: ids (N, T) -> (N, E, d), of the mean over the scored tokens."""
        self.backwards += len(ids)
        return torch.cat([self._slope(part, scored)[:, edited] for part in self._parts(ids)])

    def _slope(self, ids: Tensor, scored: int) -> Tensor:
        embedded = self._embed(ids).requires_grad_(True)
        total = self._losses(ids, embedded, scored).mean(dim=1).sum()
        return torch.autograd.grad(total, embedded)[0]

    def _parts(self, ids: Tensor) -> tuple[Tensor, ...]:
        return ids.split(max(1, ROW_BUDGET // ids.shape[1]))

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embeddings[ids].detach()

    def _losses(self, ids: Tensor, embedded: Tensor, scored: int) -> Tensor:
        with autocast(self.device, self.precision):
            hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[:, -scored - 1 : -1])
        return F.cross_entropy(logits.float().transpose(1, 2), ids[:, -scored:], reduction="none")


def first_order_candidates(scorer: Scorer, slope: Tensor, current: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` substitutions with the largest first-order gain (e_new - e_old) . slope (Ebrahimi et al. 2018, eq. 7).

    slope (E, d), current (E,) ids, allowed (E, V) or (V,) mask -> (count, 2) of (place, token), best first.
    """
    gains = slope @ scorer.embeddings.T  # (E, V)
    gains = gains - gains.gather(1, current[:, None])
    gains = gains.masked_fill(~allowed, float("-inf"))
    gains.scatter_(1, current[:, None], float("-inf"))
    best = gains.flatten().topk(min(count, int(torch.isfinite(gains).sum()))).indices
    return torch.stack([best // gains.shape[1], best % gains.shape[1]], dim=1)


def allowed_tokens(rows: int, writable: NDArray[np.int64], device: torch.device) -> Tensor:
    """(rows,) mask of the ids that an attack may write, over the rows of the model's embedding."""
    mask = torch.zeros(rows, dtype=torch.bool, device=device)
    mask[torch.from_numpy(writable)] = True
    return mask
