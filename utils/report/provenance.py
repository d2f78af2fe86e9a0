"""What was done with what: training, budgets of the attacks, machines and versions."""

from __future__ import annotations

from typing import Any

import pandas as pd

from utils.report import triggers
from utils.report.numbers import COUNT, NATS, PERPLEXITY, Number, Source
from utils.report.study import ARMS, Study
from utils.report.table import Cell, Table
from utils.statistics.estimate import Estimate


def training_table(study: Study) -> Table:
    rows: list[dict[str, Cell]] = []
    for arm in ARMS:
        for seed, history in study.stored(f"{arm}_history").items():
            units = {"best_val_nll": NATS, "best_val_perplexity": PERPLEXITY, "best_step": COUNT, "training_tokens": COUNT}
            numbers = {key: _stored(history[key], unit, f"{arm}_history", key) for key, unit in units.items()}
            rows.append({"model": arm, "seed": str(seed), **numbers})
    return Table("training", "Training", "The model with the lowest validation loss is the one evaluated.", rows)


def budget_table(study: Study) -> Table:
    """What the attacks spent on each model, over all seeds."""
    rows: list[dict[str, Cell]] = []
    spent = [name for name in ("evaluations", "forwards", "backwards") if name in study.flips]
    for (attack, model), mine in study.flips.groupby(["attack", "model"], sort=False):
        source = {"model": (model,), "attack": (f"{attack}:*" if attack == "transfer" else attack,)}
        sums = {name: _sum(mine[name], Source("hotflip_records", source, (name,))) for name in spent}
        if any(sums.values()):
            rows.append({"attack": str(attack), "model": str(model), **sums})
    for model in triggers.searched(study):
        results = [stored["results"].get(f"{model}_pythia") for stored in study.stored("uat_results").values()]
        searches = [facts["search"] for facts in results if facts]
        sums = {
            name: _sum(
                pd.Series([search.get(name) for search in searches], dtype=float),
                Source("uat_results", {}, (f"results.{model}_pythia.search.{name}",)),
            )
            for name in spent
        }
        rows.append({"attack": "trigger search", "model": model, **sums})
    return Table("budget", "Budgets of the attacks", "Sums over texts and seeds; a dash where the records do not say.", rows)


def machine_table(study: Study) -> Table:
    """Machine, versions, time and restarts of each seed. Words, and no part of the CSV files: they depend on the moment."""
    rows: list[dict[str, Cell]] = []
    for seed, setup in study.stored("setup").items():
        row: dict[str, Cell] = {
            "seed": str(seed),
            "device": str(setup.get("gpu_name", setup["device"])),
            "platform": str(setup["platform"]),
        }
        versions = setup["versions"]
        row["versions"] = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
        row["code"] = str(setup["code_revision"])[:12]
        for arm in ARMS:
            history = study.json[seed].get(f"{arm}_history")
            row[arm] = "not complete" if history is None else _time(history)
        rows.append(row)
    return Table("machine", "Machines, time and restarts", "Time of the training stages, over all starts.", rows)


def _time(history: dict[str, Any]) -> str:
    return f"{history['training_time_seconds']:,.1f} s, {len(history['resumed_at_steps'])} restart(s)"


def _stored(value: float, unit: str, artefact: str, field: str) -> Number:
    return Number.of(Estimate(value, None, None, 1), unit, "as stored", Source(artefact, {}, (field,)))


def _sum(values: pd.Series, source: Source) -> Number | None:
    known = values.dropna()
    return Number.of(Estimate(float(known.sum()), None, None, len(known)), COUNT, "sum", source) if len(known) else None
