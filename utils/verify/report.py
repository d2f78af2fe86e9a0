"""The report's figures can be drawn without a display, and its JSON holds no NaN."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import pandas as pd

from configs.schema import Experiment
from utils.report.figures import training_curves
from utils.report.study import Study
from utils.run.artifacts import read_json, write_json
from utils.run.checks import Finding


def report(config: Experiment, folder: Path) -> Finding:
    """Draw training curves of made-up losses as PNG and PDF and look at them; write and read JSON, with a NaN too."""
    folder.mkdir()
    if fault := _fault_of_figures(_study(config), folder) or _fault_of_json(folder / "numbers.json"):
        return "no", fault
    return "ok", "a figure is drawn as PNG and PDF; JSON is exact and refuses NaN"


def _study(config: Experiment) -> Study:
    steps = [
        {"arm": arm, "seed": 0, "step": step, "loss": 9 / step, "cross_entropy": 9 / step, "validation_nll": 10 / step}
        for arm in ("baseline", "monotonic")
        for step in range(1, 5)
    ]
    nothing = pd.DataFrame()
    return Study(config, {0: {}}, nothing, nothing, nothing, pd.DataFrame(steps))


def _fault_of_figures(study: Study, folder: Path) -> str | None:
    figure, picture, page = training_curves(study), folder / "curves.png", folder / "curves.pdf"
    try:
        figure.savefig(picture)
        figure.savefig(page)
    finally:
        plt.close(figure)
    pixels = matplotlib.image.imread(picture)
    if float(pixels.min()) == float(pixels.max()):
        return f"{picture}: the picture is blank"
    return None if page.read_bytes().startswith(b"%PDF") else f"{page}: found no PDF"


def _fault_of_json(path: Path) -> str | None:
    value = {"a third": 1 / 3, "word": "größe", "list": [1, None, True]}
    write_json(path, value)
    if (found := read_json(path)) != value:
        return f"{path}: wrote {value}, read {found}"
    try:
        write_json(path, {"loss": math.nan})
    except ValueError:
        return None
    return f"{path}: a NaN was written, which other programs cannot read"
