"""A week on a cluster, in minutes: the eight stages for five seeds on a real SLURM, whose clock is fast and to which everything happens.

The job scripts, the chain, the lock and the contract of the stages are the program's own; what a stage does is in tests/faults/steps.py.
Time limits strike several times in each training stage. A user who looks now and then types `bash run_all.sh --resume` where
something failed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from stages.pipeline import MODULES
from tests.fake_stages import ROOT
from tests.faults.outcome import Outcome
from tests.faults.steps import SAVE_EVERY
from tests.killing import results
from tests.slurm.cluster import Cluster, running
from tests.slurm.conftest import Checkout, make_checkout

AMOUNT = 60
SEEDS = (42, 7, 9, 11, 13)
SPEED = 10
STEP_SECONDS = 0.25
LONGEST = 280.0  # seconds in which faults are planted
PATIENCE = 120.0  # seconds after the last one in which all must be complete
SITE = {
    "resources": {"gres": "none", "memory": "4G", "cpus": 2, "time": "00:02:00"},  # 12 seconds
    "network": "none",
    "signal_seconds": 60,
    "max_restarts": 1000,
}
PREEMPTION = (
    "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nPartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=00:10:00 State=UP\n"
)
REASON = re.compile(
    r"^\[stage [^]]*\] (?:failed|refused|cannot write|the machine|the device)|^cannot write |the stage was killed: |^stopped as \w+, not by"
    r"|^no work was gained|^restarted \d+ times|^SLURM does not answer, so|^no successor could be submitted",
    re.MULTILINE,
)
EXPERIMENT = ("--config", "tests/tiny.yaml", "--seeds", ",".join(map(str, SEEDS)))
BAD = {"FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "BOOT_FAIL", "OUT_OF_MEMORY"}


@dataclass
class Week:
    """The cluster, the user's checkout, and what has happened so far."""

    cluster: Cluster
    checkout: Checkout
    chance: random.Random
    diary: Path
    disk: Path
    happened: list[str] = field(default_factory=list)
    later: list[tuple[float, Callable[[], object]]] = field(default_factory=list)  # what mends a fault, and when
    down: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)  # jobs whose end has been looked at
    unclear: list[str] = field(default_factory=list)
    resumed: int = 0

    def after(self, seconds: float, mend: Callable[[], object]) -> None:
        self.later.append((time.monotonic() + seconds, mend))

    def mend(self, everything: bool = False) -> None:
        due = [(at, mend) for at, mend in self.later if everything or time.monotonic() >= at]
        self.later = [each for each in self.later if each not in due]
        for _, mend in due:
            mend()

    def running(self) -> list[tuple[str, str]]:
        """(job, node) of the run's jobs at work."""
        lines = self.cluster.show("%i %N %j", "-t", "R")
        return [(line.split()[0], line.split()[1]) for line in lines if " job_" in line]

    # --- what happens; each says whether it hit something

    def node_crashes(self) -> bool:
        """Its daemon and all that runs on it are gone; it is back after some seconds."""
        return self._on_a_node(self.cluster.crash)

    def node_daemon_dies(self) -> bool:
        """What runs there goes on."""
        return self._on_a_node(self.cluster.kill_daemon)

    def _on_a_node(self, kill: Callable[[str], None]) -> bool:
        busy = sorted({node for _, node in self.running()} - self.down)
        if busy:
            node = self.chance.choice(busy)
            self.down.add(node)
            kill(node)
            self.after(self.chance.uniform(1.0, 5.0), lambda: self._back(node))
        return bool(busy)

    def _back(self, node: str) -> None:
        self.cluster.start_node(node)
        self.down.remove(node)

    def job_is_preempted(self) -> bool:
        """Somebody more important takes a whole node."""
        busy = sorted({node for _, node in self.running()} - self.down)
        if not busy:
            return False
        node = self.chance.choice(busy)
        urgent = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
        self.cluster.call("sbatch", *urgent, check=False)
        return True

    def controller_restarts(self) -> bool:
        return self._controller(signal.SIGTERM)

    def controller_is_killed(self) -> bool:
        return self._controller(signal.SIGKILL)

    def _controller(self, how: signal.Signals) -> bool:
        self.cluster.stop_controller(how)
        time.sleep(self.chance.uniform(0.2, 3.0))
        self.cluster.start_controller()
        return True

    def disk_is_full(self) -> bool:
        """Of all seeds, for some seconds."""
        fill = self.disk / "fill"
        with suppress(OSError), fill.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, shutil.disk_usage(self.disk).free)
        self.after(self.chance.uniform(1.0, 4.0), lambda: fill.unlink(missing_ok=True))
        return True

    def process_is_killed(self) -> bool:
        """As the kernel does when memory is short."""
        pids = {line.split()[3] for line in self.diary.read_text().splitlines()[-20:]}
        for pid in self.chance.sample(sorted(pids), len(pids)):
            with suppress(OSError):
                if b"stages.__main__" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
                    return True
        return False

    def job_is_cancelled(self) -> bool:
        jobs = self.running()
        if jobs:
            self.cluster.call("scancel", self.chance.choice(jobs)[0], check=False)
        return bool(jobs)

    # --- the user

    def look(self) -> None:
        """Read why jobs ended, and submit what is missing."""
        states = self.cluster.states()
        bad = {job for job, state in states.items() if state in BAD} - self.seen
        if not bad and any(state not in BAD | {"COMPLETED"} for state in states.values()):
            return
        self.seen |= bad
        for job in bad:
            self._reason(job, states[job])
        self.resumed += 1
        said = self.checkout.run_all("--resume", code=None)
        if "Traceback" in said:
            self.unclear.append(f"--resume: {said[-1500:]}")

    def _reason(self, job: str, state: str) -> None:
        """An end that is not good has one clear reason: SLURM's own, or one line of the program's in the log of the last start."""
        logs = list((self.checkout.root / "logs").glob(f"job_*_{job}.out"))
        text = logs[0].read_text(errors="replace") if logs else ""
        last = re.split(r"^\[[^]]*\] job_\d_\w+, job ", text, flags=re.MULTILINE)[-1]
        reasons = REASON.findall(last)
        own = state in ("TIMEOUT", "NODE_FAIL", "CANCELLED") or "JobLaunchFailure" in self.cluster.show("%r", "-t", "all", "-j", job)
        if "Traceback" in last or (not own and len(reasons) != 1):
            self.unclear.append(f"job {job} ended as {state} with {len(reasons)} reasons: {last[-1500:]}")

    def complete(self) -> bool:
        work = self.checkout.work
        final = Path(self.checkout.environment["PROJECT"]) / "foundation_llm_final_results" / work.name / "manifest.json"
        there = [work / f"seed_{seed}" / name / "manifest.json" for seed in SEEDS for name in MODULES[:-1]]
        inputs = json.loads(final.read_text())["identity"]["inputs"] if final.exists() else {}
        return all(path.exists() for path in there) and {f"seed {seed}: setup" for seed in SEEDS} <= inputs.keys()


