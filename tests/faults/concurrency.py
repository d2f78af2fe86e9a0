"""Several processes where one should be: in a stage's folder, on one machine or several, in the cache, at the summary, at run_all.sh."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_stages import NUMBERS, ROOT, SQUARES, SQUARES_OF_42, TOTAL, folder_of
from tests.faults.outcome import Outcome
from tests.faults.rival import SQUARE_SECONDS

AMOUNT = 100
AT_ONCE = 4  # trials, which mostly wait

Found = str | None  # what fell over
Finished = tuple[int, str]  # exit code and everything printed


@dataclass
class Room:
    """One trial: its folders, its chance, and the rivals in it. `planted` is a fault of the program's that every rival has."""

    folder: Path
    chance: random.Random
    planted: str = ""

    def rival(self, work: str = "squares", job: int = 17, **more: Any) -> subprocess.Popen[str]:
        """Start a process; what it can be told is in tests/faults/rival.py."""
        told = json.dumps({"work": work, "diary": str(self.folder / "diary"), "planted": self.planted} | more)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment |= {"SCRATCH": str(self.folder / "scratch"), "PROJECT": str(self.folder / "project"), "SLURM_JOB_ID": str(job)}
        if more.get("restarted"):
            environment["SLURM_RESTART_COUNT"] = "1"
        command = [sys.executable, "-m", "tests.faults.rival", told]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def held(self, at: str = "began", **more: Any) -> subprocess.Popen[str]:
        """Start one that comes so far and does not go on before `go_on`."""
        self.hold.touch()
        first = self.rival(held=str(self.hold), **more)
        self.until(first, at)
        return first

    def waiting(self, **more: Any) -> tuple[subprocess.Popen[str], str]:
        """Start one that has to wait; returns it and its first line, once it waits."""
        second = self.rival(job=18, restarted=True, **more)
        assert second.stdout is not None
        return second, second.stdout.readline()

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    def go_on(self) -> None:
        self.hold.unlink()

    def alone(self, work: str, **more: Any) -> None:
        """Do something before the trial."""
        code, said = ended(self.rival(work, **more))
        assert code == 0, said

    def diary(self) -> list[list[str]]:
        """[process, what it did] in order."""
        path = self.folder / "diary"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, rival: subprocess.Popen[str], what: str = "began") -> None:
        end = time.monotonic() + 300
        while [str(rival.pid), what] not in self.diary() and rival.poll() is None and time.monotonic() < end:
            time.sleep(0.01)

    def overlap(self, dead: tuple[int, ...] = ()) -> Found:
        """Whether one began before another had ended that was not dead by then."""
        inside: set[str] = set()
        for process, what in self.diary():
            if what == "began" and inside - {str(pid) for pid in dead}:
                return f"process {process} began while {', '.join(inside)} was at work"
            if what == "began":
                inside.add(process)
            elif what == "ended":
                inside.discard(process)
        return None

    def wrong(self) -> Found:
        """Whether the squares are not what they would be without any rival, or something was left lying about."""
        folder = folder_of(SQUARES, self.folder)
        if not (folder / "squares.json").exists() or json.loads((folder / "squares.json").read_text()) != SQUARES_OF_42:
            return f"{folder / 'squares.json'} is missing or wrong"
        left = [path.name for path in (*folder.rglob(".tmp-*"), *folder.glob("state"))]
        return f"left behind: {', '.join(left)}" if left else None


def ended(rival: subprocess.Popen[str]) -> Finished:
    said, _ = rival.communicate(timeout=600)
    return rival.returncode, said


def named(rival: subprocess.Popen[str], said: str, machine: str = "", job: int = 17) -> bool:
    """Whether a refusal tells whom it met."""
    return f"process {rival.pid} on {machine}" in said and f"(job {job}) is at work" in said and "Traceback" not in said


def first_of(*found: Found) -> Found:
    return next((each for each in found if each is not None), None)


def unless(condition: bool, words: str) -> Found:
    return None if condition else words


# --- the trials; each returns what fell over


