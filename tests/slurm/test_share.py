"""An array shares the work of an attack stage on a real cluster; one of its tasks is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout, submitted

OUTPUTS = ("records.jsonl", "hotflip_results.json")


def test_tasks_share_the_flips(cluster: Cluster, prepare: Callable[..., Checkout], finished: Path) -> None:
    """Two tasks, one of which is cancelled before it begins, then the stage's own job; results are those of one process."""
    checkout = prepare(5)
    cluster.hold()
    said = checkout.submit("--from", "6", "--to", "6", "--set", "attack_workers.tasks=2")
    job = submitted(said)[6]
    array = str(int(job) - 1)
    assert f"  job {array}: an array that shares the work of the next one\n" in said
    cluster.call("scancel", f"{array}_1")
    cluster.release()
    assert cluster.wait(job) == "COMPLETED"
    folder = next(checkout.work.glob("seed_42/stage_6_hotflip"))
    original = next(finished.glob("scratch/foundation_llm_work/tiny/seed_42/stage_6_hotflip"))
    assert [(folder / name).read_bytes() for name in OUTPUTS] == [(original / name).read_bytes() for name in OUTPUTS]
    assert len(json.loads((folder / "manifest.json").read_text())["starts"]) == 2
    (log,) = (checkout.root / "logs").glob(f"share_6_hotflip_{array}_*.out")
    assert "task 1 of 2 found nothing more to take" in log.read_text()
    assert "flips of other models" not in checkout.log("job_6_hotflip")
