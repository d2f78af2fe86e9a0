"""Universal adversarial trigger: one token sequence that, put before any text, raises the loss of that text.

Wallace et al. 2019 (arXiv 1908.07125), coordinate-wise: the gradient proposes replacements for one position, exact
re-scoring on all search texts chooses, only an improvement is accepted. Restarts are chosen on a second set of texts, and
the report is on a third. The trigger's own tokens are never scored.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import UAT, Experiment
from utils.attacks.controls import neutral_trigger, random_trigger
from utils.attacks.scoring import ADMITTED, Scorer, allowed_tokens, first_order_candidates
from utils.data.attack_texts import Alphabet, read_attack_texts
from utils.data.tokenizer import load_tokenizer
from utils.models.loading import device_of, load_model
from utils.run.artifacts import read_json, write_json
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Row, write_rows


@dataclass
class SearchState:
    """Where a search is. Written after every position, so that a killed search goes on with the same next step."""

    restart: int = 0
    sweep: int = 0
    position: int = 0
    trigger: list[int] = field(default_factory=list)
    objective: float = 0.0
    improved: bool = False
    finished: list[dict[str, Any]] = field(default_factory=list)
    forwards: int = 0
    backwards: int = 0

    @classmethod
    def stored(cls, path: Path) -> SearchState:
        """The state on disk, or a new search."""
        return cls(**read_json(path)) if path.exists() else cls()


def with_trigger(end_of_text: int, trigger: Sequence[int], texts: Tensor) -> Tensor:
    """texts (M, S) -> (M, 1 + L + S): end-of-text, trigger, text."""
    head = torch.tensor([end_of_text, *trigger], device=texts.device).repeat(len(texts), 1)
    return torch.cat([head, texts], dim=1)


class TriggerSearch:
    """The search on one model; texts are {id, ids} of equal length."""

    def __init__(self, scorer: Scorer, spec: UAT, end_of_text: int, allowed: Tensor) -> None:
        self.scorer, self.spec, self.end_of_text, self.allowed = scorer, spec, end_of_text, allowed

    def nll(self, trigger: Sequence[int], texts: Tensor) -> Tensor:
        """(M,) mean NLL of each text's own tokens behind the trigger, nats per token."""
        return self.scorer.nll(with_trigger(self.end_of_text, trigger, texts), texts.shape[1])

    def run(self, search: Tensor, select: Tensor, path: Path, after_step: Callable[[int], None]) -> dict[str, Any]:
        """All restarts; returns {trigger, search_nll, select_nll, restarts} of the one that is best on `select`.

        `path` keeps the state; `after_step(n)` is called after n more positions, when the state is on disk, and may raise.
        """
        state = SearchState.stored(path)
        while state.restart < self.spec.restarts:
            if not state.trigger:
                self._start(state, search)
            self._improve(state, search)
            if self._advance(state):
                select_nll = float(self.nll(state.trigger, select).mean())
                found = {"trigger": state.trigger, "search_nll": state.objective, "select_nll": select_nll, "sweeps": state.sweep}
                state.finished.append(found)
                state.restart, state.sweep, state.trigger = state.restart + 1, 0, []
            state.forwards += self.scorer.forwards
            state.backwards += self.scorer.backwards
            self.scorer.forwards = self.scorer.backwards = 0
            write_json(path, asdict(state))
            after_step(1)
        best = max(state.finished, key=lambda found: found["select_nll"])
        return {**best, "restarts": state.finished, "forwards": state.forwards, "backwards": state.backwards}

    def _start(self, state: SearchState, search: Tensor) -> None:
        tokens = np.flatnonzero(self.allowed.cpu().numpy())
        state.trigger = random_trigger(self.spec.seed, state.restart, self.spec.trigger_length, tokens, "start")
        state.objective = float(self.nll(state.trigger, search).mean())

    def _improve(self, state: SearchState, search: Tensor) -> None:
        """One position: gradient summed over the texts, best candidates scored exactly on all of them."""
        place = state.position
        ids = with_trigger(self.end_of_text, state.trigger, search)
        slope = self.scorer.gradient(ids, search.shape[1], slice(1 + place, 2 + place)).sum(dim=0)  # (1, d)
        current = torch.tensor([state.trigger[place]], device=slope.device)
        proposed = first_order_candidates(self.scorer, slope, current, self.allowed[None], self.spec.candidates)[:, 1]
        which = torch.arange(len(ids), device=ids.device).repeat(len(proposed))
        tokens = proposed.repeat_interleave(len(ids))[:, None]  # (K*M, 1)
        nll = self.scorer.edited_nll(ids, which, torch.full_like(tokens, 1 + place), tokens, search.shape[1])
        scores = nll.view(len(proposed), -1).double().mean(dim=1)
        best = int(scores.argmax())
        if float(scores[best]) > state.objective + ADMITTED:
            state.trigger[place] = int(proposed[best])
            state.objective = float(scores[best])
            state.improved = True

    def _advance(self, state: SearchState) -> bool:
        """Go to the next position; True when the restart is over: all sweeps done, or one without an improvement."""
        state.position += 1
        if state.position < self.spec.trigger_length:
            return False
        over = not state.improved or state.sweep + 1 >= self.spec.sweeps
        state.sweep, state.position, state.improved = state.sweep + 1, 0, False
        return over


