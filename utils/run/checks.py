"""What is looked at before work begins, a line each."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One line: `no` means that the work would fail, `warn` that it may, `skip` that this cannot be looked at here."""

    name: str
    verdict: Literal["ok", "warn", "no", "skip"]
    words: str


def passed(found: Iterable[Check]) -> bool:
    """Print each check as soon as it is known, a `no` on standard error; whether there was no `no`."""
    good = True
    for check in found:
        good = good and check.verdict != "no"
        print(f"  {check.verdict:<5} {check.name}: {check.words}", file=sys.stderr if check.verdict == "no" else sys.stdout, flush=True)
    return good
