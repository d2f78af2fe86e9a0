"""Exact scores of edited texts on a fixed set of untouched tokens: the fast engine of every search.

One pass holds many edits of many texts, as many as its budget of token rows allows. Rows before an edit are those of the unedited
text, whose keys and values are computed once. Only scored rows go through the unembedding, whose logits exist a chunk at a time.
What is reported is scored again by referee.py, which shares nothing with this file.

Shapes: N texts, B unedited texts, K edits of m tokens each, T tokens of a text, S scored tokens at the end, V vocabulary, d width.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.attacks.budget import Budget
from utils.attacks.edits import LEAST_PREFIX, Edits
from utils.attacks.work import Prices, Work
from utils.models.attention import ANY_SHAPE, packed_causal
from utils.models.head import hidden_slope, token_nll
from utils.models.loading import product_dtype
from utils.models.prefix import Pairs, Prefix, Recorder

ADMITTED = 1e-6  # nats per token; a smaller gain is rounding, and no edit is accepted for it


class Scorer:
    """Scores token ids under one model. `model` stays as it is; with bf16 a copy in bf16 runs, with losses in fp32."""

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        self.model, self.precision = model.eval(), precision
        model.requires_grad_(False)
        self.dtype = product_dtype(precision)
        self.network = in_format(model, self.dtype)
        self.device = model.device
        self.embeddings = _table(model)  # (V, d) fp32, as they enter the first block
        self.prices, self.work = Prices.of(model), Work()
        self.forwards = self.backwards = 0  # as in `work`: sequences scored and differentiated
        self.by_text: list[Work] = []  # of the latest call, for each of its texts
        self.budget = Budget()
        self._seen: tuple[Tensor, Pairs] | None = None  # texts of the latest gradient and their keys and values

    def forget(self) -> None:
        """Drop the keys and values of the latest gradient, so that what comes does not depend on what was done before."""
        self._seen = None

    @torch.no_grad()
    def nll(self, ids: Tensor, scored: int) -> Tensor:
        """ids (N, T) -> (N,) mean negative log-likelihood of the last `scored` tokens, nats per token, fp32."""
        return self.token_nll(ids, scored).mean(dim=1)

    @torch.no_grad()
    def token_nll(self, ids: Tensor, scored: int) -> Tensor:
        """ids (N, T) -> (N, S) negative log-likelihood of each of the last `scored` tokens, nats."""
        count, rows = len(ids), ids.shape[1] - 1
        self._charge([self.prices.scoring(1, rows, scored)] * count, self.prices.scoring(count, count * rows, count * scored))
        return self.budget.spread(lambda part: self._losses(ids[part], scored), count, rows)

    @torch.no_grad()
    def edited_nll(self, ids: Tensor, which: Tensor, places: Tensor, tokens: Tensor, scored: int) -> Tensor:
        """(K,) as `nll`, of edited texts: edit k writes tokens (K, m) at places (K, m) of text ids[which[k]]; ids (B, T), which (K,).

        Equal edits are scored once. The host waits for the device once, to sort the edits by place.
        """
        count, length = ids.shape
        edits, start = Edits.of(ids, which, places, tokens, scored), 0
        kept = bool(edits.first.any())  # without beginnings to keep, fewer texts at a time need no less memory
        while start < count:
            size = self.budget.sequences(count - start, length) if kept else count
            run = partial(self._score_group, ids, edits, slice(start, start + size), scored)
            if self.budget.attempt(run, size * length, kept and size > 1):
                start += size
        works = edits.works(self.prices, length - 1, scored)
        self._charge(works, sum(works, Work()))
        return edits.nll[edits.back]

    def gradient(self, ids: Tensor, scored: int, edited: slice) -> Tensor:
        """d NLL / d embedding of the tokens in `edited`: ids (N, T) -> (N, E, d) fp32, of the mean over the scored tokens."""
        count, rows = len(ids), ids.shape[1] - 1
        self._charge([self.prices.gradient(1, rows, scored)] * count, self.prices.gradient(count, count * rows, count * scored))
        self._seen = None
        keep = edited.stop is None or edited.stop > LEAST_PREFIX  # edits that follow can use the keys and values
        return self.budget.spread(lambda part: self._slope(ids, part, scored, keep)[:, edited], count, rows)

    def _score_group(self, ids: Tensor, edits: Edits, group: slice, scored: int) -> bool:
        """Fill in the losses of the edits of some texts."""
        numbers, rows, done = edits.of_texts(group), ids.shape[1] - 1, 0
        pairs = self._beginnings(ids, group, edits, int(edits.first[numbers].max(initial=0)))
        on_device = torch.from_numpy(numbers).to(self.device)  # before the loop: the host waits for each such copy
        while done < len(numbers):
            cut = int(edits.first[numbers[done]])
            size = edits.stop(numbers[done:], self.budget.sequences(len(numbers) - done, rows - cut), rows - cut)
            part, host_part = on_device[done : done + size], numbers[done : done + size]
            prefix = Prefix(pairs, edits.writes[part, 0] - group.start, cut) if cut else None
            run = partial(self._edited_losses, ids, edits.writes[part], prefix, scored)
            nll = self.budget.attempt(run, size * (rows - cut), size > 1)
            if nll is not None:
                edits.nll[part], edits.cached[host_part] = nll, cut
                done += size
        return True

    def _edited_losses(self, ids: Tensor, writes: Tensor, prefix: Prefix | None, scored: int) -> Tensor:
        """(k,) of edits (k, 1 + 2m) = (text, places, tokens)."""
        places, tokens = writes[:, 1:].chunk(2, dim=1)
        return self._losses(ids[writes[:, 0]].scatter_(1, places, tokens), scored, prefix).mean(dim=1)

    def _beginnings(self, ids: Tensor, group: slice, edits: Edits, length: int) -> Pairs:
        """Keys and values of the first `length` tokens of unedited texts, from the latest gradient if it was of the same texts."""
        if length == 0:
            return []
        if self._seen is not None and torch.equal(self._seen[0], ids):
            return [(keys[group], values[group]) for keys, values in self._seen[1]]
        recorder = Recorder()
        self._body(self._embed(ids[group, :length]), recorder)
        edits.begun[group] = length
        return recorder.pairs

    def _losses(self, ids: Tensor, scored: int, prefix: Prefix | None = None) -> Tensor:
        """(n, S) nats; rows of the prefix are not computed."""
        begin = prefix.length if prefix is not None else 0
        hidden = self._body(self._embed(ids[:, begin:-1]), prefix)[:, -scored:]
        nll = token_nll(hidden.flatten(0, 1), self.network.get_output_embeddings(), ids[:, -scored:].flatten(), self.dtype)
        return nll.view(len(ids), scored)

    def _slope(self, ids: Tensor, part: slice, scored: int, keep: bool) -> Tensor:
        """(n, T, d); the last token's is zero: nothing is predicted from it."""
        texts, recorder = ids[part], Recorder() if keep else None
        embedded = self._embed(texts[:, :-1]).float().requires_grad_(True)
        hidden = self._body(embedded.to(self.dtype), recorder)[:, -scored:]
        head, targets = self.network.get_output_embeddings(), texts[:, -scored:].flatten()
        along = hidden_slope(hidden.detach().flatten(0, 1), head, targets, self.dtype) / scored
        slope = torch.autograd.grad(hidden, embedded, along.view_as(hidden).to(hidden.dtype))[0]
        if recorder is not None and len(texts) == len(ids):
            self._seen = ids.clone(), recorder.pairs
        return nn.functional.pad(slope, (0, 0, 0, 1))

    def _embed(self, ids: Tensor) -> Tensor:
        return self.network.get_input_embeddings()(ids)

    def _body(self, embedded: Tensor, cache: Recorder | Prefix | None) -> Tensor:
        """(n, t, d) embeddings -> last hidden states."""
        with packed_causal(self.network, kernels=ANY_SHAPE):
            return self.network.base_model(inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def _charge(self, by_text: list[Work], total: Work) -> None:
        self.by_text = by_text
        self.work += total
        self.forwards += total.forwards
        self.backwards += total.backwards


def in_format(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself if it has this format, else a copy whose parameters have it. Buffers keep theirs: rotary angles need fp32."""
    if model.dtype == dtype:
        return model
    cast = {id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, cast)


def _table(model: PreTrainedModel) -> Tensor:
    embed = model.get_input_embeddings()
    scale = getattr(embed, "embed_scale", None)  # Gemma multiplies on the way in
    return embed.weight.detach() if scale is None else embed(torch.arange(embed.num_embeddings, device=model.device)).detach()


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
