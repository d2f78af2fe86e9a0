"""report.html: one file that opens offline. Whatever comes from records is escaped, and the page's own policy lets no other script run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.report import quality, robustness
from utils.report.attack_figures import ALT
from utils.report.examples import examples
from utils.report.findings import claim, findings, flags, non_inferior
from utils.report.numbers import Number
from utils.report.provenance import machine_table
from utils.report.robustness import HEADLINES, own
from utils.report.study import ARMS, Study
from utils.report.summary import head
from utils.report.table import Cell, Table
from utils.run.artifacts import write_text

HERE = Path(__file__).parent
BADGE = {"good": "in favour", "bad": "against", "open": "open", "note": "note"}


@dataclass(frozen=True)
class Tile:
    """One number on top of the page."""

    title: str
    number: Number
    note: str
    tone: str


def write_page(study: Study, made: list[Table], figures: Path, path: Path) -> None:
    """Write report.html from the tables and the SVG files of the figures."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    text = environment.get_template("page.html.j2").render(
        title=f"{study.config.run_name}: {study.config.model.name}",
        head=[line for line in head(study)[1:] if not line.startswith(("Absent", " ")) and "flag(s)" not in line],
        flags=flags(study),
        findings=findings(study),
        badge=BADGE,
        absent=study.absent,
        tiles=tiles(study),
        figures=[{"data": data_of(file), "alt": ALT.get(file.stem, file.stem)} for file in _ordered(figures)],
        tables=made,
        examples=examples(study),
        machine=machine_table(study),
        documents=documents(study),
        style=style,
        script=script,
        style_hash=policy_hash(style),
        script_hash=policy_hash(script),
        is_word=is_word,
        interval=interval,
    )
    write_text(path, text)


def tiles(study: Study) -> list[Tile]:
    """The primary endpoint and the headline of robustness, against the baseline and each matched control."""
    shown = []
    if set(ARMS) <= set(study.models):
        settled = {True: "good", False: "bad", None: "open"}[non_inferior(study)]
        note = f"non-inferior below {math.exp(study.config.report.margin_nats):.3f}"
        shown.append(Tile("Perplexity, monotonic / baseline", quality.perplexity_ratio(study), note, settled))
    made = robustness.comparisons(study)
    for name in HEADLINES:
        if name in made:
            alone = own(made, name)
            note = f"nats per token; without transfers {alone.mean.text()}" if alone else "nats per token"
            shown.append(Tile(f"Worst-case rise, monotonic − {made[name].other}", made[name].mean, note, claim(made, name)))
    return shown


def documents(study: Study) -> list[tuple[str, str]]:
    """(name, JSON text) of what is shown as it is stored: configuration, order preservation, samples, controls, budgets."""
    config = study.config.model_dump(mode="json", exclude={"paths", "telemetry"})
    shown: list[tuple[str, Any]] = [("Configuration", config)]
    for artefact, keys in {
        "setup": ("source", "splits", "base_model_origin"),
        "evaluation_results": ("metadata", "order_preservation", "benchmarks", "generation", "rounding", "published_values"),
        "uat_results": ("attack_config", "controls", "budget"),
        "hotflip_results": ("attack_config", "matched", "controls", "transfer", "budget"),
    }.items():
        for key in keys:
            by_seed = {seed: stored[key] for seed, stored in study.stored(artefact).items() if key in stored}
            if by_seed:
                first = next(iter(by_seed.values()))
                alike = all(value == first for value in by_seed.values())
                shown.append((f"{artefact}: {key.replace('_', ' ')}{'' if alike else ', by seed'}", first if alike else by_seed))
    return [(name, json.dumps(value, indent=2, ensure_ascii=False)) for name, value in shown]


def is_word(cell: Cell) -> bool:
    return isinstance(cell, str)


def interval(number: Number) -> str:
    """[low, high], as Number.text writes it."""
    text = number.text()
    return text[text.index("[") :]


def data_of(file: Path) -> str:
    """An SVG file as the address of an image, which runs no script that might be in it."""
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()


def policy_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _ordered(folder: Path) -> list[Path]:
    """In the order of ALT, quality before attacks."""
    places = {name: place for place, name in enumerate(ALT)}
    return sorted(folder.glob("*.svg"), key=lambda file: (places.get(file.stem, len(places)), file.stem))
