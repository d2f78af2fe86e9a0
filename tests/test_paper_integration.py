"""docs/PAPER_INTEGRATION.md names files and fields; a finished run has them."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest

from tests.fake_stages import ROOT
from utils.report.attack_figures import ALT
from utils.run.artifacts import read_json

pytestmark = pytest.mark.integration
TEXT = (ROOT / "docs" / "PAPER_INTEGRATION.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`((?:[\w]+/)?[\w]+\.(?:json|jsonl|csv|tex|txt|html|pdf))`", TEXT)
WHERE_DONE = {"tables/benchmarks.tex", "tables/flip_transfer.tex"}  # only in runs that have such records


def place(root: Path, name: str) -> Path:
    final = root / "project" / "foundation_llm_final_results" / "tiny"
    work = root / "scratch" / "foundation_llm_work" / "tiny" / "seed_42"
    return (work if name.startswith("stage_") else final) / name


def test_every_file_is_there(finished: Path, full_report: Path) -> None:
    assert len(NAMED) > 40
    assert [name for name in NAMED if name not in WHERE_DONE and not place(finished, name).is_file()] == []
    assert [name for name in WHERE_DONE if not (full_report / name).is_file()] == []


def test_every_field_is_there(finished: Path) -> None:
    """The fields named behind a file, up to the next file or the end of the line."""
    looked_up = 0
    for line in TEXT.splitlines():
        for name, fields in re.findall(r"`([\w/]+\.json)`((?:,? `[\w.]+`)*)", line):
            for field in re.findall(r"`([\w.]+)`", fields):
                reduce(lambda value, key: value[key], field.split("."), read_json(place(finished, name)))
                looked_up += 1
    assert looked_up > 20


def test_no_table_or_figure_is_left_out(finished: Path, full_report: Path) -> None:
    for folder, kind in (("tables", "tex"), ("figures", "pdf")):
        made = {f"{folder}/{path.name}" for root in (place(finished, ""), full_report) for path in (root / folder).glob(f"*.{kind}")}
        assert made - set(NAMED) - {"figures/flip_transfer.pdf"} == set()
    assert {path.stem for path in (full_report / "figures").glob("*.pdf")} == set(ALT)
