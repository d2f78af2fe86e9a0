"""Every campaign: python -m tests.faults [--only NAME] [--amount N] [--seed S] [--out FILE]. Exit 1 if anything fell over."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.outcome import Outcome
from utils.run.artifacts import write_json

CAMPAIGNS = ("crash", "corruption", "concurrency", "resources", "inputs", "security", "week")
LINE = "{:<12} {:>7} {:>9} {:>11} {:>8}"


def carried_out(name: str, amount: int | None, seed: int) -> list[Outcome]:
    """One campaign: its module has `AMOUNT`, the faults of a whole one, and `campaign(folder, amount, seed)`, which yields outcomes."""
    module = importlib.import_module(f"tests.faults.{name}")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in module.campaign(Path(folder), amount or module.AMOUNT, seed):
            found.append(outcome)
            if not outcome.survived:
                print(f"  fell over: {name}: {outcome.fault}: {outcome.found}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", choices=CAMPAIGNS, help="campaigns, default all")
    parser.add_argument("--amount", type=int, help="faults of each campaign, default the whole one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="every outcome, as JSON")
    options = parser.parse_args(arguments)
    print(LINE.format("campaign", "faults", "survived", "lost steps", "seconds"), flush=True)
    outcomes: dict[str, list[Outcome]] = {}
    for name in options.only or CAMPAIGNS:
        began = time.monotonic()
        found = outcomes[name] = carried_out(name, options.amount, options.seed)
        survived, lost = sum(outcome.survived for outcome in found), sum(outcome.lost_steps for outcome in found)
        print(LINE.format(name, len(found), survived, lost, round(time.monotonic() - began)), flush=True)
    if options.out:
        write_json(options.out, {name: [dataclasses.asdict(outcome) for outcome in found] for name, found in outcomes.items()})
    return 0 if all(outcome.survived for found in outcomes.values() for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
