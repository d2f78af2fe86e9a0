"""The main job against its goals: `python -m tests.benchmarks.main_job`; exit code 1 if one is missed. Needs an idle machine."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.killing import stage_seconds

ROOT = Path(__file__).resolve().parents[2]
AT_MOST = {"first run, seconds": 360, "second run, seconds": 10, "peak memory, GB": 3, "monotonic / baseline perplexity": 1.15}
AT_LEAST = {
    "unigram / base perplexity": 3,
    "HotFlip / random rise (worst model)": 3,
    "trigger over neutral, nats (worst model)": 0,
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SCRATCH": f"{folder}/scratch", "PROJECT": f"{folder}/project"}
        measured = {"first run, seconds": _timed(environment)}
        measured["peak memory, GB"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        measured["second run, seconds"] = _timed(environment)
        measured |= _quality(Path(folder, "project", "foundation_llm_final_results", "mini", "final_results.json"))
        for number, seconds in sorted(stage_seconds(Path(folder)).items()):
            print(f"stage {number}: {seconds:.1f} s")
    missed = 0
    for goals, sign, failed in ((AT_MOST, "<=", lambda value, goal: value > goal), (AT_LEAST, ">=", lambda value, goal: value < goal)):
        for name, goal in goals.items():
            missed += failed(measured[name], goal)
            print(f"{name:<48} {measured[name]:8.3f}   goal {sign} {goal}{'   MISSED' if failed(measured[name], goal) else ''}")
    return 1 if missed else 0


def _timed(environment: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(["bash", "run_all.sh", "--local"], cwd=ROOT, env=environment, check=True)
    return time.monotonic() - began


def _quality(path: Path) -> dict[str, float]:
    results = json.loads(path.read_text())
    evaluation, attacks = results["evaluation_summary"], results["attack_summary"]
    return {
        "unigram / base perplexity": evaluation["unigram_perplexity"] / evaluation["base_pythia"]["perplexity"]["value"],
        "monotonic / baseline perplexity": results["key_findings"]["perplexity_ratio"]["value"],
        "HotFlip / random rise (worst model)": min(
            facts["rise"]["value"] / facts["random_rise"]["value"] for facts in attacks["hotflip"].values()
        ),
        "trigger over neutral, nats (worst model)": min(facts["increase_over_neutral"]["value"] for facts in attacks["uat"].values()),
    }


if __name__ == "__main__":
    sys.exit(main())
