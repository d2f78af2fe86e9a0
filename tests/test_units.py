"""Units of work: each is done once, whoever does it; what is done, is passed over; what a killed process held, others take."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Set
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from utils.run import units
from utils.run.artifacts import write_json
from utils.run.errors import StoppedInTime
from utils.run.lock import claimed, locked
from utils.run.preemption import Stop
from utils.run.units import Place, Share, Step, Unit, done_in, rows_in

pytestmark = pytest.mark.usefixtures("no_sync")
STEPS = 3


class Work:
    """Twelve units on three models and then one that sums up; every start of a unit and every step leaves a line in `log`."""

    def __init__(self, folder: Path, act: Callable[[str, int], None] = lambda name, number: None) -> None:
        self.folder, self.log, self.act = folder / "units", folder / "log", act

    def unit(self, name: str, label: str, model: str) -> Unit:
        def work(begun: Path, step: Step) -> list[dict[str, Any]]:
            made = units.read_json(begun)["steps"] if begun.exists() else 0
            for number in range(made, STEPS):
                self.note(f"{name} {number}")
                self.act(name, number)
                write_json(begun, {"steps": number + 1})
                step()
            return [{"unit": name, "row": row} for row in range(2)]

        return Unit(name, label, model, STEPS, work)

    def ready(self, done: Set[str]) -> list[Unit]:
        first = [self.unit(f"{model}.{number}", "searches", model) for model in "abc" for number in range(4)]
        return [*first, *([self.unit("sum", "reports", "a")] if done >= {unit.name for unit in first} else [])]

    def share(self, stop: Stop | None = None, place: Place | None = None, speaks: bool = True) -> Share:
        return Share(self.ready, self.folder, stop or Stop(), place, speaks)

    def note(self, line: str) -> None:
        with self.log.open("a") as handle:
            handle.write(f"{line}\n")

    def noted(self) -> list[str]:
        return self.log.read_text().splitlines()

    def rows(self) -> list[dict[str, Any]]:
        return rows_in(self.folder, self.ready(done_in(self.folder)))


def forked(act: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return child


def ends(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_unit_is_done_once_and_rows_are_in_order(tmp_path: Path, count: int) -> None:
    work = Work(tmp_path, lambda name, number: time.sleep(0.002))
    children = [forked(work.share(place=Place(number, count), speaks=number == 0).run) for number in range(count)]
    assert [ends(child) for child in children] == [0] * count
    names = [unit.name for unit in work.ready(done_in(work.folder))]
    assert names[-1] == "sum"
    assert sorted(work.noted()) == sorted(f"{name} {number}" for name in names for number in range(STEPS))
    assert work.rows() == [{"unit": name, "row": row} for name in names for row in range(2)]
    assert not list(work.folder.glob("*.json"))


def test_a_killed_process_loses_its_claim_and_no_step(tmp_path: Path) -> None:
    def die(name: str, number: int) -> None:
        if (name, number) == ("b.1", 1):
            os.kill(os.getpid(), signal.SIGKILL)

    assert ends(forked(Work(tmp_path, die).share().run)) == -signal.SIGKILL
    work = Work(tmp_path)
    assert done_in(work.folder) == {"a.0", "a.1", "a.2", "a.3", "b.0"}
    work.share().run()
    assert work.noted().count("b.1 0") == 1 and work.noted().count("b.1 1") == 2
    assert work.noted().count("a.3 0") == 1
    assert len(work.rows()) == 26


def test_each_begins_at_its_own_place_and_stays_with_a_model(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.share(place=Place(2, 3)).run()
    begun = [line.split()[0] for line in work.noted() if line.endswith(" 0")]
    assert begun[:4] == ["c.0", "c.1", "c.2", "c.3"]
    assert begun[4:] == [*(f"a.{number}" for number in range(4)), *(f"b.{number}" for number in range(4)), "sum"]
    half = Work(tmp_path / "half")
    half.log.parent.mkdir()
    half.share(place=Place(1, 2)).run()
    begun = [line.split()[0] for line in half.noted() if line.endswith(" 0")]
    assert begun[:4] == ["b.2", "b.3", "b.0", "b.1"]


def test_one_that_waits_stays_until_the_others_are_done_and_one_that_does_not_leaves(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.share().run()
    (work.folder / "b.2.done").unlink()
    (work.folder / "sum.done").unlink()
    with claimed(work.folder / "b.2.lock") as mine:
        assert mine
        work.share(place=Place(0, 2, waits=False)).run()
        assert "b.2" not in done_in(work.folder)
        waiting = Thread(target=work.share(place=Place(0, 2), speaks=False).run)  # a forked process would hold the claim too
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()
    assert {"b.2", "sum"} <= done_in(work.folder)


def test_a_damaged_unit_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work(tmp_path)
    work.share().run()
    rows, done = work.rows(), work.folder / "a.1.done"
    done.write_text(done.read_text().replace("1", "2", 1))
    work.share().run()
    assert "a.1.done" in capsys.readouterr().out and work.rows() == rows
    assert sum(line.startswith("a.1 0") for line in work.noted()) == 2


def test_asked_to_stop_while_it_waits(tmp_path: Path) -> None:
    work, stop = Work(tmp_path), Stop()
    work.share().run()
    (work.folder / "b.2.done").unlink()
    stop.reason = "signal SIGUSR1"
    with claimed(work.folder / "b.2.lock"), pytest.raises(StoppedInTime, match="SIGUSR1"):
        work.share(stop).run()


def test_a_unit_that_another_process_has_just_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path)
    work.share().run()
    lines = len(work.noted())
    share = work.share()
    share._do(work.unit("a.0", "searches", "a"))
    assert len(work.noted()) == lines


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of all processes, those of earlier starts too; the time left is reckoned from what this start has gained."""
    monkeypatch.setattr(units, "TELL_SECONDS", 0.0)
    stop = Stop()

    def ask(name: str, number: int) -> None:
        stop.reason = "signal SIGUSR1" if (name, number) == ("b.1", 1) else None

    with pytest.raises(StoppedInTime):
        Work(tmp_path, ask).share(stop).run()
    capsys.readouterr()
    share = Work(tmp_path).share()
    share._left()
    share._tell(share.units[5])
    assert share.progress is not None
    assert (share.progress.done, share.progress.start_at, share.progress.total) == (5 * STEPS + 2, 5 * STEPS + 2, 12 * STEPS)
    share.run()
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  searches: 36/36, \d+\.\d s  c\.3", said[0])
    assert re.fullmatch(r"  reports: 3/3, \d+\.\d s  sum", said[1])
    assert len(said) == 2
    silent = Work(tmp_path / "silent")
    silent.log.parent.mkdir()
    silent.share(speaks=False).run()
    assert capsys.readouterr().out == ""


def test_a_shared_lock_is_held_by_several_and_keeps_out_one_alone(tmp_path: Path) -> None:
    refused = pytest.raises(units.InputError, match=f"process {os.getpid()} on .* is at work here")
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True), refused, locked(tmp_path):
        pass
    with locked(tmp_path), pytest.raises(units.InputError, match="is at work here"), locked(tmp_path, shared=True):
        pass
