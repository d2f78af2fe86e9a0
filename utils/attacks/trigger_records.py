"""One row for each text, model and trigger: what a trigger does on texts that no search has seen. All losses are the referee's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import UAT
from utils.attacks.controls import neutral_trigger, random_trigger
from utils.attacks.referee import Referee
from utils.attacks.round_trip import RoundTrip
from utils.attacks.scoring import Scorer, allowed_tokens
from utils.attacks.uat import TriggerSearch, with_trigger
from utils.data.attack_texts import Alphabet
from utils.run.records import Row
from utils.run.units import Step


class TriggerAttacks:
    """Searches of a trigger on one model, and its losses behind triggers; `sets` are texts {id, subset, ids} by purpose."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        sets: Mapping[str, Sequence[Row]],
        alphabet: Alphabet,
        round_trip: RoundTrip,
        spec: UAT,
        precision: str,
    ) -> None:
        self.model, self.name, self.sets, self.alphabet = model, name, sets, alphabet
        self.round_trip, self.spec, self.precision, self.referee = round_trip, spec, precision, Referee(model)

    @cached_property
    def engine(self) -> TriggerSearch:
        """Made when a search needs it: in bf16 it holds a copy of the model."""
        scorer = Scorer(self.model, self.precision)
        allowed = allowed_tokens(self.model.config.vocab_size, self.alphabet.writable(), scorer.device)
        return TriggerSearch(scorer, self.spec, self.alphabet.end_of_text, allowed, self.round_trip)

    def search(self, restart: int, begun: Path, step: Step) -> dict[str, Any]:
        """One restart, as TriggerSearch.run says, on the sets 'search' and 'select'."""
        search, select = (text_tensor(self.sets[kind], self.referee.device) for kind in ("search", "select"))
        return self.engine.run(restart, search, select, begun, step)

    def report(self, kind: str, label: str, trigger: Sequence[int]) -> list[Row]:
        """Losses of every text of a set behind a trigger, which is empty for 'clean'.

        `nll` scores the text's own tokens; `nll_with_trigger` the trigger's tokens too, as the reference does.
        """
        texts = self.sets[kind]
        ids = with_trigger(self.alphabet.end_of_text, trigger, text_tensor(texts, self.referee.device))
        losses = self.referee.token_nll(ids, ids.shape[1] - 1)
        own, whole = losses[:, len(trigger) :].mean(dim=1).tolist(), losses.mean(dim=1).tolist()
        return [
            {"model": self.name, "trigger": label, "text": text["id"], "subset": text["subset"], "nll": nll, "nll_with_trigger": every}
            for text, nll, every in zip(texts, own, whole, strict=True)
        ]


def text_tensor(texts: Sequence[Row], device: torch.device) -> Tensor:
    """(M, S) ids of texts of equal length."""
    return torch.tensor([text["ids"] for text in texts], device=device)


def common_triggers(found: Mapping[str, dict[str, Any]], round_trip: RoundTrip, alphabet: Alphabet, spec: UAT) -> dict[str, list[int]]:
    """Triggers that are reported on every model: none ('clean'), the zero points, and the one of every model."""
    length, tokens = spec.trigger_length, alphabet.writable()
    drawn = {f"random_{number}": random_trigger(spec.seed, number, length, tokens, "control") for number in range(spec.controls)}
    own = {name: search["trigger"] for name, search in found.items()}
    return {"clean": [], "neutral": neutral_trigger(round_trip.tokenizer, length), **own, **drawn}


def own_triggers(name: str, search: Mapping[str, Any]) -> dict[str, list[int]]:
    """Triggers that are reported on the model alone on which they were searched."""
    restarts = {f"restart_{number}:{name}": restart["trigger"] for number, restart in enumerate(search["restarts"])}
    return {**restarts, f"query_greedy:{name}": search["query_greedy"]["trigger"]}
