"""HotFlip on a causal LM: greedy token flips, each chosen by exact re-scoring, the gradient taken anew after every flip.

A text is a prefix, whose tokens may be flipped, and a continuation, which alone is scored and never touched. The scored
index set is therefore one and the same for the clean and the attacked text and for every model (Ebrahimi et al. 2018,
arXiv 1712.06751, scored the attacked input of a classifier; scoring flipped tokens of an LM would reward rare tokens).

B texts, T tokens of each with end-of-text, E tokens of the prefix, n candidates, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from configs.schema import HotFlip
from utils.attacks.controls import random_contexts, random_substitutions
from utils.attacks.ranking import Ranking
from utils.attacks.round_trip import RoundTrip
from utils.attacks.scoring import ADMITTED, Scorer, first_order_candidates

REPLACED = 0.6  # share of the prefix tokens that are random in the further gradients
ROUNDS = 4  # in which the candidates of a flip are scored, the later ones chosen by what the earlier ones did
WIDER = 4  # times the candidates, once, for a text that finds no gain among the first ones
POOL = 40  # times the candidates, from which they are chosen


@dataclass
class Attack:
    """One text under attack, as it is stored after every flip. `nll[k]`: nats per untouched token after k flips.

    A flip is {position, old, new}, with a gradient also its `predicted` gain and the rank correlation of predicted and true gains
    of the candidates that were scored first, which the gradient alone has chosen.
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
    """The search on one model. Without `gradient` the pool of its candidates is random, all else is the same: greedy search by queries."""

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
        for part in np.array_split(np.arange(self.spec.candidates), min(ROUNDS, self.spec.candidates)):
            self._score(pairs, len(part))
        without = [pair for pair in pairs if not self._accepted(*pair)]
        self._score(without, WIDER * self.spec.candidates)
        for target, ranking in without:
            target.attack.wider_rounds += 1
            target.attack.stuck = not self._accepted(target, ranking)

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
            edits = torch.from_numpy(random_substitutions(self.spec.seed, key, self._pool, current, free, self.tokens))
            rankings.append(Ranking(edits, torch.zeros(len(edits))))
        return rankings

    @property
    def _pool(self) -> int:
        return POOL * self.spec.candidates

    @cached_property
    def _directions(self) -> Tensor:
        """(V, d) of length one: where a token's embedding lies as seen from the middle of those that may be written."""
        embeddings = self.scorer.embeddings
        return F.normalize(embeddings - embeddings[self.allowed[: len(embeddings)]].mean(dim=0), dim=1)

    def _score(self, pairs: Sequence[Pair], count: int) -> None:
        """Score the next `count` candidates of every text, all together."""
        chosen = [self._next(*pair, count) for pair in pairs]
        if not any(map(len, chosen)):
            return
        edits = [ranking.edits[rows] for (_, ranking), rows in zip(pairs, chosen, strict=True)]
        counts = [len(each) for each in edits]
        places, tokens = torch.cat(edits).to(self.scorer.device).T
        which = torch.repeat_interleave(torch.tensor(counts)).to(self.scorer.device)
        texts = torch.stack([target.ids for target, _ in pairs])
        scores = self.scorer.edited_nll(texts, which, 1 + places[:, None], tokens[:, None], self.spec.scored_tokens).cpu().split(counts)
        for (target, ranking), rows, nll, work in zip(pairs, chosen, scores, self.scorer.by_text, strict=True):
            target.attack.evaluations += len(rows)
            target.attack.flops += work.flops
            ranking.scored(rows, nll)

    def _next(self, target: Target, ranking: Ranking, count: int) -> list[int]:
        kept = partial(self._kept, target) if self.round_trip else None
        return ranking.next(count, target.attack.nll[-1], self._directions, kept)

    def _kept(self, target: Target, edits: Tensor) -> list[bool]:
        """Which of the edited texts come back from decoding and encoding."""
        assert self.round_trip
        texts = target.ids.cpu().repeat(len(edits), 1).scatter_(1, 1 + edits[:, :1], edits[:, 1:])
        return self.round_trip.kept(texts[:, 1:].tolist(), [target.reach] * len(edits))

    def _accepted(self, target: Target, ranking: Ranking) -> bool:
        """Write the best of the scored candidates into the text if it raises the loss."""
        attack = target.attack
        best = int(np.argmax(ranking.nll)) if ranking.nll else -1
        if best < 0 or ranking.nll[best] <= attack.nll[-1] + ADMITTED:
            return False
        place, token = ranking.edits[ranking.rows[best]].tolist()
        flip = {"position": place, "old": int(target.ids[1 + place]), "new": token}
        if self.gradient:
            predicted, true = ranking.predicted[ranking.rows].numpy(), np.array(ranking.nll)
            correlation = rank_correlation(predicted[: ranking.first], true[: ranking.first])
            flip |= {"predicted": float(predicted[best]), "rank_correlation": correlation}
        attack.flips.append(flip)
        attack.nll.append(ranking.nll[best])
        target.ids[1 + place] = token
        return True


def rank_correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float | None:
    """Spearman's coefficient; None where one of them does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(stats.spearmanr(one, other).statistic)
