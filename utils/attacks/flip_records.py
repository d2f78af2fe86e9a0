"""One row for each text, model and attack by flips. Every loss in a row is the referee's, whatever precision the search ran in.

B texts, T tokens of each with end-of-text, K flips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import HotFlip
from utils.attacks.controls import random_flips
from utils.attacks.gradients import gradient_facts
from utils.attacks.hotflip import Attack, FlipSearch, replay
from utils.attacks.referee import Referee
from utils.attacks.round_trip import RoundTrip
from utils.attacks.scoring import Scorer, allowed_tokens
from utils.data.attack_texts import Alphabet
from utils.run.artifacts import left_behind, write_sealed
from utils.run.records import Row
from utils.run.units import Step

LONGER = 10  # times the candidates, on some texts: what a larger budget would find
SEARCHES = ("hotflip", "query_greedy", "longer")  # by gradient; random candidates, as many; by gradient with more candidates


@dataclass
class Stored:
    """A group of texts under attack, after so many steps of all that there are to make."""

    steps: int
    attacks: list[Attack]


class FlipAttacks:
    """All attacks by flips on one model; texts are {id, subset, ids}. Each method does some of them, together."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        texts: Sequence[Row],
        alphabet: Alphabet,
        round_trip: RoundTrip,
        spec: HotFlip,
        precision: str,
    ) -> None:
        self.name, self.round_trip, self.spec = name, round_trip, spec
        self.model, self.precision, self.referee = model, precision, Referee(model)
        self.allowed = allowed_tokens(model.config.vocab_size, alphabet.writable(), model.device)
        self.end_of_text = alphabet.end_of_text
        self.sample = {text["id"] for text in texts[: spec.longer_texts]}

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """By number format. Made when a search needs them: one in bf16 holds a copy of the model, and transferred flips need none."""
        return {precision: Scorer(self.model, precision) for precision in ("fp32", "bf16")}

    def search(self, attack: str, group: Sequence[Row], begun: Path, step: Step) -> list[Row]:
        """Rows of an attack of SEARCHES on a group of texts, which are attacked together. `begun` keeps what is under way; `step` is
        called after every flip and may raise."""
        for scorer in self.scorers.values():
            scorer.forget()
        spec = self.spec.model_copy(update={"candidates": size(attack) * self.spec.candidates})
        scorer, gradient = self.scorers[self.precision], attack != "query_greedy"
        search = FlipSearch(scorer, spec, self.allowed, gradient=gradient, round_trip=self.round_trip)
        ids, whose = self._ids(group), self._whose(attack, group)
        attacks = self._run(search, group, ids, begun, size(attack), step)
        scored, kept = self._scored(group, ids, [each.flips for each in attacks]), self._kept(ids, attacks)
        found = zip(whose, scored, attacks, kept, group, ids, strict=True)
        return [
            own | row | _work(each) | {"survives_retokenisation": good} | (self._further(text, clean) if attack == "hotflip" else {})
            for own, row, each, good, text, clean in found
        ]

    def transferred(self, source: str, flips: Mapping[str, list[dict[str, Any]]], group: Sequence[Row]) -> list[Row]:
        """Rows of the flips {text: flips} that HotFlip found on the model `source`, as ids, on this one."""
        scored = self._scored(group, self._ids(group), [flips[text["id"]] for text in group], curve=False)
        return [whose | row for whose, row in zip(self._whose(f"transfer:{source}", group), scored, strict=True)]

    def _ids(self, group: Sequence[Row]) -> Tensor:
        """(B, T)"""
        return torch.tensor([[self.end_of_text, *text["ids"]] for text in group], device=self.model.device)

    def _whose(self, attack: str, group: Sequence[Row]) -> list[Row]:
        return [{"model": self.name, "attack": attack, "text": text["id"], "subset": text["subset"]} for text in group]

    def _further(self, text: Row, ids: Tensor) -> Row:
        """The random control; of a text of the sample also what the gradient is worth."""
        row: Row = {"random_nll": random_control(self.referee, ids, text["id"], self.spec, self.allowed)}
        if text["id"] in self.sample:
            row["gradient"] = gradient_facts(self.scorers["fp32"], self.scorers["bf16"], ids, text["id"], self.spec, self.allowed)
        return row

    def _run(self, search: FlipSearch, group: Sequence[Row], ids: Tensor, begun: Path, weight: int, step: Step) -> list[Attack]:
        """The attacks of a group of texts, stored after every flip."""
        names = [text["id"] for text in group]
        found = left_behind(begun, Stored)
        stored = found.attacks if found else []

        def after_flip(attacks: list[Attack]) -> None:
            made = weight * sum(self.spec.flips if each.stuck else len(each.flips) for each in attacks)
            write_sealed(begun, asdict(Stored(made, attacks)))
            step()

        return search.run(ids, names, stored, after_flip)

    def _scored(self, group: Sequence[Row], ids: Tensor, flips: Sequence[list[dict[str, Any]]], curve: bool = True) -> list[Row]:
        """Losses after every flip, or of the clean and the final text alone, and over all tokens, flipped ones included, as the reference
        scores them; ids (B, T)."""
        states = torch.stack([replay(text, each, self.spec.flips) for text, each in zip(ids, flips, strict=True)])  # (B, 1 + K, T)
        states = states if curve else states[:, [0, -1]]
        losses = self.referee.token_nll(states.flatten(0, 1), ids.shape[1] - 1).view(*states.shape[:2], -1).double()
        curves, whole = losses[:, :, -self.spec.scored_tokens :].mean(dim=2).tolist(), losses[:, [0, -1]].mean(dim=2).tolist()
        change = (losses[:, -1] - losses[:, 0]).abs().cpu()
        return [
            {
                "nll": curve,
                "reference_clean": before,
                "reference_attacked": after,
                "leak": change_before_the_first_flip(row, each),
            }
            for curve, each, (before, after), row in zip(curves, flips, whole, change, strict=True)
        ]

    def _kept(self, ids: Tensor, attacks: Sequence[Attack]) -> list[bool]:
        clean = ids[:, 1:].tolist()
        final = [replay(text, each.flips, 0)[-1, 1:].tolist() for text, each in zip(ids, attacks, strict=True)]
        return self.round_trip.kept(final, self.round_trip.reach(clean))


