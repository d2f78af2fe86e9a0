"""docs/OPERATIONS.md, typed from top to bottom on a real cluster with the smallest experiment."""

from __future__ import annotations

import re
import shlex

import yaml

from tests.fake_stages import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout

PAGE = (ROOT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if re.match(r"    \S", line)]
SITE = {"resources": {"partition": "aa100", "gres": "none", "memory": "4G", "cpus": 2}, "network": "setup", "environment": ["true"]}


def test_site_on_the_page_is_valid(checkout: Checkout, cluster: Cluster) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (checkout.root / "mysite.yaml").write_text(text)
    said = checkout.run_all("--config", "tests/tiny.yaml", "--cluster", "mysite.yaml", "--dry-run")
    lines = [line for line in said.splitlines() if line.startswith("sbatch")]
    assert ["partition=transfer" in lines[0], "gres" in lines[0]] == [True, False]
    assert all("--partition=gpu --account=my_account --gres=gpu:a100:1" in line for line in lines[1:7])


def test_page_from_top_to_bottom(cluster: Cluster, prepared: Checkout) -> None:
    """Submit, look, cancel, resume by hand and by command, change: each command does what the page says."""
    (prepared.root / "mysite.yaml").write_text(yaml.safe_dump(SITE))
    dry, submit, local, status, watch, resume, by_hand, stop, move, renamed, discarded = map(_tiny, COMMANDS)
    held = ["scontrol", "update", "PartitionName=aa100"]

    cluster.call(*held, "State=DOWN")
    assert "already complete" in prepared.type(*local)
    assert prepared.type(*dry).count("sbatch --job-name") == 6  # stages 0 and 1 are complete
    assert cluster.states() == {}
    prepared.type(*submit)
    jobs = dict(line.split() for line in cluster.call("squeue", "-h", "-o", "%j %i").splitlines())
    assert len(jobs) == 6
    assert "Watch: bash run_all.sh --watch" in prepared.type(*status)

    prepared.type(*stop)
    cluster.wait(jobs["job_3_monotonic"], "CANCELLED")
    cluster.wait_for(lambda: list(cluster.states().values()).count("CANCELLED") == 5, 30, "what waits does not go with it")
    assert "bash run_all.sh --resume" in prepared.type(*status)
    cluster.call(*held, "State=UP")
    prepared.type(*by_hand)
    cluster.wait(jobs["job_2_baseline"])
    assert prepared.type(*watch, "1").count("All stages are complete") == 1
    cluster.wait_for(lambda: set(cluster.states().values()) == {"COMPLETED", "CANCELLED"}, 30, "the chain does not end")

    cluster.call(*held, "State=DOWN")
    assert "nothing to submit: 8 complete" not in prepared.type(*renamed)
    assert "longer" in prepared.type(*status)
    assert "nothing to submit" in prepared.type(*resume) and "nothing to submit" in prepared.type(*move)
    assert "moved to" in prepared.type(*discarded)


def _tiny(command: str) -> list[str]:
    """The page's command for the smallest experiment."""
    return [word.replace("pythia-1.4b", "tests/tiny.yaml").replace("steps=1600", "steps=16") for word in shlex.split(command)]


def test_page_has_the_known_commands() -> None:
    assert len(COMMANDS) == 11
