"""Checks: made, timed, printed, counted."""

from __future__ import annotations

import pytest

from utils.run.checks import Check, Finding, examined, passed, table
from utils.run.errors import InputError, WorkFailed


def raising(error: Exception) -> Finding:
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("a.yaml: found 1, expected 2"), "a.yaml: found 1, expected 2; do this"),
        (WorkFailed("step 3: the loss is nan"), "step 3: the loss is nan; do this"),
        (RuntimeError("cannot reshape"), "RuntimeError: cannot reshape; do this"),
        (KeyError("gone"), "KeyError: 'gone'; do this"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device; do this"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_is_a_no_with_the_remedy(error: Exception, words: str) -> None:
    found = examined("disk", "do this", lambda: raising(error))
    assert (found.name, found.verdict, found.words) == ("disk", "no", words)


def test_only_a_no_gets_the_remedy_and_what_is_printed_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> Finding:
        print("train: 8/8")
        return "warn", "little memory"

    assert examined("GPU", "do this", look).words == "little memory"
    assert examined("GPU", "do this", lambda: ("no", "off by 2")).words == "off by 2; do this"
    assert examined("GPU", "", lambda: ("no", "off by 2")).words == "off by 2"
    assert capsys.readouterr().out == ""


def test_an_interrupt_is_no_finding() -> None:
    def look() -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examined("GPU", "do this", look)


def test_a_line_each_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Check("disk", "ok", "full of room", 0.25), Check("SLURM", "skip", "none"), Check("memory map", "no", "refused", 12.0)]
    assert passed(found[:2]) and not passed(found)
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == ["  ok    disk: full of room", "  skip  SLURM: none"]
    assert said.err == "  no    memory map: refused\n"
    assert table(found).splitlines() == [
        "check       found  seconds",
        "disk        ok         0.2",
        "SLURM       skip       0.0",
        "memory map  no        12.0",
        "3 checks in 12.2 s: 1 ok, 1 no, 1 skip",
    ]
