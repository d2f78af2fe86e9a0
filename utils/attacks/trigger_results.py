"""uat_results.json and learned_triggers.csv from the rows: figures of each model, worst case over triggers, controls, transfer, budget."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.schema import UAT
from utils.attacks.flags import trigger_flags
from utils.attacks.round_trip import RoundTrip
from utils.attacks.uat import surviving_share
from utils.run.records import Row

Searches = Mapping[str, dict[str, Any]]


def mean_loss(rows: Sequence[Row], model: str, trigger: str, key: str = "nll") -> float:
    """Mean over the texts, nats per token."""
    return float(np.mean([row[key] for row in rows if row["model"] == model and row["trigger"] == trigger]))


def summarise(rows: Sequence[Row], model: str, trigger: str) -> dict[str, float]:
    """Held-out losses of one trigger on one model beside the clean, neutral and random ones, nats per token of the text."""
    clean, attacked, neutral = (mean_loss(rows, model, kind) for kind in ("clean", trigger, "neutral"))
    random = float(np.mean([row["nll"] for row in rows if row["model"] == model and row["trigger"].startswith("random_")]))
    return {
        "clean_loss": clean,
        "attacked_loss": attacked,
        "nll_increase": attacked - clean,
        "nll_increase_percent": 100 * (attacked / clean - 1),
        "neutral_increase": neutral - clean,
        "random_increase": random - clean,
        "increase_over_neutral": attacked - neutral,
        "reference_increase_percent": 100 * (mean_loss(rows, model, trigger, "nll_with_trigger") / clean - 1),
    }


def worst_case(report: Sequence[Row], select: Sequence[Row], model: str) -> dict[str, Any]:
    """The strongest of all triggers, those of other models and the controls included, chosen on the second set of texts and reported
    on the third."""
    kinds = dict.fromkeys(row["trigger"] for row in select if row["model"] == model)
    strongest = max(kinds, key=lambda kind: mean_loss(select, model, kind))
    facts = summarise(report, model, strongest)
    kept = ("attacked_loss", "nll_increase", "nll_increase_percent", "reference_increase_percent")
    return {"trigger": strongest, **{key: facts[key] for key in kept}}


def controls(report: Sequence[Row], model: str, search: Mapping[str, Any]) -> dict[str, Any]:
    """What could show that the search is weak: held-out rises of every restart and of the search without gradient; how much of the rise
    on the search texts came in the last sweep."""
    clean = mean_loss(report, model, "clean")
    restarts = [mean_loss(report, model, f"restart_{number}:{model}") - clean for number in range(len(search["restarts"]))]
    start, before, end = (search["by_sweep"][place] for place in (0, -2, -1))
    return {
        "query_greedy_increase": mean_loss(report, model, f"query_greedy:{model}") - clean,
        "increase_by_restart": restarts,
        "last_sweep_share": (end - before) / (end - start) if end > start else 0.0,
    }


def trigger_results(
    report: Sequence[Row], select: Sequence[Row], found: Searches, texts: Sequence[Row], round_trip: RoundTrip, spec: UAT
) -> dict[str, Any]:
    """Everything that follows from the searches, the rows on the second and third set of texts, and the texts of the third."""
    label = {name: f"{name}_pythia" for name in found}
    transfer = {label[name]: {label[other]: summarise(report, name, other)["nll_increase"] for other in found} for name in found}
    results = {
        label[name]: {
            "trigger_text": round_trip.tokenizer.decode(search["trigger"], skip_special_tokens=False),
            "trigger_ids": search["trigger"],
            **summarise(report, name, name),
            "worst_case": worst_case(report, select, name),
            "transfer_increase": {label[other]: transfer[label[other]][label[name]] for other in found},
            "survives_retokenisation": surviving_share(round_trip, search["trigger"], [text["ids"] for text in texts]),
            "search": search,
        }
        for name, search in found.items()
    }
    doubts = {label[name]: controls(report, name, search) for name, search in found.items()}
    work = ("forwards", "backwards", "evaluations", "flops")
    searches, positions = spec.restarts + 1, spec.sweeps * spec.trigger_length
    allowed = {"searches": searches, "positions": positions, "candidates_per_position": spec.candidates}
    allowed |= {"gradients_per_position": spec.beam * spec.gradients * spec.search_texts}
    budget = {
        "allowed_per_model": allowed,
        "by_model": {label[name]: {kind: search[kind] for kind in work} for name, search in found.items()},
    }
    flags = trigger_flags(results, doubts, transfer, budget)
    return {"results": results, "controls": doubts, "transfer": transfer, "budget": budget, "flags": flags}


def table_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """learned_triggers.csv."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["model", "trigger", "nll_increase_percent"])
    writer.writerows([name, facts["trigger_text"], facts["nll_increase_percent"]] for name, facts in results.items())
    return table.getvalue()
