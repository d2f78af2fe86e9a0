"""Is the base model right? Its results beside what others published of it (published_values.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

VALUES = Path(__file__).with_name("published_values.yaml")


def compared(model_name: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each published value of this model that the results have: theirs, ours, and whether ours lies within the range.

    Benchmarks on a part of their items are left out. Prints a line each; a model of which nothing is known gives none.
    """
    limited = bool(results.get("benchmarks", {}).get("limit"))
    found = []
    for known in yaml.safe_load(VALUES.read_text(encoding="utf-8")).get(model_name, ()):
        try:
            ours = reduce(getitem, known["at"], results)
        except KeyError:
            continue
        if not (limited and known["at"][0] == "benchmarks"):
            found.append({**known, "found": ours, "within": known["low"] <= ours <= known["high"]})
    for entry in found:
        verdict = "as published" if entry["within"] else "OUTSIDE what is published"
        print(f"  base, {entry['quantity']}: {entry['found']:.4g}, {verdict} ({entry['low']:g} to {entry['high']:g})", flush=True)
    return found
