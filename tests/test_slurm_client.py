"""The SLURM commands as programs on the PATH that print fixed text, hang or fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.slurm import client
from utils.slurm.client import ENDED, SEPARATOR, Job, NoAnswer, SlurmError

Program = Callable[[str, str], None]


@pytest.fixture
def program(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts a shell script on the PATH; what it is called with goes to the file `asked`."""
    folder = own_folders / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, text: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{own_folders}/asked\n{text}\n')
        (folder / name).chmod(0o755)

    return write


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def row(*fields: str) -> str:
    return SEPARATOR.join(fields)


def test_queue_reads_tasks_blanks_and_separators_of_others(program: Program, own_folders: Path) -> None:
    first = row("17_2", "17", "2", "job_2_baseline", "PENDING", "Dependency", "/a b/c,d|e", "/work/my run/submission/code-1|2,3")
    second = row("18", "18", "N/A", "my job", "RUNNING", "None", "/x", "(null)")
    (own_folders / "answer").write_text(f"{first}\n{second}\n")
    program("squeue", f"cat {own_folders}/answer")
    assert client.queue() == [
        Job("17_2", "17", 2, "job_2_baseline", "PENDING", "Dependency", "/a b/c,d|e", "/work/my run/submission/code-1|2,3"),
        Job("18", "18", None, "my job", "RUNNING", "None", "/x", "(null)"),
    ]
    assert asked(own_folders)[:5] == ["--me", "-h", "-r", "-t", "all"]


def test_comment_of_several_lines_on_somebody_elses_job_does_no_harm(program: Program, own_folders: Path) -> None:
    """squeue 22.05 prints it as it is; no comment of ours has a second line."""
    lines = [row("17", "17", "N/A", "other", "RUNNING", "None", "/x", "first"), "second", "", "\udcff"]
    lines += [row("18", "18", "N/A", "job_0_setup", "RUNNING", "None", "/strange\u2028folder", "")]
    (own_folders / "answer").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    program("squeue", f"cat {own_folders}/answer")
    assert [(job.id, job.folder, job.comment) for job in client.queue()] == [("17", "/x", "first"), ("18", "/strange\u2028folder", "")]


@pytest.mark.parametrize(
    ("state", "reason", "live"),
    [
        ("PENDING", "Priority", True),
        ("PENDING", "BeginTime", True),
        ("PENDING", "DependencyNeverSatisfied", False),
        ("RUNNING", "None", True),
        ("COMPLETING", "None", True),
        ("REQUEUED", "None", True),
        *((state, "None", False) for state in sorted(ENDED)),
    ],
)
def test_live_jobs_are_those_that_may_still_do_their_work(state: str, reason: str, live: bool) -> None:
    assert Job("1", "1", None, "job_0_setup", state, reason, "/", "").live is live


def test_command_that_hangs_is_given_up_in_bounded_time(program: Program) -> None:
    program("squeue", "exec sleep 60")
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"squeue gave no answer in 0\.2 s; the SLURM controller may be away"):
        client.queue(seconds=0.2)
    assert time.monotonic() - began < 5


def test_words_of_a_command_that_tries_again_and_again_are_told(program: Program) -> None:
    """sbatch does so for minutes where the site has a limit of jobs in the queue."""
    program("sbatch", "echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' >&2; exec sleep 60")
    with pytest.raises(NoAnswer, match="temporarily unable to accept job"):
        client.call("sbatch", seconds=0.5)


def test_command_whose_child_keeps_the_pipe_open_is_given_up_too(program: Program, own_folders: Path) -> None:
    program("squeue", f"sleep 20 & echo $! >{own_folders}/child; wait")
    began = time.monotonic()
    with pytest.raises(NoAnswer):
        client.queue(seconds=0.5)
    assert time.monotonic() - began < 5
    os.kill(int((own_folders / "child").read_text()), 9)


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "Connection refused",
        "Socket timed out on send/recv operation",
    ],
)
def test_controller_that_is_away_is_told_apart(words: str, program: Program) -> None:
    program("squeue", f"echo '{words}' >&2; exit 1")
    with pytest.raises(NoAnswer) as caught:
        client.queue()
    assert str(caught.value) == f"squeue: {words}"


