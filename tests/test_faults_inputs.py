"""The campaign of hostile inputs, small; and whether it notices a reader that falls over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.bombs import ALIASES
from tests.faults.confined import judged, one
from tests.faults.inputs import fuzzed, typed
from tests.faults.mutation import Corpus
from tests.faults.readers import Reader, readers
from utils.run.errors import InputError

SEED = 3


def test_every_reader_reads_or_refuses(own_folders: Path, no_sync: None) -> None:
    there = readers(own_folders)
    assert len(there) == 26
    for reader in there:
        outcomes = list(fuzzed(reader, 3, SEED))
        assert len(outcomes) == 3
        assert not [outcome for outcome in outcomes if not outcome.survived]


def test_valid_inputs_are_read(own_folders: Path, no_sync: None) -> None:
    """Else the refusals of changed ones would say nothing."""
    for reader in readers(own_folders):
        assert [verdict.refused + verdict.fault for verdict in judged(reader.look, reader.valid)] == [""] * len(reader.valid), reader.name


def stumbling(given: bytes) -> None:
    if given != b'{"a": 1}':
        raise KeyError("a")


def vague(given: bytes) -> None:
    raise InputError("something is wrong")


@pytest.mark.parametrize(("look", "words"), [(stumbling, "KeyError at test_faults"), (vague, "a refusal that does not name a.json")])
def test_a_planted_fault_is_noticed(look: Callable[[bytes], None], words: str) -> None:
    outcomes = list(fuzzed(Reader("planted", "json", [b'{"a": 1}'], look, "a.json"), 20, SEED))
    assert len(outcomes) == 20
    assert any(words in outcome.found for outcome in outcomes if not outcome.survived)


def test_what_hangs_grows_or_dies_is_noticed_and_the_rest_is_still_judged() -> None:
    deeds: dict[bytes, Callable[[], object]] = {
        b"hang": lambda: time.sleep(60),
        b"grow": lambda: bytearray(1 << 30),
        b"die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        b"fine": lambda: None,
    }
    found = [verdict.fault for verdict in judged(lambda given: deeds[given](), list(deeds), megabytes=200, seconds=0.5)]
    assert found[0] == "no answer in 0.5 s"
    assert "MemoryError" in found[1]
    assert found[2:] == ["killed by signal 9", ""]


def test_an_input_that_led_somewhere_new_is_changed_further() -> None:
    corpus = Corpus("json", [b"{}"])
    corpus.learn(b"[1]", frozenset({"a.py:1"}))
    corpus.learn(b"[2]", frozenset({"a.py:1"}))
    assert corpus.inputs == [b"{}", b"[1]"]
    assert corpus.drawn(10, SEED) == corpus.drawn(10, SEED) != corpus.drawn(10, SEED + 1)


def test_the_lines_that_ran_are_told(own_folders: Path) -> None:
    preset = readers(own_folders)[0]
    verdict = next(judged(preset.look, [b"extends: nosuch\n"]))
    assert "found no file" in verdict.refused
    assert any("configs/presets.py" in line for line in verdict.lines)


def test_ten_lines_that_stand_for_gigabytes(own_folders: Path) -> None:
    preset = readers(own_folders)[0]
    assert "found the alias *a; write the value out plainly" in one(lambda: preset.look(ALIASES.encode())).refused


@pytest.mark.integration
def test_typed_inputs_get_an_exit_code_and_words(own_folders: Path) -> None:
    assert [outcome.survived for outcome in typed(own_folders, 2, SEED)] == [True, True]
