"""The campaign of several processes at once, in small; planted faults that it must notice; the lock on a file system of many machines."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_stages import NUMBERS, SQUARES, TOTAL, folder_of, run, write_total
from tests.faults import concurrency
from tests.faults.concurrency import Room, tried
from tests.faults.outcome import Outcome
from tests.faults.week import lost_steps
from utils.run import lock
from utils.run.artifacts import read_sealed, write_sealed
from utils.run.errors import DONE, FAILED, InputError
from utils.run.lock import locked
from utils.run.mark import Mark
from utils.run.preemption import Stop
from utils.run.stage import Context, set_aside


def test_campaign_survives_and_notices_a_lock_that_does_not_hold(tmp_path: Path) -> None:
    def outcome(trial: Callable[[Room], concurrency.Found], planted: str) -> Outcome:
        room = tmp_path / f"{trial.__name__}-{planted}".replace(" ", "-")
        room.mkdir()
        return tried(trial, Room(room, random.Random(1), planted))

    second, machines = concurrency.second_job_of_a_stage, concurrency.machines_at_the_same_moment
    with ThreadPoolExecutor(3) as pool:
        sound, broken, apart = pool.map(outcome, (second, second, machines), ("nothing", "no lock", "nothing"))
    assert sound.survived, sound.found
    assert not broken.survived and "the second ended with" in broken.found
    assert apart.survived, apart.found


# --- machines that know their own locks alone


class Machines:
    """Threads that are machines, each with locks of its own: only the mark in the file tells one of the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = threading.local()
        monkeypatch.setattr(socket, "gethostname", lambda: getattr(self.here, "name", "home"))
        monkeypatch.setattr(lock, "file_system", lambda path: "nfs")
        monkeypatch.setattr(lock, "_taken", lambda *_: True)
        for name, seconds in (("BEAT_SECONDS", 0.05), ("SILENT_SECONDS", 0.6), ("SETTLE_SECONDS", 0.2), ("POLL_SECONDS", 0.02)):
            monkeypatch.setattr(lock, name, seconds)

    def on(self, name: str) -> None:
        self.here.name = name


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    return Machines(monkeypatch)  # type: ignore[return-value]


def test_owner_on_another_machine_is_not_robbed_while_it_gives_signs_of_life(machines: Machines, tmp_path: Path) -> None:
    machines.on("node-a")
    with locked(tmp_path):
        machines.on("node-b")
        words = rf"process {os.getpid()} on node-a is at work here"
        with pytest.raises(InputError, match=words), locked(tmp_path):
            pass
    with locked(tmp_path):  # it left no mark behind
        assert Mark.read(tmp_path / ".lock").machine == "node-b"


def test_owner_that_died_on_another_machine_is_followed_by_one(machines: Machines, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on node-a (job 17)\nnode-a\nabc\n000000000003")
    inside: list[int] = []
    most = 0

    def come(name: str) -> None:
        nonlocal most
        machines.on(name)
        with locked(tmp_path, queue=Stop()):
            inside.append(1)
            most = max(most, len(inside))
            time.sleep(0.1)
            inside.pop()

    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come, ("node-b", "node-c", "node-d")))
    assert most == 1
    assert time.monotonic() - began > lock.SILENT_SECONDS


def test_tasks_follow_together_an_owner_that_died_on_another_machine(machines: Machines, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on node-a (job 17)\nnode-a\nabc\n000000000003")
    together = threading.Barrier(3, timeout=20)

    def come(name: str) -> int:
        machines.on(name)
        with locked(tmp_path, shared=True):
            return together.wait()

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(come, ("node-b", "node-c", "node-d"))) == [0, 1, 2]


def test_owner_that_was_replaced_leaves_the_mark_of_its_successor(machines: Machines, tmp_path: Path) -> None:
    machines.on("node-a")
    with locked(tmp_path):
        successor = Mark("process 2 on node-b", "node-b", "xyz")
        (tmp_path / ".lock").write_text(f"{successor.words}\nnode-b\nxyz\n000000000000")
    assert Mark.read(tmp_path / ".lock") == successor