OFTEN = (Week.node_crashes, Week.node_crashes, Week.job_is_preempted, Week.controller_restarts)
KINDS: tuple[Callable[[Week], bool], ...] = (*OFTEN, *OFTEN, Week.controller_is_killed, Week.node_daemon_dies)
KINDS += (Week.disk_is_full, Week.process_is_killed, Week.job_is_cancelled)


def light_checkout(root: Path, cluster: Cluster, folders: Path) -> Checkout:
    """A user's checkout in which every stage has its declaration, and does the steps of tests/faults/steps.py."""
    checkout = make_checkout(root, cluster, folders)
    shutil.copy(ROOT / "tests/faults/steps.py", root / "stages/steps.py")
    for name in MODULES:
        file = root / "stages" / f"{name}.py"
        light = "from dataclasses import replace\n\nfrom stages.steps import work\n\nSTAGE = replace(STAGE, run=work)\n\nif __name__"
        file.write_text(file.read_text().replace("if __name__", light))
    (root / "site.yaml").write_text(yaml.safe_dump(SITE))
    checkout.environment |= {"WEEK_DIARY": str(folders / "diary"), "WEEK_SECONDS": str(STEP_SECONDS)}
    return checkout


def straight(root: Path, cluster: Cluster) -> dict[str, object]:
    """Results of an undisturbed run."""
    (root / "runs").mkdir(parents=True)
    checkout = light_checkout(root / "checkout", cluster, root / "runs")
    checkout.run_all("--local", *EXPERIMENT, WEEK_SECONDS="0")
    return results(root / "runs")


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system that can be filled; without root just a folder that cannot."""
    place.mkdir()
    mounted = not os.getuid() and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "none", place]).returncode
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    """One outcome for each thing that happened, and one for each chain: a seed's stages, and the summary of all."""
    runs = folder / "week"
    runs.mkdir()
    with small_disk(runs / "scratch") as disk, running(speed=SPEED, extra=PREEMPTION) as cluster:
        expected = straight(folder / "straight", cluster)
        week = Week(cluster, light_checkout(folder / "checkout", cluster, runs), random.Random(seed), runs / "diary", disk)
        week.diary.touch()
        ended = _lived(week, amount)
        found = {name: value for name, value in results(runs).items() if name in expected}
        left = [path.name for path in runs.rglob(".tmp-*")] + [path.name for path in week.checkout.work.glob("seed_*/*/state")]
    trouble = [*week.unclear, *([] if ended else ["not complete"]), *(f"left behind: {name}" for name in left)]
    yield from (Outcome(words, not trouble, "; ".join(trouble) or "complete in the end") for words in week.happened)
    lost, limits = lost_steps(week.diary.read_text()), _time_limits(week.checkout)
    starts = week.diary.read_text().count(" start ")
    words = f"{starts} starts, {limits} stops in time, {len(week.seen)} jobs that ended badly, resumed by hand {week.resumed} times"
    for one in (*SEEDS, None):
        mark = f"seed_{one}/" if one is not None else "final_results"
        different = [name for name in expected if mark in name and expected[name] != found.get(name)]
        yield Outcome(
            f"chain of seed {one}" if one else "summary", not different, f"different: {different[:3]}" if different else words, lost[one]
        )


