"""What is refused before anything is submitted, and what exactly is submitted; almost no job of these tests ever starts."""

from __future__ import annotations

import getpass
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.slurm.accounting import AccountingCluster, missing_accounting
from tests.slurm.cluster import FAKETIME, Cluster
from tests.slurm.conftest import Checkout, submitted

NOTHING = "nothing was submitted: correct what is marked 'no' above, then type the same command again"


def site(checkout: Checkout, **values: object) -> str:
    """A cluster file that differs from that of the tests in some values."""
    path = checkout.root / "site.yaml"
    path.write_text(yaml.safe_dump({"resources": {"gres": "none", "memory": "4G", "cpus": 2}, "network": "none"} | values))
    return str(path)


def refused(cluster: Cluster, checkout: Checkout, *options: str, **variables: str) -> str:
    """What is said by a call that submits nothing: no job, no snapshot, no mark of a newest run."""
    said = checkout.run_all("--config", "tests/tiny.yaml", *options, code=2, **variables)
    assert cluster.states() == {} and not list(checkout.root.glob("logs/[a-z]*"))
    assert not list(checkout.work.glob("submission/code-*"))
    return said


def test_impossible_requests(cluster: Cluster, checkout: Checkout) -> None:
    """Each is refused with the script, SLURM's words and what to correct. A site that does not enforce time limits does not say it."""
    for values, script, words in (
        ({"resources": {"gres": "gpu:h100:1"}}, "job_1_monotonicity", "Requested node configuration is not available"),
        ({"stages": {"uat": {"memory": "600G"}}}, "job_5_uat", "Requested node configuration is not available"),
        ({"resources": {"partition": "nosuch"}}, "job_0_setup", "invalid partition specified: nosuch"),
        ({"resources": {"constraint": "gpu80"}}, "job_0_setup", "Invalid feature specification"),
        ({"stages": {"train_baseline": {"time": "1-00:01"}}}, "job_2_baseline", "the limit of the partition is 1-00:00:00 (aa100)"),
        ({"stages": {"hotflip": {"partition": "short"}}}, "job_6_hotflip", "asks for the time 12:00:00, and the limit"),
    ):
        said = refused(cluster, checkout, "--cluster", site(checkout, **values))
        (line,) = [line for line in said.splitlines() if line.startswith("  no ")]
        assert f"SLURM: jobs/{script}.sh is not accepted: " in line and words in line
        assert "Correct the cluster file (--cluster) or the SBATCH_* variables" in line and NOTHING in said
    cluster.conf.write_text(cluster.conf.read_text() + "EnforcePartLimits=ALL\n")
    cluster.call("scontrol", "reconfigure")
    said = refused(cluster, checkout, "--cluster", "tests/slurm/site.yaml", SBATCH_PARTITION="short")
    assert "job_0_setup.sh is not accepted: sbatch: allocation failure: Requested time limit is invalid" in said