@pytest.mark.parametrize(
    ("text", "words"),
    [("echo 'Invalid qos' >&2; exit 1", "sbatch: Invalid qos"), ("echo no; exit 3", "sbatch: no"), ("exit 3", "sbatch: exit code 3")],
)
def test_refusal_is_told_in_the_commands_own_words(text: str, words: str, program: Program) -> None:
    program("sbatch", text)
    with pytest.raises(SlurmError) as caught:
        client.submit(["jobs/job_0_setup.sh"])
    assert type(caught.value) is SlurmError
    assert str(caught.value) == words


def test_warning_of_a_command_that_succeeds_is_not_its_answer(program: Program) -> None:
    program("sbatch", "echo 'sbatch: warning: can not contact anybody, Connection refused' >&2; echo 17")
    assert client.submit([]) == "17"


def test_no_slurm_at_all_is_no_answer(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(own_folders))
    with pytest.raises(NoAnswer, match="squeue is not on the PATH"):
        client.queue()


def test_variables_of_the_surrounding_job_are_not_passed_on(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SBATCH_ACCOUNT", "OWN"):
        monkeypatch.setenv(name, "7")
    program("env_of_squeue", "env")
    names = {line.partition("=")[0] for line in client.call("env_of_squeue").splitlines()}
    assert {name for name in names if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert {"SBATCH_ACCOUNT", "OWN", "PATH"} <= names


@pytest.mark.parametrize("answer", ["17", "17;alpine"])
def test_submit_returns_the_id_and_runs_in_the_folder(answer: str, program: Program, own_folders: Path) -> None:
    program("sbatch", f"pwd >{own_folders}/where; echo '{answer}'")
    (own_folders / "checkout").mkdir()
    assert client.submit(["--array=0,2", "a b.sh"], cwd=str(own_folders / "checkout")) == "17"
    assert asked(own_folders) == ["--parsable", "--array=0,2", "a b.sh"]
    assert (own_folders / "where").read_text() == f"{own_folders}/checkout\n"


def test_accounting_is_the_last_state_of_each_job_or_nothing(program: Program, own_folders: Path) -> None:
    assert client.accounting([]) == {}
    program("sacct", "echo '17|TIMEOUT'; echo '18_2|CANCELLED by 0'; echo; echo 'sacct speaks'")
    assert client.accounting(["17", "18_2"]) == {"17": "TIMEOUT", "18_2": "CANCELLED by 0"}
    assert "17,18_2" in asked(own_folders)
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert client.accounting(["17"]) == {}


def test_facts_are_the_words_with_an_equals_sign(program: Program, own_folders: Path) -> None:
    program("scontrol", "echo 'JobId=17 JobName=job_2_baseline JobState=RUNNING Reason=None TimeLimit=1-00:00:00 odd Comment=a=b'")
    facts = client.facts("17")
    assert (facts["JobState"], facts["TimeLimit"], facts["Comment"]) == ("RUNNING", "1-00:00:00", "a=b")
    assert asked(own_folders) == ["-o", "show", "job", "17"]


def test_partitions_are_one_a_line(program: Program, own_folders: Path) -> None:
    program("scontrol", "echo 'PartitionName=a Default=YES MaxTime=1-00:00:00'; echo 'PartitionName=b Default=NO MaxTime=UNLIMITED odd'")
    assert client.partitions() == [
        {"PartitionName": "a", "Default": "YES", "MaxTime": "1-00:00:00"},
        {"PartitionName": "b", "Default": "NO", "MaxTime": "UNLIMITED"},
    ]
    assert asked(own_folders) == ["-o", "show", "partition"]


def test_requeue_update_and_cancel_name_the_job(program: Program, own_folders: Path) -> None:
    program("scontrol", "")
    program("scancel", "")
    client.requeue("17_2")
    assert asked(own_folders) == ["requeue", "17_2"]
    client.update("17_2", Dependency="afterok:18", Comment="/a b")
    assert asked(own_folders) == ["update", "JobId=17_2", "Dependency=afterok:18", "Comment=/a b"]
    client.cancel("17_2")
    assert asked(own_folders) == ["17_2"]


def test_what_a_path_says_of_a_job_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "call", lambda *command: "JobId=17 JobState=RUNNING Reason=None Comment=/a JobState=FAILED/code\n")
    assert client.facts("17")["JobState"] == "RUNNING"