def _lived(week: Week, amount: int) -> bool:
    """Let it all happen; returns whether everything is complete in the end."""
    week.checkout.run_all(*EXPERIMENT, "--cluster", "site.yaml")
    began = time.monotonic()
    kinds = [KINDS[number % len(KINDS)] for number in range(amount)]
    week.chance.shuffle(kinds)
    while kinds and time.monotonic() - began < LONGEST and not week.complete():
        kind = kinds.pop()
        if kind(week):
            week.happened.append(kind.__name__.replace("_", " "))
        else:
            kinds.insert(0, kind)
        time.sleep(week.chance.uniform(0.5, 3.0))
        week.mend()
        week.look()
    week.mend(everything=True)
    end = time.monotonic() + PATIENCE
    while not week.complete() and time.monotonic() < end:
        time.sleep(1)
        week.look()
    return week.complete()


def lost_steps(diary: str) -> Counter[int | None]:
    """{seed, None for the summary: finished steps that were done again beyond the last due save}. Raises ValueError if two were at work."""
    lost: Counter[int | None] = Counter()
    done: dict[tuple[str, str], int] = {}
    worker: dict[tuple[str, str], str] = {}
    for line in diary.splitlines():
        number, seed, _job, process, what, step = line.split()
        key = number, seed
        if what == "start":
            due = done.get(key, 0) // SAVE_EVERY * SAVE_EVERY
            lost[None if number == "7" else int(seed)] += max(0, due - int(step))
            worker[key] = process
        elif worker[key] != process:
            raise ValueError(f"stage {number}, seed {seed}: processes {worker[key]} and {process} were at work at once")
        done[key] = int(step)
    return lost


def _time_limits(checkout: Checkout) -> int:
    """How often a stage stopped in time."""
    return sum(path.read_text(errors="replace").count("] stopped in time (signal") for path in (checkout.root / "logs").glob("job_*.out"))