def test_nodes_out_of_service(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """Before a maintenance all nodes are drained: the run is submitted, with a warning, and runs afterwards."""
    checkout = prepare(6)
    cluster.call("scontrol", "update", f"NodeName={','.join(cluster.nodes)}", "State=DRAIN", "Reason=maintenance")
    said = checkout.submit()
    (line,) = [line for line in said.splitlines() if line.startswith("  warn  SLURM: ")]
    assert "jobs/job_7_aggregate.sh: no node in service fits. Out of service: n1, n2, n3, n4" in line
    (job,) = submitted(said).values()
    assert cluster.states() == {job: "PENDING"}
    cluster.call("scontrol", "update", f"NodeName={','.join(cluster.nodes)}", "State=RESUME")
    assert cluster.wait(job) == "COMPLETED"


@pytest.mark.skipif(bool(missing_accounting()), reason=f"no accounting here: {', '.join(missing_accounting())} (or name $SLURM_ACCOUNTING)")
@pytest.mark.parametrize("cluster", [{"kind": AccountingCluster}], indirect=True)
def test_accounts(cluster: AccountingCluster, prepared: Checkout) -> None:
    """Where SLURM has a database: wrong qos and account are refused; a limit hits in the middle; what squeue forgot is still told."""
    for wrong, words in (("qos", "Invalid qos specification"), ("account", "Invalid account or account/partition combination specified")):
        said = refused(cluster, prepared, "--cluster", site(prepared, resources={wrong: "nosuch"}))
        assert f"jobs/job_2_baseline.sh is not accepted: sbatch: allocation failure: {words}" in said and NOTHING in said
        assert words in refused(cluster, prepared, **{f"SBATCH_{wrong.upper()}": "nosuch"})
    cluster.hold()
    cluster.limit_submissions(4)
    own = site(prepared, resources={"qos": "normal", "gres": "none"})
    said = prepared.submit("--cluster", own, code=1, SBATCH_ACCOUNT="foo")
    assert list(submitted(said)) == [2, 3, 4, 5] and "SLURM refused: sbatch: sbatch: error: AssocMaxSubmitJobLimit" in said
    cluster.limit_submissions(-1)
    jobs = submitted(prepared.run_all("--resume", SBATCH_ACCOUNT="foo"))
    assert list(jobs) == [6, 7] and cluster.show("%a", "-j", jobs[7]) == ["foo"]
    cluster.call("scancel", "--user", getpass.getuser())
    cluster.wait_for(lambda: cluster.states() == {}, 30, "SLURM does not forget")
    said = prepared.run_all("--status", LD_PRELOAD=str(FAKETIME), FAKETIME="+1d")  # the cluster's clock is ahead, and sacct knows no future
    assert said.count(" CANCELLED by ") == 6 and said.endswith("Next: submit what is missing: bash run_all.sh --resume\n")


def test_network_and_environment(cluster: Cluster, checkout: Checkout, tmp_path: Path) -> None:
    """What would fail in the job for want of the network or of Python's packages fails here, and is said."""
    empty = {"HF_HOME": str(tmp_path / "empty")}
    said = refused(cluster, checkout, "--config", "pythia-70m", "--cluster", site(checkout), **empty)
    assert (
        "the cache lacks files of model EleutherAI/pythia-70m@" in said and "bash run_all.sh --local --to 0 with the same --config" in said
    )
    assert "network: stage 0 runs where the network is reached" in checkout.run_all(
        "--config", "pythia-70m", "--cluster", site(checkout, network="setup", environment=["exit 3"]), code=2, **empty
    )
    for line in ("PATH=/nowhere", "module load 'anaconda", "exit 3"):
        said = refused(cluster, checkout, "--cluster", site(checkout, environment=[line]))
        assert "  no    environment: " in said and "correct `environment` in the cluster file" in said and NOTHING in said


def test_variables_and_ranges(cluster: Cluster, prepared: Checkout) -> None:
    """SBATCH_* variables are honoured, the cluster file wins; a range of stages waits for what makes its inputs, without gaps."""
    cluster.hold()
    said = prepared.submit("--from", "4", code=2)
    assert "stage 4 (evaluate) waits for stage 2, neither complete nor queued for seed 42; begin with it: --from 2" in said
    assert "--from 3 comes after --to 2" in prepared.submit("--from", "3", "--to", "2", code=2)
    assert "invalid partition specified: nosuch" in prepared.submit(code=2, SBATCH_PARTITION="nosuch")
    assert cluster.states() == {} and not (prepared.root / "logs/newest_submission").exists()

    plan = prepared.submit("--dry-run", "--to", "3")
    assert cluster.states() == {} and not list(prepared.work.glob("submission/code-*"))
    elsewhere = {"SBATCH_PARTITION": "short", "SBATCH_TIMELIMIT": "5", "SBATCH_JOB_NAME": "mine"}
    first = submitted(prepared.submit("--from", "2", "--to", "2", **elsewhere))
    second = submitted(
        prepared.submit("--from", "3", "--to", "3", "--cluster", site(prepared, resources={"partition": "aa100"}), **elsewhere)
    )
    third = submitted(prepared.submit("--from", "4", "--to", "5"))
    assert [list(jobs) for jobs in (first, second, third)] == [[2], [3], [4, 5]]
    assert "nothing to submit: 0 complete, 2 queued or running" in prepared.submit("--from", "4", "--to", "5")
    assert list(submitted(prepared.submit())) == [6, 7]
    waits = [f"afterok:{first[2]}(unfulfilled),afterok:{second[3]}(unfulfilled)"] * 3
    last = ",".join(f"afterok:{job}(unfulfilled)" for job in cluster.show("%i", "-n", "job_4_evaluate,job_5_uat,job_6_hotflip"))
    assert cluster.show("%E") == ["(null)", "(null)", *waits, last]
    assert cluster.show("%P %l %j")[:3] == ["short 5:00 job_2_baseline", "aa100 5:00 job_3_monotonic", "aa100 8:00:00 job_4_evaluate"]
    lines = [line for line in plan.splitlines() if line.startswith("sbatch ")]
    assert len(lines) == 2 and all("--kill-on-invalid-dep=yes" in line and "--mem=4G --cpus-per-task=2" in line for line in lines)


def test_two_commands_at_the_same_moment(cluster: Cluster, prepared: Checkout) -> None:
    """The chain is submitted once, and both say what happened."""
    cluster.hold()
    command = ["bash", "run_all.sh", "--config", "tests/tiny.yaml", "--cluster", "tests/slurm/site.yaml"]
    both = [
        subprocess.Popen(
            command,
            cwd=prepared.root,
            env=prepared.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = sorted((one.communicate(timeout=60)[0] for one in both), key=len)
    assert sorted(submitted(said[1])) == [2, 3, 4, 5, 6, 7] and submitted(said[0]) == {}
    assert "is at work here; wait for it to end or stop it, then run again" in said[0] or "nothing to submit" in said[0]
    assert len(cluster.states()) == 6
    assert len(json.loads((prepared.work / "submission/jobs.json").read_text())) == 6


def test_another_configuration(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """It is refused by name before anything is touched; with --discard the old folders are moved aside at submission."""
    checkout = prepare(3)
    cluster.hold()
    changed = "--set", "baseline.learning_rate=1e-3", "--to", "4"
    said = checkout.submit(*changed, code=2)
    assert "stage_2_train_baseline holds another experiment" in said and "baseline.learning_rate: 0.003 -> 0.001" in said
    assert "--run-name NAME" in said and "--discard" in said
    assert cluster.states() == {} and not (checkout.work / "submission").joinpath("jobs.json").exists()
    said = checkout.submit(*changed, "--discard")
    (aside,) = checkout.work.glob("seed_42/stage_2_train_baseline.*")
    assert f"moved to {aside}" in said and (aside / "manifest.json").exists()
    assert not list((checkout.work / "seed_42/stage_2_train_baseline").iterdir())
    jobs = submitted(said)
    assert list(jobs) == [2, 4] and cluster.show("%E", "-j", jobs[4]) == [f"afterok:{jobs[2]}(unfulfilled)"]
    assert "nothing to submit: 3 complete, 2 queued or running" in checkout.submit(*changed, "--discard")


def test_seeds_in_another_order(cluster: Cluster, prepare: Callable[..., Checkout]) -> None:
    """Task 0 is then another seed: it waits for the job of its seed, not for the task of its number."""
    checkout = prepare(1, 42, 7)
    cluster.hold()
    first = submitted(checkout.submit("--to", "3", "--seeds", "42,7"))
    said = checkout.submit("--from", "4", "--to", "4", "--seeds", "7,42")
    assert f"stage 4 evaluate, seeds 7, afterok:{first[2]}_1:{first[3]}_1\n" in said
    assert f"stage 4 evaluate, seeds 42, afterok:{first[2]}_0:{first[3]}_0\n" in said
