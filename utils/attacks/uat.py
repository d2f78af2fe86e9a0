"""Universal adversarial trigger: one token sequence that, put before any text, raises the loss of that text.

Wallace et al. 2019 (arXiv 1908.07125), coordinate-wise with a beam: the gradient proposes replacements for one position, exact
re-scoring chooses, only an improvement is accepted. Candidates are raced: all are scored on a few texts, the better ones on more, and
the final choice is on all search texts. Restarts are chosen on a second set of texts, and the report is on a third. The trigger's own
tokens are never scored.

K candidates, M texts, L tokens of the trigger, S of a text, W triggers of the beam, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.schema import UAT
from utils.attacks.controls import random_contexts, random_order, random_substitutions, random_trigger
from utils.attacks.race import race
from utils.attacks.round_trip import RoundTrip, first_kept
from utils.attacks.scoring import ADMITTED, Scorer, first_order_candidates
from utils.run.artifacts import left_behind, write_sealed

DEEPER = 4  # times the candidates that are looked at for such as survive, in mode 'text'
DRAWS = 1000  # random triggers that are looked at for one that survives
WORK = ("forwards", "backwards", "evaluations", "flops")
Beam = list[dict[str, Any]]  # {trigger, objective}, best first; the objective in nats per token of the search texts


@dataclass
class SearchState:
    """Where a restart is. Written after every position, so that a killed search goes on with the same next step."""

    restart: int
    steps: int = 0  # positions that had their turn, over all sweeps
    sweep: int = 0
    position: int = 0
    beam: Beam = field(default_factory=list)
    by_sweep: list[float] = field(default_factory=list)  # best objective at the start and after each sweep
    survival: float = 1.0  # share of the search texts in front of which the start survives decoding and encoding
    stale: int = 0  # sweeps without a gain, in a row
    improved: bool = False
    select_nll: float | None = None  # of the trigger that was found; None while the search goes on
    forwards: int = 0
    backwards: int = 0
    flops: int = 0
    evaluations: int = 0  # candidates raced

    @classmethod
    def stored(cls, path: Path, restart: int) -> SearchState:
        """The state on disk, or a new search."""
        return left_behind(path, cls) or cls(restart)


def with_trigger(end_of_text: int, trigger: Sequence[int], texts: Tensor) -> Tensor:
    """texts (M, S) -> (M, 1 + L + S): end-of-text, trigger, text."""
    head = torch.tensor([end_of_text, *trigger], device=texts.device).repeat(len(texts), 1)
    return torch.cat([head, texts], dim=1)


class TriggerSearch:
    """The search on one model; texts are {id, ids} of equal length.

    Beside `spec.restarts` restarts by gradient there is one more without: from the first one's start, with random candidates, at the same
    number of evaluations. Every restart makes all its sweeps, so that all searches cost the same; after a sweep without a gain the
    candidates next in rank have their turn.
    """

    def __init__(self, scorer: Scorer, spec: UAT, end_of_text: int, allowed: Tensor, round_trip: RoundTrip | None = None) -> None:
        self.scorer, self.spec, self.end_of_text, self.allowed = scorer, spec, end_of_text, allowed
        self.round_trip = round_trip if spec.mode == "text" else None
        self.tokens = np.flatnonzero(allowed.cpu().numpy())

    def nll(self, trigger: Sequence[int], texts: Tensor) -> Tensor:
        """(M,) mean NLL of each text's own tokens behind the trigger, nats per token."""
        return self.scorer.nll(with_trigger(self.end_of_text, trigger, texts), texts.shape[1])

    def run(self, restart: int, search: Tensor, select: Tensor, path: Path, after_step: Callable[[], None]) -> dict[str, Any]:
        """One restart, from 0 on; number `spec.restarts` is the one without gradient. Returns {trigger, search_nll, select_nll, by_sweep}
        and what it cost: {forwards, backwards, evaluations, flops}.

        `path` keeps the state; `after_step` is called after every position, when the state is on disk, and may raise.
        """
        self.scorer.forget()
        state = SearchState.stored(path, restart)
        while state.select_nll is None:
            before = self.scorer.work
            if not state.beam:
                self._start(state, search)
            self._improve(state, search)
            if self._advance(state):
                state.select_nll = float(self.nll(state.beam[0]["trigger"], select).mean())
            spent = self.scorer.work - before
            state.forwards += spent.forwards
            state.backwards += spent.backwards
            state.flops += spent.flops
            write_sealed(path, asdict(state))
            after_step()
        best = state.beam[0]
        found = {"trigger": best["trigger"], "search_nll": best["objective"], "select_nll": state.select_nll, "by_sweep": state.by_sweep}
        return found | {kind: getattr(state, kind) for kind in WORK}

    def _start(self, state: SearchState, search: Tensor) -> None:
        """A random trigger, the same for every model; in mode 'text' one that always survives, or else the one that does most often."""
        number, trigger = state.restart % self.spec.restarts, [0]
        state.survival = -1.0
        for attempt in range(DRAWS if self.round_trip else 1):
            purpose = f"start {attempt}" if attempt else "start"
            drawn = random_trigger(self.spec.seed, number, self.spec.trigger_length, self.tokens, purpose)
            if (share := self._survival(drawn, search)) > state.survival:
                state.survival, trigger = share, drawn
            if state.survival == 1.0:
                break
        objective = float(self.nll(trigger, search).double().mean())
        state.beam, state.by_sweep = [{"trigger": trigger, "objective": objective}], [objective]

    def _improve(self, state: SearchState, search: Tensor) -> None:
        """One position for all triggers of the beam; what is left is the best of the old ones and of the raced candidates."""
        proposed = self._proposed(state, search)
        state.evaluations += len(proposed)
        if not proposed:
            return
        found = self._raced(state, proposed, search)
        best = state.beam[0]
        ranked = sorted([*state.beam, *found], key=lambda each: each["objective"], reverse=True)
        if ranked[0]["objective"] > best["objective"] + ADMITTED:
            state.improved = True
        else:
            ranked = [best, *(each for each in ranked if each is not best)]
        state.beam = ranked[: self.spec.beam]

    def _proposed(self, state: SearchState, search: Tensor) -> list[tuple[int, int]]:
        """K distinct new triggers as (place in the beam, token), the most promising first."""
        ranked = self._by_chance(state) if state.restart == self.spec.restarts else self._by_gradient(state, search)
        known = {tuple(each["trigger"]) for each in state.beam}
        distinct = []
        for entry, token in ranked:
            trigger = tuple(self._written(state, entry, token))
            if trigger not in known:
                known.add(trigger)
                distinct.append((entry, token))
        rest = range(state.stale * self.spec.candidates, len(distinct))
        if self.round_trip is None:
            return [distinct[row] for row in rest[: self.spec.candidates]]

        def kept(rows: Sequence[int]) -> list[bool]:
            return [self._survival(self._written(state, *distinct[row]), search) >= state.survival for row in rows]

        return [distinct[row] for row in first_kept(rest, self.spec.candidates, kept)]

    def _pool(self, state: SearchState) -> int:
        """Candidates to rank for each trigger of the beam: enough for K distinct ones behind those that had their turn."""
        return (state.stale + (DEEPER if self.round_trip else 1)) * self.spec.candidates + self.spec.beam

    def _by_gradient(self, state: SearchState, search: Tensor) -> list[tuple[int, int]]:
        """By predicted objective: the old one and the first-order gain of the averaged gradient."""
        place, ranked = state.position, []
        for entry, each in enumerate(state.beam):
            slope = self._slope(state, each["trigger"], search)
            current = search.new_tensor(each["trigger"][place : place + 1])
            tokens = first_order_candidates(self.scorer, slope, current, self.allowed[None], self._pool(state))[:, 1]
            gains = (self.scorer.embeddings[tokens] - self.scorer.embeddings[current]) @ slope[0]
            found = zip(tokens.tolist(), gains.tolist(), strict=True)
            ranked += [(each["objective"] + gain, entry, token) for token, gain in found]
        ranked.sort(key=lambda found: found[0], reverse=True)
        return [(entry, token) for _, entry, token in ranked]

    def _slope(self, state: SearchState, trigger: Sequence[int], search: Tensor) -> Tensor:
        """(1, d) averaged over the search texts, behind the trigger as it is and with random tokens in the present one's place, another
        one for each text (Jones et al. 2023, arXiv 2303.04381); drawn for the step, not for the model."""
        place = 1 + state.position
        ids = with_trigger(self.end_of_text, trigger, search).repeat(self.spec.gradients, 1)
        drawn = random_contexts(self.spec.seed, ("context", state.restart, state.sweep, place), len(ids), 1, 1.0, self.tokens)
        ids[len(search) :, place] = torch.from_numpy(drawn[len(search) :, 0]).to(ids.device)
        return self.scorer.gradient(ids, search.shape[1], slice(place, place + 1)).mean(dim=0)

    def _by_chance(self, state: SearchState) -> Iterator[tuple[int, int]]:
        """Random tokens for the triggers of the beam in turn, drawn for the sweep and the position, not for the model."""
        here = np.array([state.position])
        drawn = []
        for entry, each in enumerate(state.beam):
            key = ("trigger query", state.sweep, state.position, entry)
            pairs = random_substitutions(self.spec.seed, key, self._pool(state), np.array(each["trigger"]), here, self.tokens)
            drawn.append([(entry, token) for token in pairs[:, 1].tolist()])
        return (pair for turn in zip_longest(*drawn) for pair in turn if pair is not None)

    def _raced(self, state: SearchState, proposed: Sequence[tuple[int, int]], search: Tensor) -> Beam:
        """The candidates that reach all texts, whose order is drawn for this step."""
        order = random_order(self.spec.seed, ("race", state.restart, state.sweep, state.position), len(search))
        texts = with_trigger(self.end_of_text, state.beam[0]["trigger"], search[torch.from_numpy(order).to(search.device)])
        tokens = torch.tensor([self._written(state, *each) for each in proposed], device=search.device)  # (K, L)
        places = torch.arange(1, 1 + tokens.shape[1], device=search.device).expand_as(tokens)
        numbers, nll = race(self.scorer, texts, places, tokens, search.shape[1], self.spec.race_share, self.spec.beam)
        found = zip(tokens[numbers].tolist(), nll.tolist(), strict=True)
        return [{"trigger": trigger, "objective": objective} for trigger, objective in found]

    def _written(self, state: SearchState, entry: int, token: int) -> list[int]:
        trigger = list(state.beam[entry]["trigger"])
        trigger[state.position] = token
        return trigger

    def _survival(self, trigger: Sequence[int], texts: Tensor) -> float:
        """Share of the texts in front of which the trigger survives; 1 of any where the mode is 'ids'."""
        return 1.0 if self.round_trip is None else surviving_share(self.round_trip, trigger, texts.tolist())

    def _advance(self, state: SearchState) -> bool:
        """Go to the next position; True when all sweeps of the restart are done."""
        state.position, state.steps = state.position + 1, state.steps + 1
        if state.position < self.spec.trigger_length:
            return False
        state.by_sweep.append(state.beam[0]["objective"])
        state.stale = 0 if state.improved else state.stale + 1
        state.sweep, state.position, state.improved = state.sweep + 1, 0, False
        return state.sweep >= self.spec.sweeps


def chosen(searches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The restart that is best on the second set of texts, with {restarts, query_greedy} and what all of them cost together."""
    *restarts, query_greedy = [{key: value for key, value in search.items() if key not in WORK} for search in searches]
    best = max(restarts, key=lambda found: found["select_nll"])
    return {**best, "restarts": restarts, "query_greedy": query_greedy} | {kind: sum(each[kind] for each in searches) for kind in WORK}


def surviving_share(round_trip: RoundTrip, trigger: Sequence[int], texts: Sequence[Sequence[int]]) -> float:
    """Share of the texts for which trigger and text, decoded and encoded again, give the same ids, as far as the text alone does."""
    reach = [len(trigger) + found for found in round_trip.reach(texts)]
    return float(np.mean(round_trip.kept([[*trigger, *ids] for ids in texts], reach)))
