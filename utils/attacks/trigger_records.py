"""One row for each text, model and trigger: what a trigger does on texts that no search has seen. All losses are the referee's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from utils.attacks.uat import SearchState, TriggerSearch, with_trigger
from utils.data.attack_texts import Alphabet
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Records, Row

Triggers = Mapping[str, list[int]]


def find_trigger(
    model: PreTrainedModel,
    name: str,
    sets: dict[str, list[Row]],
    alphabet: Alphabet,
    round_trip: RoundTrip,
    spec: UAT,
    precision: str,
    path: Path,
    stop: Stop,
) -> dict[str, Any]:
    """Search the trigger of one model on the sets 'search' and 'select' of texts, with resume."""
    scorer = Scorer(model, precision)
    allowed = allowed_tokens(model.config.vocab_size, alphabet.writable(), scorer.device)
    search = TriggerSearch(scorer, spec, alphabet.end_of_text, allowed, round_trip)
    texts = {kind: text_tensor(sets[kind], scorer.device) for kind in ("search", "select")}
    stored = SearchState.stored(path)
    done = (stored.restart * spec.sweeps + stored.sweep) * spec.trigger_length + stored.position
    progress = Progress(f"trigger search on {name}", (spec.restarts + 1) * spec.sweeps * spec.trigger_length, done)

    def after_step(positions: int) -> None:
        progress.advance(positions)
        stop.check()

    found = search.run(texts["search"], texts["select"], path, after_step)
    progress.close()
    return found


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


def report_rows(
    model: PreTrainedModel, name: str, texts: Sequence[Row], triggers: Triggers, end_of_text: int, path: Path, check: Callable[[], None]
) -> list[Row]:
    """Losses of every text behind every trigger on one model, a trigger at a time, with resume; the empty trigger is 'clean'.

    `nll` scores the text's own tokens; `nll_with_trigger` the trigger's tokens too, as the reference does. `check` may raise.
    """
    referee, records = Referee(model), Records(path)
    ids = text_tensor(texts, referee.device)
    for group in records.pending([[(kind, text) for text in texts] for kind in triggers]):
        check()
        trigger = triggers[group[0][0]]
        losses = referee.token_nll(with_trigger(end_of_text, trigger, ids), len(trigger) + ids.shape[1])
        own, whole = losses[:, len(trigger) :].mean(dim=1).tolist(), losses.mean(dim=1).tolist()
        records.append(
            {"model": name, "trigger": kind, "text": text["id"], "subset": text["subset"], "nll": nll, "nll_with_trigger": every}
            for (kind, text), nll, every in zip(group, own, whole, strict=True)
        )
    return records.rows()
