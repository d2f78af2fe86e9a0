"""HotFlip on a causal LM: greedy token flips, each chosen by exact re-scoring, the gradient taken anew after every flip.

A text is a prefix, whose tokens may be flipped, and a continuation, which alone is scored and never touched. The scored
index set is therefore one and the same for the clean and the attacked text and for every model (Ebrahimi et al. 2018,
arXiv 1712.06751, scored the attacked input of a classifier; scoring flipped tokens of an LM would reward rare tokens).

B texts, T tokens of each with end-of-text, E tokens of the prefix, n candidates, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from configs.schema import HotFlip
from utils.attacks.controls import random_contexts, random_substitutions
from utils.attacks.round_trip import RoundTrip, first_kept
from utils.attacks.scoring import ADMITTED, Scorer, first_order_candidates

REPLACED = 0.6  # share of the prefix tokens that are random in the further gradients
WIDER = 4  # times the candidates, once, for a text that finds no gain among the first ones


@dataclass
class Attack:
    """One text under attack, as it is stored after every flip. `nll[k]`: nats per untouched token after k flips.

    A flip is {position, old, new}, with a gradient also its `predicted` gain and the rank correlation of predicted and true gains
    of all candidates that were scored for it.
    """

    nll: list[float]
    flips: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0  # candidates scored
    backwards: int = 0  # gradients taken
    flops: int = 0
    wider_rounds: int = 0
    zero_gradient: float | None = None  # share of the clean text's prefix tokens whose gradient is exactly zero
    stuck: bool = False

    @property
    def forwards(self) -> int:
        """Sequences scored: the clean text and the candidates."""
        return 1 + self.evaluations

    def curve(self, budget: int) -> list[float]:
        """Losses after 0, 1, ... `budget` flips; flat where the attack ended."""
        return self.nll + self.nll[-1:] * (budget + 1 - len(self.nll))


@dataclass
class Ranking:
    """Substitutions of one text, the most promising first; the first `tried` were looked at."""

    edits: Tensor  # (n, 2) of (place, token), on the CPU
    predicted: Tensor | None = None  # (n,) first-order gains, nats per untouched token, on the CPU
    tried: int = 0


@dataclass
class Target:
    """A text as it is now. Its first `reach` ids must come back from decoding and encoding where the mode is 'text'."""

    name: str
    ids: Tensor  # (T,)
    attack: Attack
    reach: int = 0


Pair = tuple[Target, Ranking]


def replay(ids: Tensor, flips: Sequence[dict[str, Any]], budget: int) -> Tensor:
    """ids (T,) -> (1 + budget, T): the text after 0, 1, ... flips; the last state again where there are fewer than `budget`."""
    states = [ids]
    for flip in flips:
        state = states[-1].clone()
        state[1 + flip["position"]] = flip["new"]
        states.append(state)
    return torch.stack(states + states[-1:] * (budget + 1 - len(states)))


class FlipSearch:
    """The search on one model. Without `gradient` its candidates are random, and all else is the same: query-only greedy search."""

    def __init__(
        self, scorer: Scorer, spec: HotFlip, allowed: Tensor, *, gradient: bool = True, round_trip: RoundTrip | None = None
    ) -> None:
        self.scorer, self.spec, self.allowed = scorer, spec, allowed
        self.gradient = gradient
        self.round_trip = round_trip if spec.mode == "text" else None
        self.tokens = np.flatnonzero(allowed.cpu().numpy())

    def run(
        self,
        ids: Tensor,
        names: Sequence[str],
        attacks: Sequence[Attack] = (),
        after_flip: Callable[[list[Attack]], None] = lambda attacks: None,
    ) -> list[Attack]:
        """Attack the texts ids (B, T), called `names`; goes on from stored `attacks`.

        A text stops early when no candidate of its second, wider round raises its loss either. `after_flip` gets all attacks after
        every flip, and may raise.
        """
        attacks = list(attacks) or self._begun(ids)
        reach = self.round_trip.reach(ids[:, 1:].tolist()) if self.round_trip else [0] * len(ids)
        now = [replay(text, attack.flips, len(attack.flips))[-1].clone() for text, attack in zip(ids, attacks, strict=True)]
        targets = [Target(*each) for each in zip(names, now, attacks, reach, strict=True)]
        while live := [each for each in targets if not each.attack.stuck and len(each.attack.flips) < self.spec.flips]:
            self._flip(live)
            after_flip(attacks)
        return attacks

    def _begun(self, ids: Tensor) -> list[Attack]:
        clean = self.scorer.nll(ids, self.spec.scored_tokens).tolist()
        return [Attack([nll], flops=work.flops) for nll, work in zip(clean, self.scorer.by_text, strict=True)]

    def _flip(self, targets: Sequence[Target]) -> None:
        """One flip for every text. A text without a gain gets one wider round, and is given up after it."""
        ranked = self._by_gradient(targets) if self.gradient else self._by_chance(targets)
        pairs = list(zip(targets, ranked, strict=True))
        without = self._try(pairs, self.spec.candidates)
        for target, _ in without:
            target.attack.wider_rounds += 1
        for target, _ in self._try(without, WIDER * self.spec.candidates):
            target.attack.stuck = True

    def _by_gradient(self, targets: Sequence[Target]) -> list[Ranking]:
        """First-order gains by a gradient averaged over the text and copies of it with random tokens in the prefix.

        The gradient at the text alone foretells little of what a whole substitution does (Jones et al. 2023, arXiv 2303.04381, average
        it over random tokens at the place in question; here all places at once share the draws).
        """
        texts = torch.stack([target.ids for target in targets])
        around = self._slopes(self._contexts(targets, texts).flatten(0, 1)).view(len(targets), self.spec.gradients - 1, *self._shape)
        slopes = self._slopes(texts)
        for target, slope, work in zip(targets, slopes, self.scorer.by_text, strict=True):
            target.attack.backwards += self.spec.gradients
            target.attack.flops += self.spec.gradients * work.flops
            if target.attack.zero_gradient is None:
                target.attack.zero_gradient = float((slope == 0).all(dim=1).double().mean())
        averaged = (slopes + around.sum(dim=1)) / self.spec.gradients
        return [self._first_order(target, slope) for target, slope in zip(targets, averaged, strict=True)]

    def _slopes(self, ids: Tensor) -> Tensor:
        """ids (N, T) -> (N, E, d)."""
        if not len(ids):
            return torch.empty(0, *self._shape, device=ids.device)
        return self.scorer.gradient(ids, self.spec.scored_tokens, slice(1, 1 + self.spec.prefix_tokens))

    def _contexts(self, targets: Sequence[Target], texts: Tensor) -> Tensor:
        """texts (B, T) -> (B, gradients - 1, T): copies with random tokens, drawn for the text and the flip, not for the model."""
        places, copies = self.spec.prefix_tokens, self.spec.gradients - 1
        keys = [("context", target.name, len(target.attack.flips)) for target in targets]
        drawn = np.stack([random_contexts(self.spec.seed, key, copies, places, REPLACED, self.tokens) for key in keys])
        written = torch.from_numpy(drawn).to(texts.device)
        changed = texts[:, None].repeat(1, copies, 1)
        prefix = changed[:, :, 1 : 1 + places]
        changed[:, :, 1 : 1 + places] = torch.where(written < 0, prefix, written)
        return changed

    @property
    def _shape(self) -> tuple[int, int]:
        return self.spec.prefix_tokens, self.scorer.embeddings.shape[1]

    def _first_order(self, target: Target, slope: Tensor) -> Ranking:
        """A place is flipped once, so that k flips change k tokens; slope (E, d)."""
        free = self.allowed.repeat(self.spec.prefix_tokens, 1)
        free[[flip["position"] for flip in target.attack.flips]] = False
        current = target.ids[1 : 1 + self.spec.prefix_tokens]
        edits = first_order_candidates(self.scorer, slope, current, free, self._pool)
        places, tokens = edits.T
        change = self.scorer.embeddings[tokens] - self.scorer.embeddings[current[places]]
        return Ranking(edits.cpu(), (slope[places] * change).sum(dim=1).cpu())

    def _by_chance(self, targets: Sequence[Target]) -> list[Ranking]:
        """Random substitutions at places that were not flipped yet, drawn for the text and the flip, not for the model."""
        rankings = []
        for target in targets:
            flipped = [flip["position"] for flip in target.attack.flips]
            free = np.setdiff1d(np.arange(self.spec.prefix_tokens), flipped)
            current = target.ids[1 : 1 + self.spec.prefix_tokens].cpu().numpy()
            key = ("query", target.name, len(flipped))
            rankings.append(Ranking(torch.from_numpy(random_substitutions(self.spec.seed, key, self._pool, current, free, self.tokens))))
        return rankings

    @property
    def _pool(self) -> int:
        return (1 + WIDER) * self.spec.candidates

    def _try(self, pairs: Sequence[Pair], count: int) -> list[Pair]:
        """Score the next `count` candidates of every text, all together; returns the pairs that found no gain among theirs."""
        chosen = [self._next(*pair, count) for pair in pairs]
        if not any(map(len, chosen)):
            return list(pairs)
        edits = [ranking.edits[rows] for (_, ranking), rows in zip(pairs, chosen, strict=True)]
        counts = [len(each) for each in edits]
        places, tokens = torch.cat(edits).to(self.scorer.device).T
        which = torch.repeat_interleave(torch.tensor(counts)).to(self.scorer.device)
        texts = torch.stack([target.ids for target, _ in pairs])
        scores = self.scorer.edited_nll(texts, which, 1 + places[:, None], tokens[:, None], self.spec.scored_tokens).cpu().split(counts)
        for (target, _), work in zip(pairs, self.scorer.by_text, strict=True):
            target.attack.flops += work.flops
        return [pair for pair, rows, nll in zip(pairs, chosen, scores, strict=True) if not _accepted(*pair, rows, nll)]

    def _next(self, target: Target, ranking: Ranking, count: int) -> list[int]:
        """Ranks of the next candidates: `count` of them, in mode 'text' the next that survive."""
        rest = range(ranking.tried, len(ranking.edits))
        rows = first_kept(rest, count, lambda some: self._kept(target, ranking.edits[some])) if self.round_trip else list(rest[:count])
        ranking.tried = rows[-1] + 1 if rows else len(ranking.edits)
        return rows

    def _kept(self, target: Target, edits: Tensor) -> list[bool]:
        assert self.round_trip
        texts = target.ids.cpu().repeat(len(edits), 1).scatter_(1, 1 + edits[:, :1], edits[:, 1:])
        return self.round_trip.kept(texts[:, 1:].tolist(), [target.reach] * len(edits))


def _accepted(target: Target, ranking: Ranking, rows: Sequence[int], nll: Tensor) -> bool:
    """Write the best of the scored candidates into the text if it raises the loss; nll (n,) of the candidates at these ranks."""
    attack = target.attack
    attack.evaluations += len(rows)
    best = int(nll.argmax()) if rows else -1
    if best < 0 or float(nll[best]) <= attack.nll[-1] + ADMITTED:
        return False
    place, token = ranking.edits[rows[best]].tolist()
    flip = {"position": place, "old": int(target.ids[1 + place]), "new": token}
    if ranking.predicted is not None:
        predicted = ranking.predicted[rows]
        flip |= {"predicted": float(predicted[best]), "rank_correlation": rank_correlation(predicted.numpy(), nll.numpy())}
    attack.flips.append(flip)
    attack.nll.append(float(nll[best]))
    target.ids[1 + place] = token
    return True


def rank_correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float | None:
    """Spearman's coefficient; None where one of them does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(stats.spearmanr(one, other).statistic)
