"""A full, limited, read-only or occupied disk: exit code 1, one message that names the place, nothing lost."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from configs.presets import load
from tests.fake_stages import NUMBERS, PIPELINE, SQUARES, SQUARES_OF_42, TINY, contents, folder_of, in_child, run
from utils.run.errors import DONE, FAILED, REFUSED
from utils.run.preemption import Stop
from utils.run.stage import Context, run_stage


def filling(ctx: Context) -> None:
    (ctx.folder / "first.bin").write_bytes(bytes(1000))
    write_blocks = Path(ctx.folder / "fill.bin").open("wb")  # noqa: SIM115
    with write_blocks:
        for _ in range(100):
            write_blocks.write(bytes(4096))


def test_full_disk_is_exit_1_with_one_message_and_goes_on_after_room_is_made(
    small_disk: Path, own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = f"paths.work={small_disk}"
    assert run(NUMBERS, here) == DONE
    folder = small_disk / "tiny/seed_42/stage_1_squares"
    sound = contents(small_disk)
    assert run(replace(SQUARES, run=filling), here) == FAILED
    message = capsys.readouterr().err
    assert f"cannot write or read {folder}: No space left on device" in message
    assert "make room" in message
    assert "paths.work" in message
    assert run(SQUARES, here) == FAILED  # the disk is still full
    assert str(folder) in capsys.readouterr().err
    (folder / "fill.bin").unlink()
    assert run(SQUARES, here) == DONE
    assert sound.items() <= contents(small_disk).items()


def test_full_disk_in_a_published_file_names_that_file_and_keeps_the_old_one(
    small_disk: Path, own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = small_disk / "summary.txt"
    target.write_text("old")

    def overflow(ctx: Context) -> None:
        from utils.run.artifacts import write_text

        write_text(target, "x" * 100_000)

    assert run(replace(NUMBERS, run=overflow)) == FAILED
    assert f"cannot write or read {target}: No space left" in capsys.readouterr().err
    assert contents(small_disk) == {"summary.txt": b"old"}


def test_read_only_disk_is_exit_1(small_disk: Path, own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert run(NUMBERS, f"paths.work={small_disk}") == FAILED
    message = capsys.readouterr().err
    assert f"cannot write or read {small_disk}/tiny" in message
    assert "Read-only file system" in message


def test_limit_on_file_size_is_exit_1(own_folders: Path) -> None:
    """A quota that strikes in the middle of a file."""
    code = """
import resource, signal, sys
from tests.fake_stages import NUMBERS, SQUARES, run
run(NUMBERS)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(run(SQUARES))
"""
    child = in_child(code)
    assert child.returncode == FAILED
    assert "File too large. What is complete is kept" in child.stderr
    assert "Traceback" not in child.stderr
    assert run(SQUARES) == DONE
    assert json.loads((folder_of(SQUARES, own_folders) / "squares.json").read_text()) == SQUARES_OF_42


def test_file_where_a_folder_is_expected_is_exit_1(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_folders / "scratch").write_text("a file")
    assert run(NUMBERS) == FAILED
    assert f"{own_folders}/scratch" in capsys.readouterr().err


def test_folder_where_a_file_is_expected_is_exit_1(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder_of(NUMBERS, own_folders) / "manifest.json").mkdir(parents=True)
    assert run(NUMBERS) == REFUSED
    assert "manifest.json" in capsys.readouterr().err
    (folder_of(SQUARES, own_folders)).mkdir(parents=True)
    (folder_of(SQUARES, own_folders) / ".lock").mkdir()
    assert run(SQUARES) == FAILED
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no folder can be made")
def test_place_that_takes_no_folders_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(TINY, ["paths.work=/proc/nowhere"])
    assert run_stage(NUMBERS, config, 42, PIPELINE, Stop()) == FAILED
    message = capsys.readouterr().err
    assert "cannot write or read /proc/nowhere" in message and "choose other folders (paths.work" in message