def test_lock_ends_with_its_block_though_a_forked_child_lives(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with locked(tmp_path):
            assert Mark.read(tmp_path / ".lock").words.startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_of_two_marks_written_at_once_the_last_one_counts(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep

    def overtaken(seconds: float) -> None:
        (tmp_path / ".lock").write_text("process 9 on node-z\nnode-z\nxyz\n000000000000")
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", overtaken)
    with pytest.raises(InputError, match="process 9 on node-z is at work here"), locked(tmp_path):
        pass


def test_lock_of_a_folder_that_was_moved_aside_is_none(tmp_path: Path) -> None:
    """Who waited for it gets that of the folder that is there now."""
    folder, inside = tmp_path / "stage", threading.Event()
    leave = threading.Event()

    def wait() -> None:
        with locked(folder, queue=Stop()):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=wait)
    with locked(folder):
        thread.start()
        time.sleep(0.1)
        set_aside(folder)
    assert inside.wait(10)
    with pytest.raises(InputError, match="is at work here"), locked(folder):
        pass
    leave.set()
    thread.join()


def test_slow_write_waits_until_one_that_entered_meanwhile_has_ended(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(lock, "BEAT_SECONDS", 7.0)
    monkeypatch.setattr(lock.time, "sleep", waited.append)
    with locked(tmp_path):
        pass
    ticks = iter((0.0, 0.0, 0.11))
    monkeypatch.setattr(lock.time, "monotonic", lambda: next(ticks))
    with locked(tmp_path):
        monkeypatch.undo()
    assert waited == [0.2, 21.0]


def test_owner_that_was_silent_for_too_long_ends_at_once(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()
        raise OSError  # the thread ends here

    monkeypatch.setattr(lock.os, "_exit", leave)
    with locked(tmp_path):
        (tmp_path / ".lock").write_text("process 9 on node-z\nnode-z\nxyz\n000000000000")
        assert ended.wait(10)
    assert codes[0] == FAILED
    assert "process 9 on node-z has taken this folder over" in capsys.readouterr().err


def test_mark_of_an_earlier_version_or_torn_is_no_owner(tmp_path: Path) -> None:
    for text in ("", "process 17 on node-a (job 3)", "process 1 on a\na\nname", "\0" * 40):
        (tmp_path / ".lock").write_text(text)
        assert not Mark.read(tmp_path / ".lock").elsewhere
        with locked(tmp_path):
            assert Mark.read(tmp_path / ".lock").words == f"process {os.getpid()} on {socket.gethostname()}"


# --- inputs that are made again


@pytest.mark.parametrize("fails", [False, True])
def test_summary_whose_inputs_are_made_again_meanwhile_is_not_complete(
    fails: bool, own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(NUMBERS)
    run(SQUARES)

    def overtaken(ctx: Context) -> None:
        write_total(ctx)
        manifest = folder_of(SQUARES, own_folders) / "manifest.json"
        if not fails:
            other = json.dumps(read_sealed(manifest)).replace('"sha256": "', '"sha256": "0')
            write_sealed(manifest, json.loads(other))
        else:
            manifest.unlink()
            ctx.read("squares").with_name("gone").read_text()

    assert run(replace(TOTAL, run=overtaken)) == FAILED
    said = capsys.readouterr().err
    assert f"the input 'squares' in {folder_of(SQUARES, own_folders)} was made again meanwhile" in said and "Traceback" not in said
    assert not (folder_of(TOTAL, own_folders) / "manifest.json").exists()


# --- the week's books


def test_week_counts_what_was_lost_beyond_the_last_due_save() -> None:
    steps = [f"2 42 17 100 step {step}" for step in range(1, 11)]
    assert lost_steps("\n".join(["2 42 17 100 start 0", *steps, "2 42 17 200 start 8"]))[42] == 0
    assert lost_steps("\n".join(["2 42 17 100 start 0", *steps, "2 42 17 200 start 4"]))[42] == 4
    assert lost_steps("\n".join(["7 42 17 100 start 0", *(step.replace("2 42", "7 42") for step in steps), "7 42 1 2 start 0"]))[None] == 8
    with pytest.raises(ValueError, match="processes 200 and 100 were at work at once"):
        lost_steps("\n".join(["2 42 17 100 start 0", "2 42 18 200 start 0", *steps]))


def test_room_sees_two_at_work(tmp_path: Path) -> None:
    room = Room(tmp_path, random.Random(0))
    (tmp_path / "diary").write_text("1 began\n2 began\n1 ended\n2 ended\n")
    assert room.overlap() == "process 2 began while 1 was at work" and room.overlap(dead=(1,)) is None
    assert run(NUMBERS) == DONE
