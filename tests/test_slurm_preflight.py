"""Looked at before anything is submitted: each check found good, and found wanting."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.cluster import Cluster, Resources
from stages.pipeline import stages
from tests.fake_slurm import FakeSlurm, make_chain, small_checkout
from utils.run.checks import Check
from utils.slurm import preflight
from utils.slurm.chain import Chain
from utils.slurm.client import NoAnswer

STAGES = stages()
STUDY = ("model={source: pretrained, name: EleutherAI/pythia-1.4b}",)
PILE = (
    "data={source: files, sequence_length: 8, train_tokens: 100, validation_tokens: 100, test_tokens: 100, files: "
    + json.dumps({split: [f"hf://datasets/some/pile/{name}.zst"] for split, name in (("train", "a"), ("validation", "b"), ("test", "c"))})
    + "}"
)


@pytest.fixture
def root(own_folders: Path) -> Path:
    return small_checkout(own_folders / "checkout")


@pytest.fixture
def chain(root: Path) -> Chain:
    return make_chain(root)


def test_checks_of_a_good_site(chain: Chain, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]) -> None:
    monkeypatch.setattr(preflight, "LOCAL_FILE_SYSTEMS", set())
    free(5)
    found = preflight.checks(chain, STAGES)
    assert [(one.name, one.verdict) for one in found] == [(name, "ok") for name in ("SLURM", "environment", "folders", "disk", "network")]
    assert slurm.jobs == {}


# --- SLURM


def test_every_script_is_shown_to_slurm_with_the_sites_options(root: Path, slurm: FakeSlurm) -> None:
    chain = make_chain(root, cluster=Cluster(resources=Resources(partition="aa100", gres="gpu:2")))
    assert preflight.accepted(chain, STAGES[1:3]) == Check("SLURM", "ok", "2 job scripts are accepted by this site")
    assert slurm.said("sbatch") == [
        f"sbatch --test-only --partition=aa100 --gres=gpu:2 --output=/dev/null {root}/jobs/{name}.sh"
        for name in ("job_1_monotonicity", "job_2_baseline")
    ]


def test_script_that_is_not_accepted_is_named_with_slurms_words(chain: Chain, slurm: FakeSlurm) -> None:
    slurm.refuses[f"sbatch --test-only --output=/dev/null {chain.root}/jobs/job_2"] = (
        "\nsbatch: error: invalid partition\nallocation failure"
    )
    check = preflight.accepted(chain, STAGES)
    assert (check.verdict, check.name) == ("no", "SLURM")
    assert check.words == (
        "jobs/job_2_baseline.sh is not accepted: sbatch:; invalid partition; allocation failure. "
        "Correct the cluster file (--cluster) or the SBATCH_* variables"
    )


def test_script_that_only_nodes_out_of_service_fit_is_a_warning(chain: Chain, slurm: FakeSlurm) -> None:
    slurm.refuses["sbatch --test-only"] = "allocation failure: Requested node configuration is not available"
    assert preflight.accepted(chain, STAGES[2:3]).verdict == "no"
    slurm.out_of_service = ["n2", "n1", "n2"]
    assert preflight.accepted(chain, STAGES[2:3]) == Check(
        "SLURM",
        "warn",
        "jobs/job_2_baseline.sh: no node in service fits. Out of service: n1, n2 (sinfo -R says why); "
        "if they fit, the jobs wait for them, if not, sbatch refuses",
    )
    slurm.refuses["sbatch --test-only"] = "invalid partition"
    assert preflight.accepted(chain, STAGES[2:3]).verdict == "no"


def test_controller_that_is_away_is_no_verdict(chain: Chain, slurm: FakeSlurm) -> None:
    slurm.away = True
    with pytest.raises(NoAnswer):
        preflight.accepted(chain, STAGES)


@pytest.mark.parametrize(
    ("partition", "time", "variables", "told"),
    [
        (None, None, {}, "24:00:00, and the limit of the partition is 12:00:00 (day)"),  # the script's own, on the default partition
        ("week", None, {}, ""),
        ("week", "7-00:00:01", {}, "7-00:00:01, and the limit of the partition is 7-00:00:00 (week)"),
        ("week", "7-0", {}, ""),
        ("free", "UNLIMITED", {}, ""),
        ("day", "UNLIMITED", {}, "UNLIMITED, and the limit of the partition is 12:00:00 (day)"),
        ("day,week", None, {}, ""),
        ("day", "721", {}, "721, and the limit of the partition is 12:00:00 (day)"),
        ("unknown", None, {}, ""),
        (None, None, {"SBATCH_PARTITION": "week"}, ""),
        (None, None, {"SBATCH_TIMELIMIT": "720"}, ""),
        ("day", "60", {"SBATCH_PARTITION": "week", "SBATCH_TIMELIMIT": "900"}, ""),  # an option wins over a variable
    ],
)
def test_time_beyond_the_partitions_limit_is_told_though_sbatch_accepts_it(
    partition: str | None,
    time: str | None,
    variables: dict[str, str],
    told: str,
    root: Path,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm.limits = {"day": "12:00:00", "week": "7-00:00:00", "free": "UNLIMITED"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chain = make_chain(root, cluster=Cluster(resources=Resources(partition=partition, time=time)))
    check = preflight.accepted(chain, [STAGES[2]])
    assert check.verdict == ("no" if told else "ok"), check
    assert told in check.words


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("1:30", 1.5), ("24:00:00", 1440), ("2-12", 3600), ("1-02:03", 1563), ("1-00:00:30", 1440.5), ("INFINITE", float("inf"))],
)
def test_times_are_read_as_slurm_writes_them(time: str, minutes: float) -> None:
    assert preflight._minutes(time) == minutes


# --- processes


@pytest.mark.parametrize(
    ("overrides", "resources", "told"),
    [
        (["compute.processes=2"], {"nodes": 3}, "jobs/job_2_baseline.sh, 3 x 2: training.batch_size=8 with 6 training processes"),
        (["compute.processes=2"], {"nodes": 2}, ""),
        (["compute.processes=0"], {"gres": "gpu:a100:3"}, "jobs/job_2_baseline.sh, 1 x 3: training.batch_size=8 with 3"),
        (["compute.processes=0"], {"gres": "nvme:3,gpu:1g.5gb:4"}, ""),
        (["compute.processes=0"], {"gres": "none", "nodes": 3}, "3 x 1"),
        (["compute.processes=0"], {}, ""),
        (["compute.processes=2", "training.micro_batch=4"], {"nodes": 2}, "4 training processes, each of which takes 2 sequences"),
        (["compute.parallel=none"], {"nodes": 3}, ""),
    ],
)
def test_processes_that_cannot_share_a_step_are_told(root: Path, overrides: list[str], resources: dict[str, Any], told: str) -> None:
    chain = make_chain(
        root, "compute.parallel=ddp", "training.micro_batch=auto", *overrides, cluster=Cluster(resources=Resources(**resources))
    )
    found = preflight.shares(chain, STAGES)
    assert [check.verdict for check in found] == (["no"] if told else [])
    assert told in "".join(check.words for check in found)
    assert preflight.shares(chain, STAGES[4:]) == []


def test_gpus_may_be_asked_for_by_a_variable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_GRES", "gpu:3")
    assert "1 x 3" in preflight.shares(make_chain(root, "compute.parallel=ddp"), STAGES)[0].words


# --- environment


def test_environment_of_this_process_has_the_packages(chain: Chain) -> None:
    check = preflight.environment(chain)
    assert check.verdict == "ok" and check.words.endswith("python has the packages")


def wrong_python(folder: Path) -> str:
    """A shell line that puts a Python without packages first."""
    (folder / "bin").mkdir()
    (folder / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin/python").chmod(0o755)
    return f"PATH={folder}/bin:$PATH"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("WRONG", ""),
        ("echo loading >&2; echo 'no module named cuda' >&2; WRONG", " (no module named cuda)"),
        ("exit 3", ""),
        ("source /no/such/conda.sh || exit 1", " (bash: line 3: /no/such/conda.sh: No such file or directory)"),
    ],
)
def test_shell_lines_that_fail_are_told(line: str, said: str, root: Path, own_folders: Path) -> None:
    line = line.replace("WRONG", wrong_python(own_folders))
    check = preflight.environment(make_chain(root, cluster=Cluster(environment=(line,))))
    assert check.verdict == "no"
    assert check.words == f"the jobs' Python lacks packages of requirements.txt{said}; correct `environment` in the cluster file"


def test_shell_lines_that_chatter_are_fine(root: Path) -> None:
    check = preflight.environment(
        make_chain(root, cluster=Cluster(environment=(f"PATH={Path(sys.executable).parent}:$PATH", "echo loaded")))
    )
    assert check.verdict == "ok" and "loaded" not in check.words


def test_shell_lines_that_hang_are_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *rest, **options: run(*rest, **options | {"timeout": 0.1}))
    check = preflight.environment(make_chain(root, cluster=Cluster(environment=("exec sleep 60",))))
    assert check.verdict == "no" and "did not end in 120 s" in check.words


# --- folders


def test_folder_that_cannot_be_written_is_named_with_its_key(root: Path, own_folders: Path) -> None:
    (own_folders / "file").write_text("")
    chain = make_chain(root, f"paths.results={own_folders}/file/results", f"paths.cache={own_folders}/file")
    first, second = preflight.places(chain)
    assert first.verdict == second.verdict == "no"
    words = f"{own_folders}/file/results cannot be written: Not a directory; choose another folder (paths.results, $SCRATCH, $PROJECT)"
    assert first.words == words
    assert second.words.startswith(f"{own_folders}/file cannot be written: File exists; choose another folder (paths.cache")


def test_probe_leaves_nothing_behind(chain: Chain) -> None:
    preflight.places(chain)
    assert [list(folder.iterdir()) for folder in (chain.folders.work, chain.folders.results, chain.folders.cache)] == [[], [], []]


def test_local_file_system_is_warned_of(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {chain.folders.work: "lustre", chain.folders.results: "nfs4", chain.folders.cache: "lustre", chain.root: "ext4"}
    monkeypatch.setattr(preflight, "file_system", kinds.get)
    (check,) = preflight.places(chain)
    assert check == Check(
        "folders", "warn", f"often seen by one machine only, jobs on other nodes need shared folders: {chain.root} (ext4)"
    )
    kinds[chain.root] = "beegfs"
    assert preflight.places(chain) == [Check("folders", "ok", "all can be written and are on beegfs, lustre, nfs4")]


# --- network


@pytest.fixture
def hub_cache(own_folders: Path) -> Path:
    return own_folders / "scratch/foundation_llm_cache/hub"


def cached(hub: Path, kind: str, repository: str, *files: str) -> None:
    folder = hub / f"{kind}s--{repository.replace('/', '--')}"
    for place in ("refs", "snapshots/0123abcd"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("0123abcd")
    for name in files:
        (folder / "snapshots/0123abcd" / name).write_text("{}")


def test_setup_without_network_needs_a_filled_cache(root: Path, hub_cache: Path) -> None:
    chain = make_chain(root, "model.scratch=null", *STUDY, PILE, cluster=Cluster(network="none"))
    cached(hub_cache, "dataset", "some/pile", "a.zst", "b.zst")
    check = preflight.offline(chain, STAGES)
    assert check.verdict == "no"
    lacking = "the cache lacks files of model EleutherAI/pythia-1.4b@main, dataset some/pile@main; fetch and tokenise here first"
    assert lacking in check.words
    cached(hub_cache, "dataset", "some/pile", "c.zst")
    cached(hub_cache, "model", "EleutherAI/pythia-1.4b", "config.json", "model.safetensors", "tokenizer.json")
    assert preflight.offline(chain, STAGES) == Check("network", "ok", "what stage 0 needs is in the local cache")
    other = make_chain(root, "model.scratch=null", *STUDY, "model.revision=step1", cluster=chain.cluster)
    assert preflight.offline(other, STAGES).verdict == "no"


def test_network_matters_to_setup_alone(root: Path, hub_cache: Path) -> None:
    study = ("model.scratch=null", *STUDY)
    offline = Cluster(network="none")
    nothing = Check("network", "ok", "nothing is fetched by these jobs")
    assert preflight.offline(make_chain(root, *study, cluster=offline), STAGES[1:]) == nothing
    assert preflight.offline(make_chain(root, cluster=offline), STAGES) == nothing
    reached = Check("network", "ok", "stage 0 runs where the network is reached")
    assert preflight.offline(make_chain(root, *study), STAGES) == reached
    assert preflight.offline(make_chain(root, *study, cluster=Cluster(network="all")), STAGES) == reached


def test_model_in_a_folder_is_not_fetched(root: Path, own_folders: Path, hub_cache: Path) -> None:
    chain = make_chain(root, "model.scratch=null", "model.source=pretrained", f"model.name={own_folders}", cluster=Cluster(network="none"))
    assert preflight.offline(chain, STAGES).words == "nothing is fetched by these jobs"
