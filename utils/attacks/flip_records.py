"""One row for each text, model and attack by flips. Every loss in a row is the referee's, whatever precision the search ran in.

B texts, T tokens of each with end-of-text, K flips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from utils.run.artifacts import read_json, write_json
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Records, Row, grouped, read_rows

LONGER = 10  # times the candidates, on some texts: what a larger budget would find


@dataclass
class Stored:
    """A group of texts under attack, after every flip."""

    texts: list[str] = field(default_factory=list)
    attacks: list[Attack] = field(default_factory=list)


class FlipAttacks:
    """All attacks by flips on one model; texts are {id, subset, ids}. Rows and what is under way are kept in the folder `state`."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        alphabet: Alphabet,
        round_trip: RoundTrip,
        spec: HotFlip,
        precision: str,
        state: Path,
        stop: Stop,
    ) -> None:
        self.name, self.round_trip, self.spec, self.state, self.stop = name, round_trip, spec, state, stop
        self.model, self.precision, self.referee = model, precision, Referee(model)
        self.allowed = allowed_tokens(model.config.vocab_size, alphabet.writable(), model.device)
        self.end_of_text = alphabet.end_of_text

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """By number format. Made when a search needs them: one in bf16 holds a copy of the model, and transferred flips need none."""
        return {precision: Scorer(self.model, precision) for precision in ("fp32", "bf16")}

    def hotflip(self, texts: Sequence[Row]) -> list[Row]:
        """Greedy flips by gradient, with the random control; on the first texts also what the gradient is worth."""
        sample = {text["id"] for text in texts[: self.spec.longer_texts]}

        def further(text: Row, ids: Tensor) -> Row:
            row: Row = {"random_nll": random_control(self.referee, ids, text["id"], self.spec, self.allowed)}
            if text["id"] in sample:
                row["gradient"] = gradient_facts(self.scorers["fp32"], self.scorers["bf16"], ids, text["id"], self.spec, self.allowed)
            return row

        return self._searched("hotflip", self.spec, True, texts, further)

    def query_greedy(self, texts: Sequence[Row]) -> list[Row]:
        """The same number of evaluations at every flip, of random substitutions."""
        return self._searched("query_greedy", self.spec, False, texts)

    def longer(self, texts: Sequence[Row]) -> list[Row]:
        """HotFlip with ten times the candidates, on the first texts."""
        spec = self.spec.model_copy(update={"candidates": LONGER * self.spec.candidates})
        return self._searched("longer", spec, True, texts[: spec.longer_texts])

    def transferred(self, found: Mapping[str, Sequence[Row]], texts: Sequence[Row]) -> dict[str, list[Row]]:
        """{attack: rows} of the flips that HotFlip found on other models {name: rows}, as ids, on this one."""
        others, rows = {source: own for source, own in found.items() if source != self.name}, {}
        progress = Progress(f"flips of other models on {self.name}", len(others))
        for source, own in others.items():
            rows[f"transfer:{source}"] = self._transferred(source, {row["text"]: row["flips"] for row in own}, texts)
            progress.advance()
        progress.close()
        return rows

    def _transferred(self, source: str, flips: Mapping[str, list[dict[str, Any]]], texts: Sequence[Row]) -> list[Row]:
        def work(group: Sequence[Row], ids: Tensor) -> list[Row]:
            return self._scored(group, ids, [flips[text["id"]] for text in group], curve=False)

        return self._recorded(f"transfer:{source}", texts, work)

    def _searched(
        self,
        attack: str,
        spec: HotFlip,
        gradient: bool,
        texts: Sequence[Row],
        further: Callable[[Row, Tensor], Row] = lambda text, ids: {},
    ) -> list[Row]:
        search = FlipSearch(self.scorers[self.precision], spec, self.allowed, gradient=gradient, round_trip=self.round_trip)

        def work(group: Sequence[Row], ids: Tensor) -> list[Row]:
            attacks = self._run(search, group, ids, self.state / f"{self.name}.{attack}.json")
            scored = self._scored(group, ids, [each.flips for each in attacks])
            kept = self._kept(ids, attacks)
            found = zip(scored, attacks, kept, group, ids, strict=True)
            return [row | _work(each) | {"survives_retokenisation": good} | further(text, own) for row, each, good, text, own in found]

        return self._recorded(attack, texts, work, shown=True)

    def _run(self, search: FlipSearch, group: Sequence[Row], ids: Tensor, path: Path) -> list[Attack]:
        """The attacks of a group of texts, stored after every flip."""
        names = [text["id"] for text in group]
        stored = read_json(path, Stored) if path.exists() else Stored()
        begun = stored.attacks if stored.texts == names else []

        def after_flip(attacks: list[Attack]) -> None:
            write_json(path, asdict(Stored(names, attacks)))
            self.stop.check()

        return search.run(ids, names, begun, after_flip)

    def _recorded(
        self, attack: str, texts: Sequence[Row], work: Callable[[Sequence[Row], Tensor], list[Row]], shown: bool = False
    ) -> list[Row]:
        """Rows of all texts, a batch at a time, with resume, and with progress where it is shown."""
        records = Records(self.state / f"{self.name}.{attack.replace(':', '.')}.jsonl")
        groups = grouped(texts, self.spec.batch_size)
        pending = list(records.pending(groups))
        progress = Progress(f"{attack} on {self.name}", len(groups), len(groups) - len(pending)) if shown else None
        for group in pending:
            self.stop.check()
            ids = torch.tensor([[self.end_of_text, *text["ids"]] for text in group], device=self.model.device)
            whose = [{"model": self.name, "attack": attack, "text": text["id"], "subset": text["subset"]} for text in group]
            records.append(own | found for own, found in zip(whose, work(group, ids), strict=True))
            if progress:
                progress.advance()
        if progress:
            progress.close()
        return read_rows(records.path)

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