def size(attack: str) -> int:
    """Times the candidates of the configuration."""
    return LONGER if attack == "longer" else 1


def _work(attack: Attack) -> Row:
    """What a search found on a text, and what it spent."""
    facts: Row = {"flips": attack.flips, "forwards": attack.forwards, "backwards": attack.backwards, "evaluations": attack.evaluations}
    facts |= {"flops": attack.flops, "wider_rounds": attack.wider_rounds, "stuck": attack.stuck}
    return facts | ({} if attack.zero_gradient is None else {"zero_gradient": attack.zero_gradient})


def change_before_the_first_flip(change: Tensor, flips: Sequence[dict[str, Any]]) -> float:
    """Largest change of the loss of a token before the first flipped one, nats: nothing in a causal model.

    change (T - 1,): column t is that of token t + 1, and position 0 is token 1.
    """
    before = change[: min((flip["position"] for flip in flips), default=0)]
    return float(before.max()) if len(before) else 0.0


def random_control(referee: Referee, ids: Tensor, text_id: str, spec: HotFlip, allowed: Tensor) -> list[float]:
    """Mean NLL of the untouched tokens after `flips` random flips, for each of the draws; ids (T,)."""
    tokens = np.flatnonzero(allowed.cpu().numpy())
    draws = torch.from_numpy(random_flips(spec.seed, text_id, spec.random_draws, spec.flips, spec.prefix_tokens, tokens))
    draws = draws.to(ids.device)
    copies = ids.repeat(spec.random_draws, 1)
    copies.scatter_(1, 1 + draws[..., 0], draws[..., 1])
    return referee.nll(copies, spec.scored_tokens).tolist()
