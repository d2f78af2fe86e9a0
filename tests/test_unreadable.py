"""What cannot be read now may be as good as ever: nothing is given up for it. What is damaged elsewhere must not stop what is intact."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.fake_stages import NUMBERS, SQUARES, TOTAL, folder_of, run
from tests.test_checkpoint import names, saved
from utils.attacks.matched import _made_before
from utils.run import launch, lock, trouble
from utils.run.artifacts import inventory, write_sealed
from utils.run.cache import cached
from utils.run.errors import DONE, FAILED, REFUSED
from utils.run.preemption import Stop
from utils.run.status import newest_checkpoint
from utils.run.units import Share, Unit
from utils.slurm import job
from utils.slurm.chain import _position

Out = pytest.CaptureFixture[str]


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the disk fail for all files of a name."""
    real = Path.read_text

    def fail(name: str, number: int = errno.EIO) -> None:
        def read(path: Path, *arguments: str, **named: str) -> str:
            if path.name == name:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **named)

        monkeypatch.setattr(Path, "read_text", read)

    return fail


def test_a_cache_is_not_built_again(tmp_path: Path, out_of_reach: Callable[..., None]) -> None:
    def build(target: Path, state: Path) -> None:
        (target / "part").write_text("content")

    content = cached(tmp_path, "kind", {}, build, Stop())
    out_of_reach("manifest.json")
    with pytest.raises(OSError, match="Input/output error"):
        cached(tmp_path, "kind", {}, lambda target, state: pytest.fail("built again"), Stop())
    assert content.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN])
def test_a_stage_is_not_moved_aside(number: int, own_folders: Path, out_of_reach: Callable[..., None], capsys: Out) -> None:
    """A lost file system of the network among them, which Python takes for a broken pipe."""
    assert run(NUMBERS) == DONE
    out_of_reach("manifest.json", number)
    assert run(NUMBERS, discard=True) == FAILED
    said = capsys.readouterr().err
    assert f"manifest.json: {os.strerror(number)}. What is complete is kept" in said and "--discard" not in said
    assert [path.name for path in folder_of(NUMBERS, own_folders).parent.iterdir()] == ["stage_0_numbers"]


def test_a_summary_whose_notes_are_damaged_can_be_discarded(own_folders: Path) -> None:
    assert [run(stage) for stage in (NUMBERS, SQUARES, TOTAL)] == [DONE] * 3
    (folder_of(TOTAL, own_folders) / "started.json").write_text("{")
    assert run(TOTAL) == REFUSED
    assert run(TOTAL, discard=True) == DONE


def test_a_damaged_older_checkpoint_does_not_end_a_save(tmp_path: Path) -> None:
    saved(tmp_path, {1: 1, 2: 1, 3: 3}, keep_last=3)
    (tmp_path / "step_00000002" / "state.json").write_text("{")
    saved(tmp_path, {4: 3}, keep_last=3)
    assert "step_00000004" in names(tmp_path)


def test_an_older_checkpoint_out_of_reach_is_not_taken_for_damaged(tmp_path: Path, out_of_reach: Callable[..., None]) -> None:
    there = saved(tmp_path, {1: 1, 2: 1}, keep_last=3)
    out_of_reach("state.json")
    with pytest.raises(OSError, match="Input/output error"):
        there._prune()
    assert len(names(tmp_path)) == 2


def test_what_is_only_shown_or_compared_may_be_out_of_reach(
    tmp_path: Path, out_of_reach: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far a job was, a unit was, and which checkpoint is the newest: no job ends for it."""
    saved(tmp_path, {1: 1})
    out_of_reach("manifest.json")
    assert newest_checkpoint(tmp_path) == ""
    out_of_reach("progress.json")
    assert _position(tmp_path / "progress.json") is None
    monkeypatch.setattr(job, "_stopped", lambda *given: tmp_path / "progress.json")
    chain = SimpleNamespace(position=lambda stage, seeds: ["train", 7])
    assert job.gained(chain, NUMBERS, [42])  # type: ignore[arg-type]
    out_of_reach("one.json")
    (tmp_path / "one.json").touch()
    begun = Unit("one", "work", "", 3, lambda begun, step: [])
    share = Share(lambda done: [begun], tmp_path, Stop())
    share.units = [begun]
    assert share._made("work") == (0, 3)


def test_damaged_controls_of_equal_quality_are_not_taken(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "noise").mkdir()
    weights = tmp_path / "noise" / "weights"
    weights.write_text("right")
    write_sealed(tmp_path / "matched.json", {"facts": {"noise": {}}, "files": {"noise": inventory(tmp_path / "noise")}})
    assert _made_before(tmp_path / "matched.json") == {"noise": {}}
    weights.write_text("wrong")
    assert _made_before(tmp_path / "matched.json") is None
    assert "the controls are made again" in capsys.readouterr().out


def test_a_process_of_several_says_what_its_machine_failed_at(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")

    def wrong() -> None:
        raise ZeroDivisionError

    assert launch.of_several(full) == FAILED
    assert "cannot write or read weights: No space left" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        launch.of_several(wrong)


def test_a_disk_without_inodes_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs(tmp_path)

    class NoInodes:
        f_files, f_favail = max(full.f_files, 1), 0

    monkeypatch.setattr(trouble.os, "statvfs", lambda folder: NoInodes)
    assert "no inodes" in str(trouble.explained(OSError(errno.ENOSPC, "No space left"), tmp_path))


def test_a_lock_whose_folder_is_gone_is_not_the_one_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    assert lock._same(handle, path)
    path.unlink()
    assert not lock._same(handle, path)
    os.close(handle)
