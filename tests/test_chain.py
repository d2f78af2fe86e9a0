"""The finished tiny run as its users find it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def test_all_outputs_are_there(finished: Path) -> None:
    results = finished / "project" / "foundation_llm_final_results"
    assert (results / "experiment_summary.txt").read_text() == (results / "tiny" / "experiment_summary.txt").read_text()
    assert json.loads((results / "tiny" / "final_results.json").read_text())["experiment_info"]["seeds"] == [42]
