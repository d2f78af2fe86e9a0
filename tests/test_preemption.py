"""Signals and deadlines set a flag, the loop leaves with its state saved; progress lines; a real stage stopped and resumed."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages import stage_2_train_baseline
from stages.pipeline import main
from tests.fake_stages import SQUARES_OF_42, TINY, in_child
from utils.run import preemption, progress
from utils.run.artifacts import inventory
from utils.run.errors import DONE, STOPPED, StoppedInTime
from utils.run.preemption import SIGNALS, Stop
from utils.run.progress import Progress, duration


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signal handlers as they were, and no job's end time."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_sets_the_flag_and_does_no_more(number: signal.Signals) -> None:
    stop = Stop()
    stop.listen()
    assert not stop.requested()
    stop.check()
    os.kill(os.getpid(), number)
    assert stop.requested()
    with pytest.raises(StoppedInTime, match=f"signal {number.name}"):
        stop.check()


def test_second_interrupt_ends_at_once() -> None:
    stop = Stop()
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("now", "asked"), [(879.0, False), (880.0, True), (5000.0, True)])
def test_deadline_is_the_jobs_end_less_the_margin(now: float, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    monkeypatch.setattr(preemption.time, "time", lambda: now)
    stop = Stop(margin=120.0)
    assert stop.requested() is asked
    assert stop.reason == ("the job's time limit is near" if asked else None)


@pytest.mark.parametrize("end", ["", "Unknown", "-5"])
def test_job_without_an_end_has_no_deadline(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    assert Stop().deadline is None
    assert not Stop().requested()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_process_that_gets_a_signal_exits_75_and_is_gone_on_with(name: str, own_folders: Path) -> None:
    code = f"""
import os, signal, sys
from dataclasses import replace
from tests.fake_stages import NUMBERS, SQUARES, run, write_squares
from utils.run.preemption import Stop
from utils.run.records import Records

append = Records.append
def append_and_signal(self, rows):
    append(self, rows)
    os.kill(os.getpid(), signal.{name})

Records.append = append_and_signal
stop = Stop()
stop.listen()
run(NUMBERS)
sys.exit(run(SQUARES, stop=stop))
"""
    child = in_child(code)
    assert child.returncode == STOPPED, child.stderr
    assert f"stopped in time (signal {name})" in child.stdout
    child = in_child("import sys; from tests.fake_stages import SQUARES, run; sys.exit(run(SQUARES))")
    assert child.returncode == DONE, child.stderr
    (written,) = own_folders.rglob("squares.json")
    assert written.read_text().count("square") == len(SQUARES_OF_42)


@pytest.mark.integration
def test_real_training_stopped_by_a_signal_ends_bit_for_bit_as_a_straight_one(
    finished: Path,
    finished_copy: Path,
    stage_folder: Callable[[Path, int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from utils.training.loop import MetricsLog

    folder = stage_folder(finished_copy, 2)
    shutil.rmtree(folder)
    add = MetricsLog.add

    def add_and_signal(self: MetricsLog, step: int, *rest: object) -> None:
        add(self, step, *rest)  # type: ignore[arg-type]
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", add_and_signal)
        with pytest.raises(SystemExit) as left:
            main(stage_2_train_baseline.STAGE, ["--config", TINY])
    assert left.value.code == STOPPED
    assert "stopped in time (signal SIGUSR1, step 6 of 12)" in capsys.readouterr().out
    assert not (folder / "manifest.json").exists()
    with pytest.raises(SystemExit) as left:
        main(stage_2_train_baseline.STAGE, ["--config", TINY])
    assert left.value.code == DONE
    straight = stage_folder(finished, 2)
    for name in ("best", "last", "metrics.jsonl"):
        assert inventory(folder / name) == inventory(straight / name)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(progress, "time", hand)
    return hand


def test_progress_speaks_now_and_then_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("train", 10, done=4, every_seconds=15.0)
    bar.advance()
    assert capsys.readouterr().out == ""
    clock.now += 20
    bar.advance(1, "loss 1.5")
    assert capsys.readouterr().out == "  train: 6/10, 40.0 s left  loss 1.5\n"  # 2 units in 20 s, 4 to go
    clock.now += 10
    bar.advance(3)
    assert capsys.readouterr().out == ""
    bar.advance(1)
    assert capsys.readouterr().out == "  train: 10/10, 30.0 s\n"
    bar.close()


def test_progress_without_gain_does_not_divide_by_zero(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("wait", 10)
    clock.now += 16
    bar.advance(0)
    assert capsys.readouterr().out == "  wait: 0/10, 16.0 s\n"


def test_progress_that_ends_early_says_so(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("search", 10)
    bar.advance(7)
    clock.now += 2
    bar.close()
    assert capsys.readouterr().out == "  search: done after 7 of at most 10, 2.0 s\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = Progress("train", 10, done=4)
    assert bar.bar is not None
    bar.advance(2, "loss 1.5")
    assert (bar.bar.n, bar.bar.total) == (6, 10)
    bar.close()
    assert "train" in terminal.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (60, "1 min 00 s"), (245, "4 min 05 s"), (3599.7, "1 h 00 min"), (25_320, "7 h 02 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