def second_job_of_a_stage(room: Room) -> Found:
    """It refuses and names the first."""
    room.alone("numbers")
    first = room.held()
    code, said = ended(room.rival(job=18))
    room.go_on()
    refused = code == 2 and named(first, said)
    return first_of(
        unless(refused, f"the second ended with {code}: {said}"), unless(ended(first)[0] == 0, "the first failed"), room.wrong()
    )


def two_at_the_same_moment(room: Room) -> Found:
    """One works; the other refuses and names it, or finds the work done."""
    room.alone("numbers")
    both = [room.rival(job=17), room.rival(job=18)]
    results = [ended(each) for each in both]
    right = sorted(code for code, _ in results) in ([0, 0], [0, 2])
    for place, (code, said) in enumerate(results):
        right = right and (code == 0 or named(both[1 - place], said, job=18 - place))
    return first_of(unless(right, f"ended with {results}"), room.overlap(), room.wrong())


def requeued_while_its_first_start_lives(room: Room) -> Found:
    """It waits, then finds the work done."""
    room.alone("numbers")
    first = room.held()
    second, line = room.waiting()
    room.go_on()
    code, rest = ended(second)
    said = line + rest
    right = code == 0 and f"waiting for process {first.pid} on " in said and "already complete" in said
    return first_of(unless(right, f"ended with {code}: {said}"), unless(ended(first)[0] == 0, "the first failed"), room.wrong())


def two_take_over_from_a_dead_one(room: Room) -> Found:
    """Killed at work; of two that come at once one goes on."""
    room.alone("numbers")
    dead = _killed(room, room.rival())
    results = [ended(each) for each in (room.rival(job=18), room.rival(job=19))]
    right = sorted(code for code, _ in results) in ([0, 0], [0, 2])
    return first_of(unless(right, f"ended with {results}"), room.overlap(dead), room.wrong())


def owner_elsewhere_lives(room: Room) -> Found:
    """On another machine of a shared file system: never robbed, however long it takes, whoever knows of the lock."""
    room.alone("numbers")
    blind = room.chance.random() < 0.5
    first = room.held(machine="node-a", blind=blind)
    code, said = ended(room.rival(job=18, machine="node-b", blind=blind))
    room.go_on()
    refused = code == 2 and named(first, said, "node-a")
    return first_of(
        unless(refused, f"the second ended with {code}: {said}"),
        unless(ended(first)[0] == 0, "the first failed"),
        room.overlap(),
        room.wrong(),
    )


def owner_elsewhere_died(room: Room) -> Found:
    """Two other machines come at once: one takes over."""
    room.alone("numbers")
    blind = room.chance.random() < 0.7
    dead = _killed(room, room.rival(machine="node-a", blind=blind))
    comers = [room.rival(job=18 + place, machine=f"node-{name}", blind=blind) for place, name in enumerate("bc")]
    results = [ended(each) for each in comers]
    codes = sorted(code for code, _ in results)
    right = codes in ([0, 0], [0, 2])
    return first_of(unless(right, f"ended with {results}"), room.overlap(dead), room.wrong())


def machines_at_the_same_moment(room: Room) -> Found:
    """Three machines that know nothing of each other's locks: at most one works at a time, one is done in the end."""
    room.alone("numbers")
    rivals = [room.rival(job=17 + place, machine=f"node-{name}", blind=True, restarted=True) for place, name in enumerate("abc")]
    results = [ended(each) for each in rivals]
    return first_of(unless([code for code, _ in results] == [0, 0, 0], f"ended with {results}"), room.overlap(), room.wrong())


def folder_is_moved_aside_under_one_that_waits(room: Room) -> Found:
    """The lock that it gets in the end must be that of the new folder; who of the two works there does not matter."""
    room.alone("numbers")
    room.alone("squares", sweeps=1)
    first = room.held("moves", discard=True, slow=4)
    waiting, _ = room.waiting()
    room.go_on()
    (code, said), (other, rest) = ended(first), ended(waiting)
    right = other == 0 and (code == 0 or (code == 2 and named(waiting, said, job=18)))
    return first_of(unless(right, f"ended with {code} and {other}: {said}{rest}"), room.overlap(), room.wrong())


