"""The campaign of machines that run short, in small; planted faults that it must notice; what is said of each trouble."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fake_stages import NUMBERS, PIPELINE, folder_of, run
from tests.faults import resources
from tests.faults.resources import FAULTS, Machine, Straight, Trial
from utils.models import loading
from utils.run.errors import FAILED, InputError
from utils.run.stage import Context
from utils.run.trouble import explained

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the faulty machine is a library in C, and there is no compiler")
SEED = 0


def test_campaign_survives_every_fault(tmp_path: Path) -> None:
    found = list(resources.campaign(tmp_path, len(FAULTS), SEED, "fake"))
    assert [each.found for each in found if not each.survived] == []
    assert {each.fault.split(",")[0] for each in found} == {fault.__name__.replace("_", " ") for fault in FAULTS}


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Callable[[str], Trial]]:
    """A trial of the first of the short stages with a planted fault of the program."""
    machine = Machine(tmp_path, "fake")
    straight = Straight.made(machine, tmp_path / "straight", len(PIPELINE))

    def of(planted: str) -> Trial:
        root = tmp_path / planted.replace(" ", "-")
        straight.before(0, root)
        return Trial(machine, straight, 0, root, random.Random(0), planted)

    yield of
    machine.close()


def test_campaign_notices_planted_faults(trial: Callable[[str], Trial]) -> None:
    assert "ended with 70" in str(resources.quota_exceeded(trial("no words")))
    torn = trial("in place")
    assert any("expected a JSON file, found something else" in str(_filled(torn, at)) for at in range(1, torn.needed["operations"] + 1))
    sound = trial("nothing")
    assert sound.run() == 0
    assert "expected one reason, 'a reason', found 0" in str(sound.judged(1, "a reason", through=True))


def _filled(trial: Trial, at: int) -> str | None:
    """What falls over when the disk is full from this operation on."""
    shutil.rmtree(trial.root)
    return trial.judged(trial.run(disk_at=at, error=errno.ENOSPC), os.strerror(errno.ENOSPC), through=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "cannot write or read /a/b: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "cannot write or read /home: Disk quota exceeded"),
        (MemoryError(), "the machine ran out of memory (MemoryError)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine ran out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "the machine ran out of memory ([enf",
        ),
        (ImportError("iup.so: failed to map segment from shared object"), "the machine ran out of memory (iup.so"),
        (ImportError("iup.so: failed to map segment from shared object: Operation not permitted"), None),
        (RuntimeError("can't start new thread"), "the machine ran out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the device ran out of memory (CUDA out of memory."),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with"),
            "the device failed (CUDA error: unspecified launch failure)",
        ),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED"), "the device failed"),
        (RuntimeError("NCCL error: remote process exited"), "the device failed"),
        (RuntimeError("shapes do not fit"), None),
        (OSError(errno.ENOENT, "No such file or directory"), None),
    ],
)
def test_what_is_said(error: Exception, words: str | None) -> None:
    said = explained(error, Path("/home"))
    assert (said is None) == (words is None)
    assert said is None or (said.startswith(str(words)) and "run again" in said)


def hidden(first: Exception, then: Exception, apart: bool = False) -> Exception:
    """`then`, as it is met when it came up in cleaning up after `first`; `apart`: raised `from None`."""
    try:
        try:
            raise first
        except Exception:
            if apart:
                raise then from None
            raise then  # noqa: B904 - as a library does
    except Exception as met:
        return met


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hidden(FULL, AttributeError("'Stream' object has no attribute 'pos'")), "No space left"),
        (hidden(hidden(FULL, ValueError()), AttributeError()), "No space left"),
        (hidden(FULL, OSError(errno.EACCES, "Permission denied")), "No space left"),
        (hidden(MemoryError(), AttributeError()), "ran out of memory"),
        (hidden(RuntimeError("DefaultCPUAllocator: can't allocate memory"), AttributeError()), "ran out of memory"),
        (hidden(OSError(errno.EEXIST, "File exists"), AttributeError()), None),
        (hidden(MemoryError(), ValueError("a fault of the program"), apart=True), None),
    ],
)
def test_want_of_room_is_found_behind_the_error_of_a_library_that_cleans_up(error: Exception, words: str | None) -> None:
    said = explained(error, None)
    assert (said is None) == (words is None)
    assert words is None or words in str(said)


def test_want_of_room_that_an_error_names_as_its_cause_is_found() -> None:
    error = RuntimeError("writer failed")
    error.__cause__ = FULL
    assert "No space left" in str(explained(error, None))


def test_error_of_the_program_itself_is_shown_as_it_is(own_folders: Path) -> None:
    def broken(ctx: Context) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(replace(NUMBERS, run=broken))


def test_device_that_is_lost_is_exit_1_with_one_message(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lost(ctx: Context) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    assert run(replace(NUMBERS, run=lost)) == FAILED
    assert "[stage 0 numbers, seed 42] the device failed (CUDA error: an illegal memory" in capsys.readouterr().err
    assert folder_of(NUMBERS, own_folders).is_dir()


def test_want_of_memory_is_not_taken_for_a_damaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the reader would be told that a good folder is none."""
    said = ["can't start new thread", "no such weights"]

    def read(*given: object, **named: object) -> None:
        raise RuntimeError(said.pop(0))

    monkeypatch.setattr(loading, "_read", read)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        loading.load_model(tmp_path)
    with pytest.raises(InputError, match="no such weights"):
        loading.load_model(tmp_path)


def test_a_place_that_cannot_be_looked_at_is_told_too(tmp_path: Path) -> None:
    with pytest.raises(OSError) as met:
        (tmp_path / ("a" * 300)).write_text("")
    assert "cannot write or read" in str(explained(met.value, tmp_path))
