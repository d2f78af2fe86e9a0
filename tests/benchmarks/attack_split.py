"""The attack stages by one process a GPU against one GPU alone: `python -m tests.benchmarks.attack_split --out FILE` on a host with GPUs.

The pipeline's own stages, on a model of Pythia-410M's shape that has hardly been trained: what an attack costs does not depend on that.
`--quick` shows on a CPU, with two processes, that it works. Exit code 1 if the outputs differ or, on GPUs, the goal is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.killing import results
from utils.run.artifacts import write_json

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.95  # of perfect scaling
STAGES = ("5", "6")
SHAPE = {"hidden": 1024, "layers": 24, "heads": 16, "intermediate": 4096, "steps": 20, "batch_size": 32, "earlier": "[5,10]"}
TRAINING = {"steps": 20, "batch_size": 32, "validate_every": 20, "max_loss_rise": 10}
TEXT = "{packages: [stdlib, numpy, pandas, torch, transformers], characters: 15_000_000, document_characters: 4000}"
DATA = {
    "source": "embedded",
    "files": "null",
    "embedded": TEXT,
    "train_tokens": 1_000_000,
    "validation_tokens": 40_000,
    "test_tokens": 60_000,
}
FLIPS = {"texts": 64, "flips": 4, "longer_texts": 8, "batch_size": 8}
SECTIONS: dict[str, Mapping[str, object]] = {
    "compute": {"compile": "off"},
    "model.scratch": SHAPE,
    "training": TRAINING,
    "data": DATA,
    "hotflip": FLIPS,
}
SETTINGS = [f"{section}.{key}={value}" for section, keys in SECTIONS.items() for key, value in keys.items()]


def run(chosen: Sequence[str], folder: Path, stages: Sequence[str], processes: int) -> float:
    """Seconds that the stages take, starts of Python included."""
    environment = os.environ | {"SCRATCH": str(folder / "scratch"), "PROJECT": str(folder / "project")}
    given = [*chosen, "--set", f"attack_workers.processes={processes}", "--from", stages[0], "--to", stages[-1]]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "stages", "run", *given], cwd=ROOT, env=environment, check=True)
    return time.monotonic() - began


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.attack_split", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count(), help="default: one for each GPU")
    parser.add_argument("--quick", action="store_true", help="two processes and the tests' tiny experiment")
    parser.add_argument("--folder", type=Path, help="keep the runs here; stages 0 to 4 that are complete there are passed over")
    parser.add_argument("--prepare", action="store_true", help="run stages 0 to 4 in --folder, no more")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    chosen, processes = ["--config", "standin-42m", *(word for item in SETTINGS for word in ("--set", item))], options.processes
    if options.quick:
        chosen, processes = ["--config", "tests/tiny.yaml"], 2
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        run(chosen, folder / "1", ("0", "4"), 1)
        if options.prepare:
            return 0
        shutil.copytree(folder / "1", folder / "several")
        seconds = {
            stage: [run(chosen, folder / where, (stage,), count) for where, count in (("1", 1), ("several", processes))] for stage in STAGES
        }
        same = results(folder / "1") == results(folder / "several")
    shares = {stage: one / several / processes for stage, (one, several) in seconds.items()}
    shares["5 and 6"] = sum(one for one, _ in seconds.values()) / sum(several for _, several in seconds.values()) / processes
    if options.out:
        write_json(options.out, {"processes": processes, "seconds": seconds, "share_of_perfect_scaling": shares, "same_outputs": same})
    for stage, (one, several) in seconds.items():
        print(f"stage {stage}: {one:.1f} s by one process, {several:.1f} s by {processes}, {shares[stage]:.1%} of perfect scaling")
    print(f"both: {shares['5 and 6']:.1%}   goal {GOAL:.0%}; outputs {'the same' if same else 'DIFFER'}")
    return int(not same or (torch.cuda.is_available() and shares["5 and 6"] < GOAL))


if __name__ == "__main__":
    sys.exit(main())
