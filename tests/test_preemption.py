"""Signals and deadlines set a flag, the loop leaves with its state saved; progress lines; a real stage stopped and resumed."""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
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
from utils.run.preemption import PR_SET_PDEATHSIG, SIGNALS, Stop, die_with_parent
from utils.run.progress import Progress, Report, duration


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


@pytest.mark.parametrize(("hours", "margin"), [(24.0, 300.0), (0.5, 300.0), (0.1, 90.0), (0.0, 0.0), (-1.0, 0.0)])
def test_deadline_leaves_a_margin_to_save_in(hours: float, margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 s before the end, and in a short job a quarter of it."""
    begin, end = 1_000_000.0, 1_000_000.0 + 3600 * hours
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(end)))
    clock = [begin]
    for name in ("time", "monotonic"):
        monkeypatch.setattr(preemption.time, name, lambda: clock[0])
    stop = Stop()
    clock[0] = end - margin - 1
    assert not stop.requested()
    clock[0] = end - margin
    assert stop.requested()
    assert stop.reason == "the job's time limit is near"


@pytest.mark.parametrize("jump", [-86_400.0, -1.0, 0.0, 600.0])
def test_deadline_holds_when_the_clock_of_the_day_is_set(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back, the time that has passed counts; set right by going forward, the end is nearer than was thought."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1003600")
    passed, day = [0.0], [1_000_000.0]
    monkeypatch.setattr(preemption.time, "time", lambda: day[0] + passed[0])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: 50.0 + passed[0])
    stop = Stop()
    day[0] += jump
    passed[0] = 3299.0 - max(0.0, jump)
    assert not stop.requested()
    passed[0] += 1
    assert stop.requested()


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

    def time(self) -> float:
        return self.now + 1e9


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
    assert bar.bar.postfix == "loss 1.5"
    monkeypatch.setattr(Report, "deadline", 1e12)
    bar.advance(1, "loss 1.4")
    assert re.fullmatch(r"loss 1.4, \d+ h \d\d min left in the job: enough", bar.bar.postfix)
    bar.advance(1)
    assert bar.bar.postfix.endswith("left in the job: enough")
    bar.close()
    assert "train" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_report_is_written_now_and_then_and_is_exact_at_the_end(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "state/progress.json"
    with Report.into(path):
        bar = Progress("train", 10, done=4, tokens_per_unit=100)
        assert json.loads(path.read_text()).items() >= {"label": "train", "done": 4, "total": 10, "seconds_left": None}.items()
        clock.now += 4
        bar.advance(2, "loss 1.5")
        assert json.loads(path.read_text())["done"] == 4
        clock.now += 6
        bar.advance(1)
        facts = json.loads(path.read_text())
        assert (facts["done"], facts["note"]) == (7, "loss 1.5")
        assert (facts["tokens_per_second"], facts["seconds_left"]) == (30.0, 10.0)  # 3 units of 100 tokens in 10 s, 3 to go
        bar.advance(1)
    assert json.loads(path.read_text())["done"] == 8
    path.unlink()
    clock.now += 60
    bar.advance(1)
    Report.write()
    assert not path.exists()


@pytest.mark.parametrize(
    ("minutes", "words", "fits"),
    [(2.0, "1 min 40 s left in the job: enough", True), (0.9, "34.0 s left in the job: not enough, another start goes on", False)],
)
def test_progress_says_whether_the_work_fits_into_the_job(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: float, words: str, fits: bool
) -> None:
    """2 of 10 units in 20 s with 4 done before: 40 s are to come."""
    deadline = clock.time() + 60 * minutes
    with Report.into(tmp_path / "progress.json", deadline):
        bar = Progress("train", 10, done=4)
        clock.now += 20
        bar.advance(2, "loss 1.5")
        assert capsys.readouterr().out == f"  train: 6/10, 40.0 s left, {words}  loss 1.5\n"
        bar.advance(4)
        assert capsys.readouterr().out == "  train: 10/10, 20.0 s\n"
        bar.done = 6
        Report.update(bar._facts())
    facts = json.loads((tmp_path / "progress.json").read_text())
    assert (facts["deadline"], facts["fits"]) == (deadline, fits)
    clock.now += 20
    Progress("evaluate", 10).advance(1)  # behind the stage there is no job
    assert "job" not in capsys.readouterr().out


def test_before_the_first_unit_nobody_knows_whether_it_fits(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report.into(tmp_path / "progress.json", clock.time() + 100):
        bar = Progress("wait", 10)
        clock.now += 16
        bar.advance(0)
        assert capsys.readouterr().out == "  wait: 0/10, 16.0 s, 1 min 24 s left in the job\n"
        assert json.loads((tmp_path / "progress.json").read_text())["fits"] is None
        clock.now += 100
        bar.advance(0)
        assert capsys.readouterr().out == "  wait: 0/10, 1 min 56 s, 0.0 s left in the job\n"


def test_report_of_a_stage_that_fails_is_written_and_the_next_begins_empty(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(StoppedInTime), Report.into(tmp_path / "first.json"):
        Progress("train", 10).advance(3)
        raise StoppedInTime("now")
    assert json.loads((tmp_path / "first.json").read_text())["done"] == 3
    with Report.into(tmp_path / "second.json"):
        pass
    assert not (tmp_path / "second.json").exists()


def test_report_that_cannot_be_written_does_not_stop_the_work(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").write_text("a file")
    with Report.into(tmp_path / "state/progress.json"):
        Progress("train", 10).advance(10)
    assert capsys.readouterr().out == "  train: 10/10, 0.0 s\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (12.34, "12.3 s"), (60, "1 min 00 s"), (245, "4 min 05 s"), (3599.7, "1 h 00 min"), (25_320, "7 h 02 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_kernel_is_told_to_end_a_process_with_its_parent() -> None:
    """What it then does is tested in test_launch.py."""
    system, told = ctypes.CDLL(None), ctypes.c_int()
    die_with_parent()
    system.prctl(2, ctypes.byref(told))  # PR_GET_PDEATHSIG
    system.prctl(PR_SET_PDEATHSIG, 0)
    assert told.value == signal.SIGKILL
