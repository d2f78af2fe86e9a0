"""The SLURM commands that are used, with time limits and errors in words. A controller that is away makes them hang."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
SEPARATOR = "\x1f"
FIELDS = "%i", "%F", "%K", "%j", "%T", "%r", "%Z", "%k"


class SlurmError(RuntimeError):
    """A SLURM command failed or did not answer; the message holds its own words."""


class NoAnswer(SlurmError):
    """The controller is away, or there is no SLURM on this machine."""


@dataclass(frozen=True)
class Job:
    """One job or one task of an array, as squeue shows it. `id` is 17, or 17_2 for task 2 of array 17."""

    id: str
    array: str
    task: int | None
    name: str
    state: str
    reason: str
    folder: str
    comment: str

    @property
    def live(self) -> bool:
        """Waiting, running, or on its way back into the queue; not one that waits for what can never be."""
        return self.state not in ENDED and self.reason != "DependencyNeverSatisfied"


def call(*command: str, seconds: float = 60.0, cwd: str | None = None) -> str:
    """Standard output of a SLURM command. Raises NoAnswer or SlurmError.

    The variables of a job that calls are left out: a new job would take an array's task number, say, for its own.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment, cwd=cwd)
    except FileNotFoundError:
        raise NoAnswer(f"{command[0]} is not on the PATH") from None
    except subprocess.TimeoutExpired as late:
        said = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else late.stderr or ""
        words = f" ({said.strip().splitlines()[-1]})" if said.strip() else ""
        raise NoAnswer(f"{command[0]} gave no answer in {seconds:g} s; the SLURM controller may be away, try again later{words}") from None
    words = done.stderr.strip() or done.stdout.strip()
    if done.returncode and any(sign in words for sign in ("Unable to contact", "Zero Bytes", "Connection refused", "Socket timed out")):
        raise NoAnswer(f"{command[0]}: {words}")
    if done.returncode:
        raise SlurmError(f"{command[0]}: {words or f'exit code {done.returncode}'}")
    return done.stdout


def submit(options: Sequence[str], cwd: str | None = None) -> str:
    """sbatch; returns the job's id."""
    return call("sbatch", "--parsable", *options, cwd=cwd).strip().split(";")[0]


def queue(seconds: float = 60.0) -> list[Job]:
    """Own jobs that SLURM remembers: live ones, and for some minutes those that have ended."""
    found = []
    for line in call("squeue", "--me", "-h", "-r", "-t", "all", "-o", SEPARATOR.join(FIELDS), seconds=seconds).split("\n"):
        fields = line.split(SEPARATOR, len(FIELDS) - 1)
        if len(fields) < len(FIELDS):
            continue  # the last one, or a further line of another job's comment
        identifier, array, task, name, state, reason, folder, comment = fields
        found.append(Job(identifier, array, int(task) if task.isdigit() else None, name, state, reason, folder, comment))
    return found


def accounting(ids: Sequence[str], seconds: float = 60.0) -> dict[str, str]:
    """{job id: last state} from the accounting database; empty where there is none."""
    if not ids:
        return {}
    try:
        lines = call("sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID,State", seconds=seconds).splitlines()
    except SlurmError:
        return {}
    return dict(line.split("|", 1) for line in lines if "|" in line)


def facts(job: str) -> dict[str, str]:
    """What scontrol shows of one job: JobState, Reason, TimeLimit and so on."""
    return _words(call("scontrol", "-o", "show", "job", job))


def partitions() -> list[dict[str, str]]:
    """What scontrol shows of each partition: PartitionName, Default, MaxTime and so on."""
    return [_words(line) for line in call("scontrol", "-o", "show", "partition").splitlines()]


def out_of_service() -> list[str]:
    """Nodes that are drained, down, in maintenance, or not yet heard of since the controller started."""
    return sorted(set(call("sinfo", "-h", "-N", "-t", "down,drain,fail,maint,unknown", "-o", "%N").split()))


def _words(line: str) -> dict[str, str]:
    """The Name=value words of one line of scontrol. The first of a name counts: paths and comments, which the user may name, come last."""
    return dict(reversed([word.split("=", 1) for word in line.split() if "=" in word]))


def requeue(job: str) -> None:
    """Put a job back into the queue under its id. SLURM then ends the job's processes, this one too."""
    call("scontrol", "requeue", job)


def update(job: str, **fields: str) -> None:
    """scontrol update, for example Dependency or Comment."""
    call("scontrol", "update", f"JobId={job}", *(f"{name}={value}" for name, value in fields.items()))


def cancel(job: str) -> None:
    call("scancel", job)