def find_trigger(
    model: PreTrainedModel, name: str, sets: dict[str, list[Row]], alphabet: Alphabet, spec: UAT, precision: str, path: Path, stop: Stop
) -> dict[str, Any]:
    """Search the trigger of one model on the sets 'search' and 'select' of texts, with resume."""
    scorer = Scorer(model, precision)
    allowed = allowed_tokens(model.config.vocab_size, alphabet.writable(), scorer.device)
    search = TriggerSearch(scorer, spec, alphabet.end_of_text, allowed)
    texts = {kind: text_tensor(sets[kind], scorer.device) for kind in ("search", "select")}
    stored = SearchState.stored(path)
    done = (stored.restart * spec.sweeps + stored.sweep) * spec.trigger_length + stored.position
    progress = Progress(f"trigger search on {name}", spec.restarts * spec.sweeps * spec.trigger_length, done)

    def after_step(positions: int) -> None:
        progress.advance(positions)
        stop.check()

    found = search.run(texts["search"], texts["select"], path, after_step)
    progress.close()
    return found


def text_tensor(texts: Sequence[Row], device: torch.device) -> Tensor:
    """(M, S) ids of texts of equal length."""
    return torch.tensor([text["ids"] for text in texts], device=device)


def report_rows(model: PreTrainedModel, name: str, texts: Sequence[Row], triggers: dict[str, list[int]], end_of_text: int) -> list[Row]:
    """Losses of every held-out text behind every trigger on one model; the empty trigger is 'clean'.

    `nll` scores the text's own tokens; `nll_with_trigger` the trigger's tokens too, as the reference does. Both are scored in
    fp32, whatever precision the search ran in.
    """
    scorer = Scorer(model, "fp32")
    ids, rows = text_tensor(texts, scorer.device), []
    for kind, trigger in triggers.items():
        losses = scorer.token_nll(with_trigger(end_of_text, trigger, ids), len(trigger) + ids.shape[1])
        own, whole = losses[:, len(trigger) :].mean(dim=1).tolist(), losses.mean(dim=1).tolist()
        rows += [
            {"model": name, "trigger": kind, "text": text["id"], "subset": text["subset"], "nll": nll, "nll_with_trigger": every}
            for text, nll, every in zip(texts, own, whole, strict=True)
        ]
    return rows


def surviving_share(tokenizer: Tokenizer, trigger: Sequence[int], texts: Sequence[Row]) -> float:
    """Share of the texts for which trigger and text, decoded and encoded again, give the same ids."""
    joined = [[*trigger, *text["ids"]] for text in texts]
    encoded = tokenizer.encode_batch([tokenizer.decode(ids, skip_special_tokens=False) for ids in joined], add_special_tokens=False)
    return sum(encoding.ids == ids for encoding, ids in zip(encoded, joined, strict=True)) / len(joined)


def summarise(rows: Sequence[Row], model: str, trigger: str) -> dict[str, float]:
    """Held-out losses of one trigger on one model beside the clean, neutral and random ones, nats per token of the text."""

    def mean(kind: str, key: str = "nll") -> float:
        return float(np.mean([row[key] for row in rows if row["model"] == model and row["trigger"] == kind]))

    clean, attacked, neutral = mean("clean"), mean(trigger), mean("neutral")
    random = float(np.mean([row["nll"] for row in rows if row["model"] == model and row["trigger"].startswith("random_")]))
    return {
        "clean_loss": clean,
        "attacked_loss": attacked,
        "nll_increase": attacked - clean,
        "nll_increase_percent": 100 * (attacked / clean - 1),
        "neutral_increase": neutral - clean,
        "random_increase": random - clean,
        "increase_over_neutral": attacked - neutral,
        "reference_increase_percent": 100 * (mean(trigger, "nll_with_trigger") / clean - 1),
    }


def attack_stored(
    config: Experiment, seed: int, *, models: dict[str, Path], texts: Path, tokenizer: Path, state: Path, records: Path, stop: Stop
) -> tuple[dict[str, Any], str]:
    """Search a trigger on every model, then report every trigger on every model.

    Writes all rows to `records`; returns uat_results.json and the text of learned_triggers.csv.
    """
    device, spec, precision = device_of(config.compute), config.uat, config.compute.precision
    sets, alphabet = read_attack_texts(texts)
    words = load_tokenizer(tokenizer)
    found = {
        name: find_trigger(load_model(folder, device), name, sets, alphabet, spec, precision, state / f"{name}.json", stop)
        for name, folder in models.items()
    }
    triggers = {"clean": [], "neutral": neutral_trigger(words, spec.trigger_length)}
    triggers |= {name: search["trigger"] for name, search in found.items()}
    triggers |= {
        f"random_{number}": random_trigger(spec.seed, number, spec.trigger_length, alphabet.writable(), "control")
        for number in range(spec.controls)
    }
    rows = [
        row
        for name, folder in models.items()
        for row in report_rows(load_model(folder, device), name, sets["report"], triggers, alphabet.end_of_text)
    ]
    write_rows(records, rows)
    results = {
        f"{name}_pythia": {
            "trigger_text": words.decode(search["trigger"], skip_special_tokens=False),
            "trigger_ids": search["trigger"],
            **summarise(rows, name, name),
            "transfer_increase": {f"{other}_pythia": summarise(rows, other, name)["nll_increase"] for other in models},
            "survives_retokenisation": surviving_share(words, search["trigger"], sets["report"]),
            "search": search,
        }
        for name, search in found.items()
    }
    attack = {
        "trigger_length": spec.trigger_length,
        "num_iterations": spec.sweeps,
        "num_restarts": spec.restarts,
        "num_opt_samples": spec.search_texts,
        "num_eval_samples": spec.report_texts,
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["model", "trigger", "nll_increase_percent"])
    writer.writerows([name, facts["trigger_text"], facts["nll_increase_percent"]] for name, facts in results.items())
    return {"seed": seed, "attack_config": attack | spec.model_dump(mode="json"), "results": results}, table.getvalue()