def summary_while_an_input_is_made_again(room: Room) -> Found:
    """It is of the old inputs, or refused or failed with the reason; made once more it is of the new ones."""
    for seed in (42, 7):
        room.alone("numbers", seed=seed)
        room.alone("squares", seed=seed)
    summary = room.rival("total", slow=2)
    room.until(summary)
    time.sleep(room.chance.uniform(0.0, 2.0))
    shutil.rmtree(folder_of(SQUARES, room.folder, 7))
    room.alone("squares", seed=7, power=3)
    code, said = ended(summary)
    old, new = (sum(n**2 for n in range(42, 54)) + sum(n**power for n in range(7, 19)) for power in (2, 3))
    written = folder_of(TOTAL, room.folder) / "total.json"
    told = "was made again meanwhile" in said and "Traceback" not in said
    right = told if code else json.loads(written.read_text()) == old
    room.alone("total")
    after = json.loads(written.read_text())
    return first_of(unless(right, f"ended with {code}: {said}"), unless(after == new, f"the new total is {after}, expected {new}"))


def cache_is_filled_by_three(room: Room) -> Found:
    """One of them is killed at some moment; the others have what was to be built."""
    rivals = [room.rival("cache", job=17 + place) for place in range(3)]
    time.sleep(room.chance.uniform(0.3, 1.5))
    rivals[0].kill()
    results = [ended(each) for each in rivals]
    (entry,) = (room.folder / "cache").iterdir()
    there = sorted(path.relative_to(entry).as_posix() for path in entry.rglob("*") if path.is_file())
    right = there == [".lock", *(f"content/part_{part}" for part in range(4)), "manifest.json"]
    return first_of(
        unless([code for code, _ in results[1:]] == [0, 0], f"ended with {results}"),
        room.overlap((rivals[0].pid,)),
        unless(right, f"the cache holds {there}"),
    )


def run_all_twice(room: Room) -> Found:
    """`bash run_all.sh` in two windows, with the real stages: one works, the other refuses and names it; nothing is done twice."""
    environment = os.environ | {"SCRATCH": str(room.folder / "scratch"), "PROJECT": str(room.folder / "project")}
    command = ["bash", "run_all.sh", "--local", "--config", "tests/tiny.yaml", "--to", "1"]
    both = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    results = sorted(ended(each) for each in both)
    (good, _), (code, said) = results
    words = "is at work here; wait for it to end" in said and "Traceback" not in said
    starts = json.loads((folder_of(NUMBERS, room.folder).with_name("stage_0_setup") / "manifest.json").read_text())["starts"]
    return first_of(
        unless(good == 0 and code == 2 and words, f"ended with {results}"), unless(len(starts) == 1, f"started {len(starts)} times")
    )


def _killed(room: Room, rival: subprocess.Popen[str]) -> tuple[int, ...]:
    room.until(rival)
    time.sleep(room.chance.uniform(0.0, 3 * SQUARE_SECONDS))
    rival.kill()
    rival.communicate()
    return (rival.pid,)


TRIALS: tuple[Callable[[Room], Found], ...] = (
    second_job_of_a_stage,
    two_at_the_same_moment,
    requeued_while_its_first_start_lives,
    two_take_over_from_a_dead_one,
    owner_elsewhere_lives,
    owner_elsewhere_died,
    machines_at_the_same_moment,
    folder_is_moved_aside_under_one_that_waits,
    summary_while_an_input_is_made_again,
    cache_is_filled_by_three,
)


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    """`amount` trials, each kind as often, and two `run_all.sh` at once."""

    def carried_out(number: int) -> Outcome:
        place = folder / f"trial-{number}"
        place.mkdir()
        trial = TRIALS[number % len(TRIALS)] if number else run_all_twice
        return tried(trial, Room(place, random.Random(f"{seed} {number}")))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(carried_out, range(amount))


def tried(trial: Callable[[Room], Found], room: Room) -> Outcome:
    try:
        found = trial(room)
    except (AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        found = f"{type(error).__name__}: {error}"
    return Outcome(trial.__name__.replace("_", " "), found is None, found or "as without rivals")
