"""A whole chain on a real cluster: two seeds from one command, in folders with difficult names, while the checkout is edited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.fake_stages import ROOT
from tests.killing import differing, results
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout, make_checkout, submitted

SITE = """
resources: {gres: none, memory: 4G, cpus: 2}
network: none
environment: ['trap ''env > "${root:-$PWD}/logs/env_${SLURM_JOB_ID:-none}.txt"'' EXIT']
"""
SEEDS = "42,1337"


def git(checkout: Checkout, *arguments: str) -> str:
    return checkout.type("git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments).strip()


def edit(checkout: Checkout) -> None:
    """What a user may do while the chain is on its way: break a job, a stage and the experiment."""
    for name, text in (("jobs/common.sh", "exit 9\n"), ("stages/stage_3_train_monotonic.py", "\ndef run(ctx): raise SystemExit(9)\n\n")):
        path = checkout.root / name
        path.write_text(path.read_text().replace("STAGE = Stage(", f"{text}STAGE = Stage(") if name.endswith("py") else text)
    path = checkout.root / "tests/tiny.yaml"
    path.write_text(path.read_text().replace("steps: 12", "steps: 13"))


def test_two_seeds_from_one_command(cluster: Cluster, two_seeds: Path, own_folders: Path, tmp_path: Path) -> None:
    """Everything a user sees from the command to the summary; the results are those of a local run, byte for byte."""
    folders = own_folders / 'Zoë\'s  "runs"'
    checkout = make_checkout(folders / "check out", cluster, folders)
    shutil.copy(ROOT / ".gitignore", checkout.root)
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "as submitted")
    revision = git(checkout, "rev-parse", "HEAD")
    (tmp_path / "site.yaml").write_text(SITE)
    command = "--config", "tests/tiny.yaml", "--seeds", SEEDS, "--run-name", "two-seeds", "--cluster", str(tmp_path / "site.yaml")

    cluster.hold()
    said = checkout.run_all(*command)
    jobs = submitted(said)
    assert list(jobs) == list(range(8))
    assert f"  job {jobs[0]}: stage 0 setup, seeds {SEEDS}\n" in said
    assert f"stage 4 evaluate, seeds {SEEDS}, aftercorr:{jobs[2]},aftercorr:{jobs[3]}\n" in said
    assert f"stage 7 aggregate, afterany:{jobs[4]}_0:{jobs[4]}_1:{jobs[5]}_0:{jobs[5]}_1:{jobs[6]}_0:{jobs[6]}_1\n" in said
    assert "nothing to submit: 0 complete, 15 queued or running" in checkout.run_all(*command)
    edit(checkout)
    cluster.release()

    cluster.wait(f"{jobs[2]}_0", "RUNNING", "COMPLETED")
    middle = checkout.run_all("--status")
    table = {tuple(line.split()[:3:2]): line for line in middle.splitlines() if line[2:3].isdigit()}
    assert " complete " in table["0", "42"] and f" {jobs[0]}_0 " in table["0", "42"] and table["0", "42"].endswith("COMPLETED")
    assert table["7", "all"].split()[3:] == ["not", "begun", jobs[7], "PENDING", "(Dependency)"]
    assert " RUNNING" in middle and "Next: nothing to do, the jobs go on by themselves. Watch: bash run_all.sh --watch" in middle
    assert "nothing to submit" in checkout.run_all("--resume") and len(cluster.states()) == 15

    cluster.wait(jobs[7], "RUNNING", "COMPLETED")
    watched = checkout.run_all("--watch", "1")
    assert cluster.wait(jobs[7]) == "COMPLETED" and list(cluster.states().values()) == ["COMPLETED"] * 15
    ended = checkout.run_all("--status")
    assert ended.count(" COMPLETED") == 15
    for said in (watched[watched.rindex("run two-seeds in") :], ended):
        assert said.count(" complete ") == 15
        last = said.splitlines()[-1]
        assert last.startswith("All stages are complete. Open /") and Path(last.partition("Open ")[2]).is_file()
    git(checkout, "checkout", "--quiet", ".")
    assert "nothing to submit: 15 complete, 0 queued or running" in checkout.run_all(*command)

    for part in ("scratch", "project"):
        differ = differing(results(two_seeds / part), results(folders / part))
        assert [name for name in differ if "/submission/" not in name] == (
            [] if part == "scratch" else ["foundation_llm_final_results/two-seeds/resolved_config.json"]  # it holds the folders
        )
    notes = [json.loads(path.read_text()) for path in folders.rglob("started.json")]
    assert len(notes) == 15
    assert {(len(one["starts"]), one["starts"][0]["code_revision"]) for one in notes} == {(1, revision)}
    logs = sorted(path.name for path in (checkout.root / "logs").glob("*.out"))
    assert [f"job_2_baseline_{jobs[2]}_{task}.out" in logs for task in (0, 1)] == [True, True] and len(logs) == 15
    variables = [path.read_text().splitlines() for path in (checkout.root / "logs").glob("env_[0-9]*.txt")]
    assert len(variables) == 15 and all("HF_HUB_OFFLINE=1" in lines and "JOB_RESTARTS=0" in lines for lines in variables)
