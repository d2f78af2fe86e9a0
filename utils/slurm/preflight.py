"""What would fail hours later in the queue, looked at before anything is submitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from utils.run import hub
from utils.run.checks import Check
from utils.run.places import LOCAL_FILE_SYSTEMS, file_system, free_space, unwritable
from utils.run.stage import Stage
from utils.slurm import client
from utils.slurm.chain import Chain
from utils.slurm.client import SlurmError

FITS_NO_NODE = "Requested node configuration is not available"


def checks(chain: Chain, stages: Sequence[Stage]) -> list[Check]:
    disk = free_space(chain.config, chain.folders)
    return [accepted(chain, stages), *shares(chain, stages), environment(chain), *places(chain), disk, offline(chain, stages)]


def accepted(chain: Chain, stages: Sequence[Stage]) -> Check:
    """Partition, qos, account, GPU, memory and time limit of every script, by `sbatch --test-only`.

    The trial looks only at nodes that are in service; sbatch itself accepts a job for a drained node, to wait there.
    """
    partitions: list[dict[str, str]] = []
    waiting: list[str] = []
    for stage in stages:
        script = chain.script(stage)
        try:
            client.call(
                "sbatch", "--test-only", *chain.options(stage), f"--output={os.devnull}", str(chain.root / script), cwd=str(chain.root)
            )
            partitions = partitions or client.partitions()
            fault = _beyond_limit(chain, stage, partitions)
        except client.NoAnswer:
            raise
        except SlurmError as error:
            fault = "; ".join(line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines())
        if fault and FITS_NO_NODE in fault and (away := client.out_of_service()):
            waiting.append(str(script))
        elif fault:
            return Check(
                "SLURM", "no", f"{script} is not accepted: {fault}. Correct the cluster file (--cluster) or the SBATCH_* variables"
            )
    if waiting:
        return Check(
            "SLURM",
            "warn",
            f"{', '.join(waiting)}: no node in service fits. Out of service: {', '.join(away)} (sinfo -R says why); "
            "if they fit, the jobs wait for them, if not, sbatch refuses",
        )
    return Check("SLURM", "ok", f"{len(stages)} job scripts are accepted by this site")


def _beyond_limit(chain: Chain, stage: Stage, partitions: Sequence[dict[str, str]]) -> str | None:
    """What is wrong with the time asked for. A site that does not enforce the limits of its partitions accepts it, for ever to wait."""
    time, wanted = _asked(chain, stage, "time", "SBATCH_TIMELIMIT"), _asked(chain, stage, "partition", "SBATCH_PARTITION")
    limits = {
        one["PartitionName"]: one.get("MaxTime", "UNLIMITED")
        for one in partitions
        if one["PartitionName"] in (wanted or "").split(",") or (wanted is None and one.get("Default") == "YES")
    }
    if time and limits and all(_minutes(time) > _minutes(limit) for limit in limits.values()):
        return f"it asks for the time {time}, and the limit of the partition is " + ", ".join(f"{limits[name]} ({name})" for name in limits)
    return None


def _asked(chain: Chain, stage: Stage, option: str, variable: str = "") -> str | None:
    """What sbatch will take an option for: the site's file wins over a variable, and that over the script."""
    given = dict(option[2:].split("=", 1) for option in chain.options(stage))
    script = (chain.root / chain.script(stage)).read_text(encoding="utf-8")
    line = re.search(rf"^#SBATCH --{option}=(\S+)", script, re.MULTILINE)
    return given.get(option) or os.environ.get(variable) or (line[1] if line else None)


def _minutes(time: str) -> float:
    """SLURM writes minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds], or a word for no limit."""
    if not (parts := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)):
        return float("inf")
    days, first, second, third = (int(part or 0) for part in parts.groups())
    hours = parts[1] is not None or parts[4] is not None
    return days * 1440 + (first * 60 + second + third / 60 if hours else first + second / 60)


def shares(chain: Chain, stages: Sequence[Stage]) -> list[Check]:
    """The training processes of all nodes can take equal shares of a step, as far as the number of GPUs can be told from here."""
    for stage in stages if chain.config.compute.parallel != "none" else ():
        nodes = int((_asked(chain, stage, "nodes") or "1").partition("-")[0])
        each = chain.config.compute.processes or _gpus(_asked(chain, stage, "gres", "SBATCH_GRES") or "") or 1
        if "training" in stage.config_keys and (fault := chain.config.training.unshared(nodes * each)):
            words = f"{chain.script(stage)}, {nodes} x {each}: {fault} (`nodes` and `gres` in the cluster file, --cluster)"
            return [Check("processes", "no", words)]
    return []


def _gpus(gres: str) -> int:
    """GPUs of gpu:4, gpu:a100:4 or gpu,nvme:1."""
    parts = [part.split(":") for part in gres.split(",")]
    return sum(int(part[-1]) if part[-1].isdigit() else 1 for part in parts if part[0] == "gpu")


def environment(chain: Chain) -> Check:
    """The Python that the jobs will use has the packages, after the site's own shell lines."""
    own = [*chain.cluster.environment, "PYTHON=$(command -v python)"] if chain.cluster.environment else []
    lines = [". jobs/environment.sh", f"PYTHON={shlex.quote(sys.executable)}", *own, 'has_packages "$PYTHON" && echo "$PYTHON"']
    try:
        done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=chain.root, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Check("environment", "no", "the shell lines of `environment` in the cluster file did not end in 120 s")
    if done.returncode:
        said = f" ({done.stderr.strip().splitlines()[-1]})" if done.stderr.strip() else ""
        return Check(
            "environment", "no", f"the jobs' Python lacks packages of requirements.txt{said}; correct `environment` in the cluster file"
        )
    return Check("environment", "ok", f"{done.stdout.strip().splitlines()[-1]} has the packages")


def places(chain: Chain) -> list[Check]:
    """Every folder of the run takes a file, and none is one that only this machine sees."""
    folders = {"paths.work": chain.folders.work, "paths.results": chain.folders.results, "paths.cache": chain.folders.cache}
    faults = [fault for name, path in folders.items() if (fault := unwritable(name, path))]
    if faults:
        return [Check("folders", "no", fault) for fault in faults]
    kinds = {path: file_system(path) for path in (*folders.values(), chain.root)}
    if local := [f"{path} ({kind})" for path, kind in kinds.items() if kind in LOCAL_FILE_SYSTEMS]:
        words = f"often seen by one machine only, jobs on other nodes need shared folders: {', '.join(local)}"
        return [Check("folders", "warn", words)]
    return [Check("folders", "ok", "all can be written and are on " + ", ".join(sorted(set(kinds.values()))))]


def offline(chain: Chain, stages: Sequence[Stage]) -> Check:
    """What stage 0 will fetch is in the local cache already, where its node has no network."""
    first = [stage for stage in stages if stage.number == 0]
    if not first or not hub.wanted(chain.config):
        return Check("network", "ok", "nothing is fetched by these jobs")
    if chain.cluster.network != "none":
        return Check("network", "ok", "stage 0 runs where the network is reached")
    cache = chain.folders.cache
    absent = [str(repository) for repository, patterns in hub.wanted(chain.config) if not hub.is_here(repository, patterns, cache)]
    if absent:
        return Check(
            "network",
            "no",
            f"compute nodes have no network (cluster.network), and the cache lacks files of {', '.join(absent)}; fetch and tokenise here "
            "first: bash run_all.sh --local --to 0 with the same --config",
        )
    return Check("network", "ok", "what stage 0 needs is in the local cache")
