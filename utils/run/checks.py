"""What is looked at before work begins, a line each."""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal

from utils.run.errors import DONE, FAILED, InputError, WorkFailed

Verdict = Literal["ok", "warn", "no", "skip"]
Finding = tuple[Verdict, str]
NO = "correct what is marked 'no' above, then run this again"


@dataclass(frozen=True)
class Check:
    """One line: `no` means that the work would fail, `warn` that it may, `skip` that this cannot be looked at here."""

    name: str
    verdict: Verdict
    words: str
    seconds: float = 0.0


def examined(name: str, remedy: str, look: Callable[[], Finding]) -> Check:
    """Make one check and take its time. What it prints is dropped; an exception is a `no`; a `no` ends with the remedy."""
    began = time.monotonic()
    try:
        with redirect_stdout(io.StringIO()):
            verdict, words = look()
    except Exception as error:
        own = isinstance(error, (InputError, WorkFailed))
        verdict, words = "no", str(error) if own else f"{type(error).__name__}: {error}"
    if verdict == "no" and remedy:
        words = f"{words}; {remedy}"
    return Check(name, verdict, words, time.monotonic() - began)


def passed(found: Iterable[Check]) -> bool:
    """Print each check as soon as it is known, a `no` on standard error; whether there was no `no`."""
    good = True
    for check in found:
        good = good and check.verdict != "no"
        print(f"  {check.verdict:<5} {check.name}: {check.words}", file=sys.stderr if check.verdict == "no" else sys.stdout, flush=True)
    return good


def concluded(found: Iterable[Check], good: str) -> int:
    """Print each check as soon as it is known, a table, and what follows (`good` if there was no `no`); returns the exit code."""
    kept: list[Check] = []

    def noted() -> Iterable[Check]:
        for check in found:
            kept.append(check)
            yield check

    fine = passed(noted())
    print(f"\n{table(kept)}\n{good if fine else NO}")
    return DONE if fine else FAILED


def table(found: Sequence[Check]) -> str:
    """Name, verdict and seconds of every check, and their sums."""
    width = max(len(check.name) for check in found)
    lines = [f"{'check':<{width}}  found  seconds"]
    lines += [f"{check.name:<{width}}  {check.verdict:<5}  {check.seconds:7.1f}" for check in found]
    counts = Counter(check.verdict for check in found)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("ok", "warn", "no", "skip") if counts[verdict])
    return "\n".join([*lines, f"{len(found)} checks in {sum(check.seconds for check in found):.1f} s: {total}"])
