"""Hostile names in every place of the command line, the environment, a site's file and a job's variables, with real shells."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import yaml

from configs.cluster import Cluster
from configs.presets import load
from tests.fake_slurm import SCRIPTS, put, small_checkout
from tests.fake_stages import ROOT, TINY
from tests.faults.outcome import Outcome
from utils.slurm.snapshot import Snapshot

CANARY = "CANARY"
TOLD = ("JOB_ID", "RESTART_COUNT", "JOB_END_TIME", "ARRAY_TASK_ID", "ARRAY_JOB_ID")
SHELL = [
    "$(touch CANARY)",
    "`touch CANARY`",
    "'; touch CANARY; '",
    '"; touch CANARY; "',
    "a b",
    "a\ntouch CANARY\n",
    "&& touch CANARY",
    "| touch CANARY",
]
SHELL += [
    "-rf",
    "*",
    "~",
    "$IFS",
    "${x:-$(touch CANARY)}",
    "; touch CANARY #",
    "\\",
    "a'b\"c",
    "$((1+$(touch CANARY)))",
    "<(touch CANARY)",
    "é\u202e",
    "%n%s",
]


def canaries(*folders: Path) -> list[str]:
    """Files that nobody makes but a hostile name, file or text that was run."""
    tops = [path for path in ROOT.iterdir() if path.name not in (".git", ".venv")]
    found = [path for path in tops if path.name == CANARY] + [path for folder in (*folders, *tops) for path in folder.rglob(CANARY)]
    return [str(path) for path in found]


def names(folder: Path, amount: int) -> Iterator[Outcome]:
    """Hostile names in every place of the command line, the environment, a site's file and a job's variables, with real shells."""
    checkout = folder / "check'out $(touch CANARY)"
    checkout.mkdir()
    for name in ("configs", "stages", "utils", "jobs", "run_all.sh", "run_tests.sh", "verify_local.py"):
        (checkout / name).symlink_to(ROOT / name)
    put(folder / "bin" / "sbatch", f'printf "%s\\n" "$@" >>{shlex.quote(str(folder / "sbatch.log"))}; echo 17')
    for command in ("squeue", "scontrol", "sinfo", "sacct", "scancel"):
        put(folder / "bin" / command, "exit 0")
    for hostile in SHELL[:amount]:
        yield from _typed(hostile, folder, checkout)
        yield from _as_job(hostile, folder)


def _typed(hostile: str, folder: Path, checkout: Path) -> Iterator[Outcome]:
    """Through run_all.sh: the submission's dry run, the status, the plan, and run_tests.sh."""
    quoted = json.dumps(hostile)
    scratch = {"SCRATCH": f"{folder}/s {hostile}", "PROJECT": f"{folder}/p {hostile}", "HF_HOME": f"{folder}/{hostile}"}
    (folder / "site.yaml").write_text(yaml.safe_dump({"resources": {"partition": hostile, "account": hostile, "gres": hostile}}))
    cases: dict[str, tuple[list[str], dict[str, str]]] = {
        "--run-name": (["run_all.sh", "--run-name", hostile, "--dry-run"], {}),
        "--config": (["run_all.sh", "--config", hostile, "--dry-run"], {}),
        "--seeds": (["run_all.sh", "--seeds", hostile, "--plan"], {}),
        "a model's name and revision": (
            ["run_all.sh", "--config", TINY, "--set", f"model.name={quoted}", "--set", f"model.revision={quoted}", "--dry-run"],
            {},
        ),
        "$SCRATCH, $PROJECT, $HF_HOME": (["run_all.sh", "--config", TINY, "--dry-run"], scratch),
        "a site's file": (["run_all.sh", "--config", TINY, "--cluster", str(folder / "site.yaml"), "--dry-run"], {}),
        "SLURM's variables, typed": (
            ["run_all.sh", "--config", TINY, "--status"],
            dict.fromkeys(("SLURM_JOB_ID", "SLURM_CONF", "SBATCH_PARTITION"), hostile),
        ),
        "the kind of test": (["run_tests.sh", hostile], {}),
    }
    for place, (command, environment) in cases.items():
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", *command],
            cwd=checkout,
            env=os.environ | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
        made = canaries(folder)
        good = not made and "Traceback" not in done.stderr
        yield Outcome(f"{hostile!r} as {place}", good, f"exit code {done.returncode}: {done.stderr[-150:]}")


def _as_job(hostile: str, folder: Path) -> Iterator[Outcome]:
    """A frozen run below a hostile path, its job script run by bash with hostile variables; Python is a program that does nothing."""
    home = folder / "jobs" / hostile
    stand_in = home / "bin" / "python"
    put(stand_in, "exit 0")
    with patch.dict(os.environ, {"HF_HOME": str(home / "hub")}):
        config = load(TINY, [f"paths.work={json.dumps(str(folder / 'frozen'))}"])
        frozen = Snapshot.of(small_checkout(home / "root"), config, Cluster(), str(stand_in))
    for name, content in frozen.files.items():
        target = home / "code" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    told = dict.fromkeys((*(f"SLURM_{name}" for name in TOLD), "GPU_LOG_SECONDS"), hostile)
    named = [(SCRIPTS[0], name) for name in (hostile, f"job_0_{hostile}", f"job_0_/../../{CANARY}")]
    for script, job_name in [*((script, script.stem) for script in SCRIPTS), *named]:
        command = ["bash", str(script), str(home / "code"), hostile]
        environment = os.environ | told | {"SLURM_JOB_NAME": job_name}
        done = subprocess.run(command, cwd=home / "root", env=environment, capture_output=True, text=True, errors="replace", timeout=60)
        made = canaries(folder)
        yield Outcome(
            f"{hostile!r} in a job named {job_name!r}",
            not made and done.returncode in (0, 2),
            f"exit code {done.returncode}: {done.stderr[-150:]}",
        )
