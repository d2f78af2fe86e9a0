"""Figures of the attacks: rise by budget, attacks beside their controls, success by threshold, quality against robustness, transfer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from utils.report import robustness, triggers
from utils.report.figures import (
    COLOURS,
    MARKERS,
    SIZE,
    bars,
    dress,
    error,
    integers,
    legend_below,
    perplexities,
    training_curves,
    validation_curves,
)
from utils.report.numbers import Number
from utils.report.robustness import WORST
from utils.report.study import ARMS, RANDOM, Study
from utils.report.table import Table
from utils.report.tables import flip_transfer_table, transfer_table

RISE = "rise, nats per untouched token"
ALT = {
    "training_curves": "Training cross-entropy of both arms against optimiser steps",
    "validation_curves": "Validation loss of both arms against optimiser steps",
    "perplexity": "Test perplexity of every model, whole and by subset, with intervals",
    "robustness": "Rise of the loss against the number of flipped tokens, with bands",
    "attacks": "Rise under each attack and its control, for every model",
    "success": "Share of texts whose rise exceeds a threshold, against the threshold",
    "quality_robustness": "Loss before the attack against rise under it, for every model",
    "transfer": "Rise on one model of triggers searched on another",
    "flip_transfer": "Rise on one model of flips found on another",
}


def figures(study: Study) -> dict[str, Figure]:
    """Every figure for which there are records."""
    drawn: dict[str, Callable[[], Figure]] = {
        "training_curves": lambda: training_curves(study),
        "validation_curves": lambda: validation_curves(study),
        "perplexity": lambda: perplexities(study),
        "robustness": lambda: rise_by_budget(study),
        "attacks": lambda: attacks_and_controls(study),
        "success": lambda: success_by_threshold(study),
        "quality_robustness": lambda: quality_and_robustness(study),
    }
    for table in (transfer_table(study), flip_transfer_table(study)):
        if table.rows:
            drawn[table.name] = lambda table=table: transfer(table)  # type: ignore[misc]
    return {name: draw() for name, draw in drawn.items()}


def rise_by_budget(study: Study) -> Figure:
    """HotFlip's rise against the number of flips, with bands over texts (and seeds)."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    for model in study.attacked:
        if "hotflip" not in robustness.kinds(study, model):
            continue
        numbers = robustness.curve(study, model)
        budget = np.arange(len(numbers))
        axis.plot(budget, [number.value for number in numbers], color=COLOURS[model], marker=MARKERS[model], markersize=4, label=model)
        if all(number.low is not None for number in numbers):
            low, high = ([getattr(number, bound) for number in numbers] for bound in ("low", "high"))
            axis.fill_between(budget, low, high, color=COLOURS[model], alpha=0.15, linewidth=0)
    dress(axis, "HotFlip", "flipped tokens", RISE)
    integers(axis)
    legend_below(figure, axis)
    return figure


def attacks_and_controls(study: Study) -> Figure:
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    groups: dict[str, dict[str, Number]] = {}
    for model in study.attacked:
        for kind in [kind for kind in robustness.kinds(study, model) if kind != RANDOM]:
            groups.setdefault(kind.replace("_", "\n"), {})[model] = robustness.rise(study, model, kind)
        if "hotflip" in robustness.kinds(study, model):
            groups.setdefault("random\nflips", {})[model] = robustness.random_rise(study, model)
    for model in triggers.searched(study):
        for label, trigger in {"trigger": model, "neutral\ntrigger": "neutral"}.items():
            groups.setdefault(label, {})[model] = triggers.trigger_rise(study, model, trigger)
    bars(axis, groups)
    dress(axis, "Attacks and their controls", "", "rise, nats per token")
    axis.tick_params(axis="x", labelsize=8 if len(groups) > 5 else 10)
    legend_below(figure, axis)
    return figure


def success_by_threshold(study: Study) -> Figure:
    """Share of the texts whose worst-case rise exceeds a threshold, against the threshold; all seeds' texts together."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    over = common_attacks(study)
    chosen = {model: [kind for kind in over if kind in robustness.kinds(study, model)] for model in study.attacked}
    found = {model: robustness.rises(study, model, WORST, mine).to_numpy() for model, mine in chosen.items() if mine}
    threshold = study.config.hotflip.threshold_nats
    grid = np.linspace(0, 1.05 * max(threshold, *(float(each.max()) for each in found.values())), 200)
    for model, each in found.items():
        shares = (each.reshape(-1, 1) > grid).mean(axis=0)
        axis.plot(grid, 100 * shares, color=COLOURS[model], marker=MARKERS[model], markersize=4, markevery=25, label=model)
    axis.axvline(threshold, color="black", linestyle=":", linewidth=1)
    dress(axis, "Success by threshold", f"threshold, nats per untouched token (dotted: {threshold:g})", "texts above, %")
    axis.set_ylim(-2, 102)
    legend_below(figure, axis)
    return figure


def quality_and_robustness(study: Study) -> Figure:
    """One point a model: loss before any flip against worst-case rise; lower left is better in both."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    for model in study.attacked:
        if not (over := [kind for kind in common_attacks(study) if kind in robustness.kinds(study, model)]):
            continue
        clean, rise = robustness.clean_loss(study, model), robustness.rise(study, model, WORST, over)
        axis.errorbar(clean.value, rise.value, xerr=error(clean), yerr=error(rise), color=COLOURS[model], elinewidth=1, capsize=2)
        axis.plot(clean.value, rise.value, MARKERS[model], color=COLOURS[model], markersize=8, label=model)
    dress(axis, "Quality and robustness", "loss before the attack, nats per token", f"worst-case {RISE}")
    axis.margins(0.15)
    legend_below(figure, axis)
    return figure


def transfer(table: Table) -> Figure:
    """A transfer table as a map; a cell says its number."""
    sources = table.columns[1:]
    values = [[cell.value if isinstance(cell := row[column], Number) else np.nan for column in sources] for row in table.rows]
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    image = axis.imshow(np.array(values, dtype=float), cmap="cividis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.3f}", ha="center", va="center", color="white" if value <= middle else "black")
    axis.set_xticks(range(len(sources)), [source.partition("_of_")[2] for source in sources], rotation=20)
    axis.set_yticks(range(len(table.rows)), [str(row["attacked"]) for row in table.rows])
    axis.set_xlabel("found on")
    axis.set_ylabel("tried on")
    axis.set_title(table.title)
    figure.colorbar(image, ax=axis, label="rise, nats per token")
    return figure


def common_attacks(study: Study) -> list[str]:
    """Attacks made on both arms, over which worst cases are taken."""
    return robustness.ensemble(study, *(arm for arm in ARMS if arm in study.attacked))
