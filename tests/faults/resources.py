"""A machine that runs short: of room, quota, inodes, memory, a GPU, speed, or of a clock that goes forward.

A stage of the tiny experiment meets one fault at a random place. It must end with one clear reason, or go through; when the fault is
gone, the same command must end with what an undisturbed run has.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.pipeline import stages
from tests.fake_stages import PIPELINE, ROOT
from tests.faults.outcome import Outcome
from tests.killing import differing, results

AMOUNT = 72
WORKERS = 2
REASON = re.compile(r"^\[stage [^]]*\] (?:failed: |refused: |cannot |the machine |the device )", re.MULTILINE)
ENDED_BELOW = (-6, -11, 127)  # without Python: a library's abort, its fault, the dynamic loader
SAID = {"memory": "ran out of memory", "device": "the device failed"}
Told = dict[str, Any]


class Machine:
    """A process that runs stages on a faulty machine, see tests/faults/machine.py."""

    def __init__(self, folder: Path, pipeline: str) -> None:
        self.pipeline = pipeline
        library = folder / "machine.so"
        if not library.exists():
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("machine.c"), "-ldl"], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {"LD_PRELOAD": str(library)}
        command = [sys.executable, "-m", "tests.faults.machine", pipeline]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )

    def run(self, root: Path, number: int, log: Path, **faults: Any) -> Told:
        asked = {"root": str(root), "stage": number, "pipeline": self.pipeline, "log": str(log), "faults": faults}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        told: Told = json.loads(self.process.stdout.readline())
        return told

    def close(self) -> None:
        self.process.communicate()


@dataclass(frozen=True)
class Straight:
    """An undisturbed run: its results, and what each stage needed."""

    root: Path
    results: dict[str, Any]
    needed: list[Told]

    @classmethod
    def made(cls, machine: Machine, root: Path, count: int) -> Straight:
        needed = []
        root.mkdir()
        for number in range(count):
            told = machine.run(root, number, root.with_suffix(".log"))
            if told["code"]:
                raise RuntimeError(f"stage {number} of the undisturbed run: {root.with_suffix('.log').read_text()[-2000:]}")
            needed.append(told | {"bytes": size(root), "files": sum(1 for _ in root.rglob("*"))})
        return cls(root, results(root), needed)

    def before(self, number: int, root: Path) -> None:
        """Put what there is when a stage begins below `root`."""
        for path in self.root.rglob("stage_*"):
            if int(path.name.split("_")[1]) < number:
                shutil.copytree(path, root / path.relative_to(self.root))
        if number == 0:
            root.mkdir(exist_ok=True)

    def differs(self, number: int, root: Path) -> list[str]:
        """Results of the stages up to this one that are not those of the undisturbed run."""
        found = results(root)
        return differing({name: value for name, value in self.results.items() if self._stage(name) <= number}, found)

    def _stage(self, name: str) -> int:
        """The stage that a result belongs to; those of the last one have a place of their own."""
        named = re.search(r"stage_(\d)_", name)
        return int(named[1]) if named else len(self.needed) - 1


def size(root: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in root.rglob("*") if path.is_file())


@dataclass
class Trial:
    """One fault in one stage."""

    machine: Machine
    straight: Straight
    number: int
    root: Path
    chance: random.Random
    planted: str = ""

    @property
    def log(self) -> Path:
        return self.root.with_suffix(".log")

    @property
    def needed(self) -> Told:
        return self.straight.needed[self.number]

    def run(self, **faults: Any) -> int | None:
        code: int | None = self.machine.run(self.root, self.number, self.log, planted=self.planted, **faults)["code"]
        return code

    def judged(self, code: int | None, words: str, through: bool, codes: Sequence[int | None] = (1,)) -> str | None:
        """What was wrong with how the stage ended and how it went on; None if all was well."""
        said = self.log.read_text(errors="replace")
        reasons = len(REASON.findall(said))
        if code == 0 and not through:
            return f"went through, expected {words!r}"
        if code not in (0, *codes):
            return f"ended with {code}: {said[-500:]}"
        if code == 1 and (words not in said or "Traceback" in said or reasons != 1):
            return f"expected one reason, {words!r}, found {reasons}: {said[-1500:]}"
        saved = max((int(path.name[5:]) for path in self.root.rglob("step_*") if (path / "manifest.json").exists()), default=0)
        if again := self.run():
            return f"does not go on ({again}): {self.log.read_text(errors='replace')[-1500:]}"
        if code and saved and f"going on from step {saved} of" not in self.log.read_text():
            return f"step {saved} was saved, but the run went on from another"
        if different := self.straight.differs(self.number, self.root):
            return f"different: {', '.join(different[:5])}"
        left = [path.name for path in self.root.rglob(".tmp-*")]
        return f"left behind: {', '.join(left)}" if left else None


# --- the faults; each returns what fell over


def disk_full(trial: Trial) -> str | None:
    """From some operation on no room is left."""
    at = trial.chance.randint(1, trial.needed["operations"])
    return trial.judged(trial.run(disk_at=at, error=errno.ENOSPC), os.strerror(errno.ENOSPC), through=True)


def disk_full_for_a_moment(trial: Trial) -> str | None:
    """One to three operations fail; then somebody has made room."""
    at = trial.chance.randint(1, trial.needed["operations"])
    code = trial.run(disk_at=at, disk_until=at + trial.chance.randint(0, 2), error=errno.ENOSPC)
    return trial.judged(code, os.strerror(errno.ENOSPC), through=True)


def quota_exceeded(trial: Trial) -> str | None:
    at = trial.chance.randint(1, trial.needed["operations"])
    return trial.judged(trial.run(disk_at=at, error=errno.EDQUOT), os.strerror(errno.EDQUOT), through=True)


def input_output_error(trial: Trial) -> str | None:
    at = trial.chance.randint(1, trial.needed["operations"])
    return trial.judged(trial.run(disk_at=at, disk_until=at, error=errno.EIO), os.strerror(errno.EIO), through=True)


def small_disk(trial: Trial) -> str | None:
    """A real file system that is full before the stage is done. To mount one needs root."""
    if os.getuid():
        return disk_full(trial)
    before = size(trial.root) + 128 * 1024
    room = before + int(trial.chance.uniform(0.0, 0.9) * max(0, trial.needed["bytes"] - before))
    return _in_too_little(trial, f"size={room}", "size=256m")


def no_inodes(trial: Trial) -> str | None:
    """A real file system with room, and with no entry for another file."""
    if os.getuid():
        return disk_full(trial)
    before = sum(1 for _ in trial.root.rglob("*")) + 3
    entries = before + int(trial.chance.uniform(0.0, 0.9) * max(0, trial.needed["files"] - before))
    return _in_too_little(trial, f"size=256m,nr_inodes={entries}", "nr_inodes=100000")


def _in_too_little(trial: Trial, options: str, more: str) -> str | None:
    with mounted(trial.root, options) as grow:
        code = trial.run()
        grow(more)
        return trial.judged(code, os.strerror(errno.ENOSPC), through=True)


def memory_limit(trial: Trial) -> str | None:
    """Less address space than the stage needs. A library that cannot go on ends the process by a signal, as the kernel would."""
    idle = trial.needed["idle"]
    limit = idle + int(trial.chance.uniform(0.0, 1.0) * (trial.needed["memory"] - idle))
    return trial.judged(trial.run(memory=limit), SAID["memory"], through=True, codes=(1, *ENDED_BELOW))


def device_memory(trial: Trial) -> str | None:
    at = trial.chance.randint(1, max(1, trial.needed["products"]))
    through = not trial.needed["products"]
    return trial.judged(trial.run(device_at=at, device="memory"), SAID["memory"], through)


def device_lost(trial: Trial) -> str | None:
    at = trial.chance.randint(1, max(1, trial.needed["products"]))
    through = not trial.needed["products"]
    return trial.judged(trial.run(device_at=at, device="lost"), SAID["device"], through)


def slow_disk(trial: Trial) -> str | None:
    """Every operation takes some milliseconds."""
    code = trial.run(slow=trial.chance.randint(1000, 8000))
    return trial.judged(code, "nothing", through=True, codes=())


def clock_set_back(trial: Trial) -> str | None:
    """By an hour to a week, amid the work of a job with an end."""
    jump = -trial.chance.randint(3600, 7 * 86_400)
    code = trial.run(jump_at=trial.chance.randint(1, max(1, trial.needed["looks"])), jump=jump, ends_in=86_400)
    return trial.judged(code, "nothing", through=True, codes=())


def clock_set_back_near_the_end(trial: Trial) -> str | None:
    """The stage stops in time all the same, or is done."""
    jump = -trial.chance.randint(3600, 7 * 86_400)
    code = trial.run(jump_at=1, jump=jump, ends_in=trial.chance.randint(1, 4), slow=4000)
    return trial.judged(code, "nothing", through=True, codes=(75,))


FAULTS: tuple[Callable[[Trial], str | None], ...] = (
    disk_full, quota_exceeded, small_disk, memory_limit, disk_full_for_a_moment, device_lost,
    no_inodes, device_memory, input_output_error, clock_set_back, slow_disk, clock_set_back_near_the_end,
)  # fmt: skip


@contextmanager
def mounted(root: Path, options: str) -> Iterator[Callable[[str], object]]:
    """A small file system in place of a folder, with the same content; yields what makes it larger."""
    aside = root.with_name(f"{root.name}-aside")
    root.rename(aside)
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", root], check=True)
    try:
        shutil.copytree(aside, root, dirs_exist_ok=True)
        yield lambda more: subprocess.run(["mount", "-o", f"remount,{more}", root], check=True)
    finally:
        subprocess.run(["umount", root], check=True)
        shutil.rmtree(aside)


def campaign(folder: Path, amount: int, seed: int, pipeline: str = "real", planted: str = "") -> Iterator[Outcome]:
    """`amount` faults, each kind as often, over all stages."""
    machines: queue.Queue[Machine] = queue.Queue()
    first = Machine(folder, pipeline)
    straight = Straight.made(first, folder / "straight", len(stages() if pipeline == "real" else PIPELINE))
    for machine in (first, *(Machine(folder, pipeline) for _ in range(WORKERS - 1))):
        machines.put(machine)

    def carried_out(turn: int) -> Outcome:
        chance, fault = random.Random(f"{seed} {turn}"), FAULTS[turn % len(FAULTS)]
        number, machine = chance.randrange(len(straight.needed)), machines.get()
        try:
            root = folder / f"trial-{turn}"
            straight.before(number, root)
            found = fault(Trial(machine, straight, number, root, chance, planted))
            shutil.rmtree(root)
        finally:
            machines.put(machine)
        words = fault.__name__.replace("_", " ")
        return Outcome(f"{words}, stage {number}", found is None, found or "one reason or none, then as undisturbed")

    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(carried_out, range(amount))
    finally:
        while not machines.empty():
            machines.get().close()
