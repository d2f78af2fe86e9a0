"""Figures as PNG and PDF. Colours are from the Okabe-Ito palette, which colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from utils.report.statistics import Estimate, perplexity
from utils.report.study import ATTACKED, MODELS, Study
from utils.run.artifacts import published

COLOURS = {"base": "#999999", "converted": "#E69F00", "baseline": "#0072B2", "monotonic": "#D55E00"}


def write_figures(study: Study, folder: Path) -> None:
    drawn = {
        "training_curves": training_curves(study),
        "robustness": robustness(study),
        "perplexity": perplexities(study),
    }
    with published(folder) as aside:
        aside.mkdir()
        for name, figure in drawn.items():
            figure.savefig(aside / f"{name}.png", dpi=160)
            figure.savefig(aside / f"{name}.pdf", metadata={"CreationDate": None})
            plt.close(figure)


def training_curves(study: Study) -> Figure:
    """Training loss (thin) and validation loss (marked) of both arms; one line for each seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for arm in ("baseline", "monotonic"):
        for seed in study.seeds:
            rows = study.steps[(study.steps["arm"] == arm) & (study.steps["seed"] == seed)]
            steps, checks = rows[rows["loss"].notna()], rows[rows["validation_nll"].notna()]
            label = arm if seed == study.seeds[0] else None
            axes[0].plot(steps["step"], steps["cross_entropy"], color=COLOURS[arm], alpha=0.7, linewidth=1, label=label)
            axes[1].plot(checks["step"], checks["validation_nll"], color=COLOURS[arm], marker="o", markersize=4, label=label)
    for axis, title in zip(axes, ("Training cross-entropy", "Validation loss"), strict=True):
        _dress(axis, title, "optimiser step", "nats per token")
        axis.legend(frameon=False)
    return figure


def robustness(study: Study) -> Figure:
    """Left: rise against the number of flips. Right: rise under HotFlip and under the own trigger, beside the controls."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for model in ATTACKED:
        texts = study.flips[study.flips["model"] == model].groupby("text")["nll"]
        curves = np.stack([np.mean(losses.tolist(), axis=0) for _, losses in texts])  # seeds averaged by text, as in the tables
        rises = curves - curves[:, :1]
        estimates = [study.interval_of(column) for column in rises.T]
        budget, middle = np.arange(rises.shape[1]), rises.mean(axis=0)
        axes[0].plot(budget, middle, color=COLOURS[model], marker="o", markersize=4, label=model)
        if all(estimate.low is not None for estimate in estimates):
            low, high = ([getattr(estimate, bound) for estimate in estimates] for bound in ("low", "high"))
            axes[0].fill_between(budget, low, high, color=COLOURS[model], alpha=0.15, linewidth=0)
    _dress(axes[0], "HotFlip", "flipped tokens", "rise, nats per untouched token")
    axes[0].legend(frameon=False)
    kinds = {
        "HotFlip": lambda model: study.flip_rise(model),
        "random flips": lambda model: study.flip_rise(model, "random_rise"),
        "trigger": lambda model: study.trigger_rise(model, model),
        "neutral trigger": lambda model: study.trigger_rise(model, "neutral"),
    }
    _bars(axes[1], {kind: {model: estimate(model) for model in ATTACKED} for kind, estimate in kinds.items()})
    _dress(axes[1], "Attacks and their controls", "", "rise, nats per token")
    return figure


def perplexities(study: Study) -> Figure:
    """Perplexity of all models, whole and by subset, with intervals over documents."""
    subsets = sorted(study.documents["subset"].unique())
    figure, axis = plt.subplots(figsize=(1.8 * (1 + len(subsets)) + 2.5, 3.8), layout="constrained")
    groups = {"all": None} | {subset: subset for subset in subsets}
    _bars(axis, {label: {model: study.nll(model, subset).map(perplexity) for model in MODELS} for label, subset in groups.items()})
    _dress(axis, "Test perplexity", "", "perplexity (log scale)")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bars(axis: Axes, groups: dict[str, dict[str, Estimate]]) -> None:
    """Grouped bars with error bars; one group for each key, one colour for each model."""
    for place, estimates in enumerate(groups.values()):
        width = 0.8 / len(estimates)
        for number, (model, estimate) in enumerate(estimates.items()):
            low = estimate.value if estimate.low is None else estimate.low
            high = estimate.value if estimate.high is None else estimate.high
            error = [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]
            x = place - 0.4 + (number + 0.5) * width
            label = model if place == 0 else None
            axis.bar(x, estimate.value, width, color=COLOURS[model], yerr=error, capsize=2, label=label)
    axis.set_xticks(range(len(groups)), groups.keys())


def _dress(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
