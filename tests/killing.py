"""Kill -9 at random moments until a stage is done. `python -m tests.killing --config mini` does it with the real default."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.presets import load
from configs.schema import Experiment
from stages.pipeline import run_each, stages
from utils.run.preemption import SIGNALS

CLOCK = re.compile(r"time|seconds|tokens_per_second|resumed|code_revision")
BOOKKEEPING = {"manifest.json", "started.json", ".lock", "telemetry.jsonl"}
SHOW_RESTARTS = ("training_curves", "validation_curves", "report.html")  # these tell an interrupted run from a straight one on purpose


def start(
    config: Experiment, numbers: Sequence[int], output: Path, prepare: Callable[[], None] = lambda: None, discard: bool = False
) -> int:
    """Fork a child that prepares itself and runs stages; returns its process id. A fork spares the seconds of importing torch."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.settrace(None)  # coverage hears nothing of a process that ends by os._exit
        code = 70
        try:
            sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.stdout = sys.stderr = os.fdopen(sink, "w", buffering=1)
            prepare()
            code = run_each([stages()[number] for number in numbers], config, config.seeds, discard)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def waited(child: int, seconds: float) -> int:
    """Exit code of a child, negative for a signal; one that hangs so long is killed and has that of SIGALRM."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def killed_until_done(config: Experiment, number: int, seconds: float, kills: int, chance: random.Random, output: Path) -> int:
    """Run a stage, killing it `kills` times at a uniform moment of its duration; returns how many kills hit it at work.

    The first moment is in the first half, so that at least one kill hits where other work makes `seconds` an overestimate.
    """
    hits = 0
    for turn in range(kills):
        child = start(config, [number], output)
        time.sleep(chance.uniform(0.0, seconds if turn else seconds / 2))
        ended, _status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hits += 1
    _, status = os.waitpid(start(config, [number], output), 0)
    if status != 0:
        raise RuntimeError(f"stage {number} ended with {os.waitstatus_to_exitcode(status)}:\n{output.read_text()[-2000:]}")
    return hits


def results(root: Path) -> dict[str, Any]:
    """Everything a run produced, without clock times and bookkeeping: {relative path: bytes, or JSON without times}."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name in BOOKKEEPING or "foundation_llm_cache" in path.parts:
            continue
        if path.name.startswith(SHOW_RESTARTS):
            continue
        name = path.relative_to(root).as_posix()
        if path.suffix == ".json":
            found[name] = parsed(path.read_bytes())
        elif path.name == "experiment_summary.txt":
            found[name] = [line for line in path.read_bytes().splitlines() if b"time" not in line]
        else:
            found[name] = path.read_bytes()
    return found


def parsed(content: bytes) -> Any:
    """JSON without clock times; what is damaged, as it is."""
    try:
        return without_clock(json.loads(content))
    except ValueError:
        return content


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(part) for key, part in value.items() if not CLOCK.search(key)}
    return [without_clock(part) for part in value] if isinstance(value, list) else value


def stage_seconds(root: Path) -> dict[int, float]:
    """Seconds of each stage in an uninterrupted run below `root`."""
    manifests = [json.loads(path.read_text()) for path in root.rglob("manifest.json") if "foundation_llm_cache" not in path.parts]
    return {int(stored["identity"]["stage"].split("_")[1]): stored["seconds_of_last_start"] for stored in manifests}


def differing(straight: dict[str, Any], interrupted: dict[str, Any]) -> list[str]:
    return [name for name in sorted(straight.keys() | interrupted.keys()) if straight.get(name) != interrupted.get(name)]


def place(root: Path) -> None:
    os.environ["SCRATCH"], os.environ["PROJECT"] = str(root / "scratch"), str(root / "project")


def finish(config: Experiment, root: Path) -> None:
    """Run all stages below `root` in this process: its later forks have everything imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    before, handlers = {name: os.environ.get(name) for name in ("SCRATCH", "PROJECT")}, {one: signal.getsignal(one) for one in SIGNALS}
    place(root)
    try:
        if code := run_each(stages(), config, config.seeds, discard=False):
            raise RuntimeError(f"the undisturbed run ended with {code}")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for number, handler in handlers.items():
            signal.signal(number, handler)


def upto(finished: Path, number: int, root: Path) -> None:
    """Make `root` a copy of a finished run of one seed whose stages from `number` on were never begun."""
    shutil.rmtree(root, ignore_errors=True)
    if number == 0:
        root.mkdir(parents=True)
        return
    shutil.copytree(finished, root)
    for stage in stages()[number:]:
        for folder in root.rglob(f"{stage.label}") if stage.every_seed else [root / "project"]:
            shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mini")
    parser.add_argument("--passes", type=int, default=2, help="interrupted runs, each compared with one straight run")
    parser.add_argument("--kills", type=int, default=3, help="kills of each stage")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config, chance = load(options.config), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder, "straight")
        place(straight)
        straight.mkdir()
        for stage in stages():
            killed_until_done(config, stage.number, 0.0, 0, chance, straight / "log")
        (straight / "log").unlink()
        expected, seconds, wrong = results(straight), stage_seconds(straight), 0
        for turn in range(options.passes):
            root = Path(folder, f"interrupted-{turn}")
            root.mkdir()
            place(root)
            log = Path(folder, f"log-{turn}")
            hits = [killed_until_done(config, stage.number, seconds[stage.number], options.kills, chance, log) for stage in stages()]
            different = differing(expected, results(root))
            wrong += len(different)
            print(f"pass {turn + 1}: kills by stage {hits}, {len(expected)} files compared, different: {different or 'none'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
