"""Figures as PNG, PDF and SVG, one panel each and narrow enough for a telephone. Colours are from the Okabe-Ito palette, which
colour-blind readers can tell apart; markers tell the models apart without any colour."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from utils.report import quality
from utils.report.numbers import Number
from utils.report.study import ARMS, Study
from utils.run.artifacts import published

KNOWN = {
    "base": ("#767676", "s"),
    "converted": ("#E69F00", "D"),
    "baseline": ("#0072B2", "o"),
    "monotonic": ("#D55E00", "^"),
    "noise": ("#009E73", "v"),
    "earlier": ("#CC79A7", "P"),
}
COLOURS = defaultdict(lambda: "#000000", {model: colour for model, (colour, _) in KNOWN.items()})
MARKERS = defaultdict(lambda: "x", {model: marker for model, (_, marker) in KNOWN.items()})
SIZE = (5.4, 3.8)  # inches
DPI = 160
FIXED: Any = {"svg.hashsalt": "report", "svg.fonttype": "path"}  # the same bytes each time, and no font to be found


def write_figures(drawn: dict[str, Figure], folder: Path) -> None:
    """Write every figure as <name>.png, .pdf and .svg, and close it."""
    with published(folder) as aside, matplotlib.rc_context(FIXED):
        aside.mkdir()
        for name, figure in drawn.items():
            figure.set_dpi(DPI)
            if engine := figure.get_layout_engine():
                engine.execute(figure)
            figure.set_layout_engine(None)  # laid out once, for all formats
            figure.savefig(aside / f"{name}.png", dpi=DPI)
            figure.savefig(aside / f"{name}.pdf", metadata={"CreationDate": None})
            figure.savefig(aside / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def training_curves(study: Study) -> Figure:
    """Training cross-entropy; one line for each seed, and a dotted line at each restart."""
    return _curves(study, "cross_entropy", "Training cross-entropy", "")


def validation_curves(study: Study) -> Figure:
    """Validation loss at the steps where it was taken."""
    return _curves(study, "validation_nll", "Validation loss", "marked")


def _curves(study: Study, column: str, title: str, style: str) -> Figure:
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    for arm in ARMS:
        for number, seed in enumerate(sorted(set(study.steps["seed"]))):
            rows = study.steps[(study.steps["arm"] == arm) & (study.steps["seed"] == seed) & study.steps[column].notna()]
            marker = MARKERS[arm] if style else None
            label = None if number else arm
            axis.plot(rows["step"], rows[column], color=COLOURS[arm], marker=marker, markersize=4, linewidth=1.2, label=label)
            for step in study.json.get(seed, {}).get(f"{arm}_history", {}).get("resumed_at_steps", []):
                axis.axvline(step, color=COLOURS[arm], linestyle=":", linewidth=1.2)
    dress(axis, title, "optimiser step (dotted: restarts)", "nats per token")
    integers(axis)
    legend_below(figure, axis)
    return figure


def perplexities(study: Study) -> Figure:
    """Perplexity of all models, whole and by subset, with intervals over documents."""
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    groups = [None, *(study.subsets if len(study.subsets) <= 4 else ())]
    for number, model in enumerate(study.models):
        found = [quality.perplexity_of(study, model, subset) for subset in groups]
        places = [place + 0.14 * (number - (len(study.models) - 1) / 2) for place in range(len(groups))]
        errors = np.hstack([error(each) for each in found])
        axis.errorbar(places, [each.value for each in found], yerr=errors, color=COLOURS[model], linestyle="none", capsize=3)
        axis.plot(places, [each.value for each in found], MARKERS[model], color=COLOURS[model], label=model)
    axis.set_xticks(range(len(groups)), [(subset or "all").replace("$", r"\$") for subset in groups])  # no formula
    axis.set_xlim(-0.5, len(groups) - 0.5)
    dress(axis, "Test perplexity", "", "perplexity (log scale)")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, axis)
    return figure


def bars(axis: Axes, groups: dict[str, dict[str, Number]]) -> None:
    """Grouped bars with error bars; one group for each key, one colour for each model, which may be missing in a group."""
    models = list(dict.fromkeys(model for numbers in groups.values() for model in numbers))
    width, labelled = 0.8 / len(models), set()
    for place, numbers in enumerate(groups.values()):
        for model, number in numbers.items():
            x = place - 0.4 + (models.index(model) + 0.5) * width
            label = None if model in labelled else model
            labelled.add(model)
            axis.bar(x, number.value, width, color=COLOURS[model], yerr=error(number), capsize=2, label=label)
    axis.set_xticks(range(len(groups)), groups.keys())


def error(number: Number) -> list[list[float]]:
    """Distances to both bounds, (2, 1); zero where there is no interval."""
    low = number.value if number.low is None else number.low
    high = number.value if number.high is None else number.high
    return [[max(0.0, number.value - low)], [max(0.0, high - number.value)]]


def dress(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def integers(axis: Axes) -> None:
    """Steps and flips are whole numbers."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_below(figure: Figure, axis: Axes) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
