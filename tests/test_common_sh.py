"""jobs/common.sh: what a job script does around a stage, run by bash with a small program in Python's place."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.cluster import Cluster
from configs.presets import load
from tests.fake_slurm import SCRIPTS, put
from tests.fake_stages import ROOT, TINY
from utils.slurm.snapshot import Snapshot


def alive(pid: int) -> bool:
    """A zombie that nobody has fetched is not alive."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def soon(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@dataclass
class Job:
    """A job script as SLURM runs it: a copy somewhere, in the folder of the submission, with a name and an id.

    In Python's place is a shell script that notes how it is called, then does what `job` and `requeue` say.
    """

    folder: Path
    name: str = "job_3_monotonic"
    network: str = "setup"
    job: str = "exit 0"
    requeue: str = "exit 75"
    arguments: tuple[str, ...] = ("CODE", "0")
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root, self.code = self.folder / "my checkout's", self.folder / "the code"
        self.root.mkdir()
        shutil.copytree(ROOT / "jobs", self.code / "jobs")
        for path in SCRIPTS:
            shutil.copy(path, self.folder / f"{path.stem}.slurm_script")
        put(self.folder / "bin/nvidia-smi", "exit 9")
        put(self.folder / "bin/squeue", "exit 1")

    def start(self) -> subprocess.Popen[str]:
        python = self.folder / "python"
        notes = f'echo "$4 $5" >>{self.folder}/calls; env >{self.folder}/env_of_$4; pwd >{self.folder}/where'
        calls = f'{notes}; [ "$3" = {shlex.quote(str(self.code))} ] || exit 99'
        put(python, f"{calls}\ncase $4 in\njob | share)\n{self.job}\n;;\nrequeue)\n{self.requeue}\n;;\nesac")
        site = f"root={shlex.quote(str(self.root))}\nnetwork={self.network}\nPYTHON={shlex.quote(str(python))}\n"
        (self.code / "site.sh").write_text(site)
        return self.start_as_it_is()

    def start_as_it_is(self) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        own = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": self.name}
        number = self.name.partition("_")[2][:1]
        script = next(self.folder.glob(f"job_{number}_*.slurm_script"), self.folder / "job_3_monotonic.slurm_script")
        arguments = [str(self.code) if word == "CODE" else word for word in self.arguments]
        return subprocess.Popen(
            ["bash", script, *arguments],
            cwd=self.root,
            env=kept | own | self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        said, _ = process.communicate(timeout=30)
        return process.returncode, said

    def run(self) -> tuple[int, str]:
        return self.end(self.start())

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []

    def environment(self, of: str = "job") -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.folder / f"env_of_{of}").read_text().splitlines() if "=" in line)


@pytest.fixture
def slurm_job(own_folders: Path) -> Iterator[Job]:
    yield Job(own_folders)


LISTENS = """
trap 'echo USR1 >>"$0.signals"; asked=1' USR1
trap 'echo TERM >>"$0.signals"; exit 1' TERM
asked=''
touch "$0.ready"
while [ -z "$asked" ]; do sleep 0.02; done
"""


@pytest.mark.parametrize("code", [0, 1, 2, 99])
def test_exit_code_of_the_stage_is_that_of_the_job(code: int, slurm_job: Job) -> None:
    slurm_job.job = f"exit {code}"
    ended, said = slurm_job.run()
    assert ended == code
    assert slurm_job.calls == ["job 3"]
    assert f"ends with code {code}\n" in said
    assert ("the stage ended with code" in said and "bash run_all.sh --resume" in said) is (code != 0)
    assert (slurm_job.folder / "where").read_text() == f"{slurm_job.root}\n"


@pytest.mark.parametrize("code", [0, 1, 75])
def test_task_of_an_array_that_shares_work_is_never_queued_again(code: int, slurm_job: Job) -> None:
    slurm_job.name, slurm_job.job = "share_5_uat", f"exit {code}"
    ended, said = slurm_job.run()
    assert (ended, slurm_job.calls) == (code, ["share 5"])
    assert ("what it left undone, the stage's own job does" in said) is (code != 0)
    assert "--resume" not in said


@pytest.mark.parametrize("code", [75, 1, 0])
def test_stage_that_stopped_in_time_is_queued_again(code: int, slurm_job: Job) -> None:
    """The code of `requeue` is the job's."""
    slurm_job.job, slurm_job.requeue = "exit 75", f"exit {code}"
    assert slurm_job.run()[0] == code
    assert slurm_job.calls == ["job 3", "requeue 3"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_reaches_the_stage_as_usr1(number: signal.Signals, slurm_job: Job) -> None:
    slurm_job.job = LISTENS + "exit 75"
    process = slurm_job.start()
    soon((slurm_job.folder / "python.ready").exists, "the stage does not start")
    process.send_signal(number)
    code, said = slurm_job.end(process)
    assert code == 75
    assert (slurm_job.folder / "python.signals").read_text() == "USR1\n"
    assert f"signal {number.name.removeprefix('SIG')}: asking the stage to save and stop" in said
    assert slurm_job.calls == ["job 3", "requeue 3"]


def test_further_signals_while_the_stage_saves_do_no_harm(slurm_job: Job) -> None:
    slurm_job.job = LISTENS + 'touch "$0.saving"; for _ in $(seq 20); do sleep 0.02; done; echo saved; exit 75'
    process = slurm_job.start()
    soon((slurm_job.folder / "python.ready").exists, "the stage does not start")
    process.send_signal(signal.SIGUSR1)
    soon((slurm_job.folder / "python.saving").exists, "the stage is not asked")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.03)
    code, said = slurm_job.end(process)
    assert (code, slurm_job.calls) == (75, ["job 3", "requeue 3"])
    assert "saved\n" in said


@pytest.mark.parametrize("code", [0, 1])
def test_stage_that_ends_by_itself_after_the_signal_is_not_queued_again(code: int, slurm_job: Job) -> None:
    slurm_job.job = LISTENS + f"exit {code}"
    process = slurm_job.start()
    soon((slurm_job.folder / "python.ready").exists, "the stage does not start")
    process.send_signal(signal.SIGUSR1)
    assert (slurm_job.end(process)[0], slurm_job.calls) == (code, ["job 3"])


@pytest.mark.parametrize(
    "ends",
    [
        "kill -USR1 $PPID; exec sleep 20",
        "trap '' USR1; kill -TERM $PPID; sleep 0.2; kill -TERM $$",
        "kill -USR1 $PPID $$; sleep 20",  # at the same time: bash loses the code
    ],
)
def test_stage_that_dies_of_the_signal_before_it_listens_was_stopped_in_time(ends: str, slurm_job: Job) -> None:
    slurm_job.job = ends
    code, said = slurm_job.run()
    assert (code, slurm_job.calls) == (75, ["job 3", "requeue 3"]), said


@pytest.mark.parametrize(("ends", "code"), [("kill -USR1 $$", 138), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_stage_that_dies_though_nobody_asked_failed(ends: str, code: int, slurm_job: Job) -> None:
    slurm_job.job = ends
    assert (slurm_job.run()[0], slurm_job.calls) == (code, ["job 3"])


def test_signal_before_the_stage_begins_means_that_it_does_not(slurm_job: Job) -> None:
    put(slurm_job.folder / "bin/nvidia-smi", "kill -USR1 $PPID; exit 9")
    assert (slurm_job.run()[0], slurm_job.calls) == (75, ["requeue 3"])


def test_way_back_into_the_queue_is_not_cut_short_by_a_signal(slurm_job: Job) -> None:
    slurm_job.job, slurm_job.requeue = "exit 75", "kill -USR1 $PPID; kill -TERM $PPID; kill -USR1 $$; sleep 0.05; echo survived; exit 75"
    code, said = slurm_job.run()
    assert code == 75 and "survived" in said


# --- refusals


@pytest.mark.parametrize("name", ["", "my_name", "job_8_more", "job_3"])
def test_job_under_another_name_is_refused(name: str, slurm_job: Job) -> None:
    slurm_job.name = name
    code, said = slurm_job.run()
    assert (code, slurm_job.calls) == (2, [])
    assert f"found the job name '{name}', expected that of the script (job_2_baseline): submit without --job-name" in said


def test_code_without_site_is_refused(slurm_job: Job) -> None:
    code, said = slurm_job.end(slurm_job.start_as_it_is())
    assert code == 2
    assert f"{slurm_job.code} holds no site.sh: submit the run with 'bash run_all.sh' first" in said


def test_checkout_that_is_gone_is_refused(slurm_job: Job) -> None:
    process = slurm_job.start()
    slurm_job.end(process)
    (slurm_job.code / "site.sh").write_text("root=/no/such/folder\nPYTHON=true\n")
    code, said = slurm_job.end(slurm_job.start_as_it_is())
    assert code == 2 and "/no/such/folder: No such file" in said


def test_by_hand_without_a_submitted_run_is_refused(slurm_job: Job) -> None:
    slurm_job.arguments = ()
    code, said = slurm_job.run()
    assert (code, slurm_job.calls) == (2, [])
    assert f"no run was submitted from {slurm_job.root}: type 'bash run_all.sh' there first" in said


# --- the stage's surroundings


@pytest.mark.parametrize(("arguments", "restarts"), [((), ""), (("CODE", "0"), "0"), (("CODE", "4"), "4")])
def test_stage_knows_whether_it_was_submitted_by_hand(arguments: tuple[str, ...], restarts: str, slurm_job: Job) -> None:
    (slurm_job.root / "logs").mkdir()
    (slurm_job.root / "logs/newest_submission").write_text(f"{slurm_job.code}\n")
    slurm_job.arguments = arguments
    assert (slurm_job.run()[0], slurm_job.calls) == (0, ["job 3"])
    assert slurm_job.environment()["JOB_RESTARTS"] == restarts


@pytest.mark.parametrize(
    ("network", "name", "offline"),
    [
        ("none", "job_0_setup", True),
        ("none", "job_5_uat", True),
        ("setup", "job_0_setup", False),
        ("setup", "job_5_uat", True),
        ("all", "job_0_setup", False),
        ("all", "job_7_aggregate", False),
    ],
)
def test_nothing_is_asked_of_the_network_where_there_is_none(network: str, name: str, offline: bool, slurm_job: Job) -> None:
    slurm_job.network, slurm_job.name = network, name
    assert slurm_job.run()[0] == 0
    assert slurm_job.calls == [f"job {name[4]}"]
    switches = {key: slurm_job.environment().get(key) for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    assert set(switches.values()) == ({"1"} if offline else {None})
    assert slurm_job.environment()["PYTHONUNBUFFERED"] == "1"


@pytest.mark.parametrize(
    ("given", "answer", "end"),
    [
        ({"SLURM_JOB_END_TIME": "123"}, "echo 2030-01-01T00:00:00", "123"),
        ({"TZ": "UTC"}, "echo 2030-01-01T00:00:00", "1893456000"),
        ({}, "echo N/A", ""),
        ({}, "exit 1", None),
    ],
)
def test_end_of_the_job_is_asked_for_where_slurm_does_not_tell(given: dict[str, str], answer: str, end: str | None, slurm_job: Job) -> None:
    put(slurm_job.folder / "bin/squeue", answer)
    slurm_job.variables = given
    assert slurm_job.run()[0] == 0
    assert slurm_job.environment().get("SLURM_JOB_END_TIME") == end


def test_first_line_of_the_log_says_which_job_it_is(slurm_job: Job) -> None:
    slurm_job.variables = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "3"}
    said = slurm_job.run()[1].splitlines()
    assert "job_3_monotonic, job 17 (task 2 of array 12) on " in said[0] and "restarts 3, ends at an unknown time" in said[0]
    assert "no NVIDIA GPU visible here" in said[1]


NVIDIA = """
case $* in
    *--loop=*) echo "$*" >>"$0.asked"; echo $$ >"$0.pid"; echo 'timestamp, utilization.gpu [%]'; echo '2026/01/01, 97'; exec sleep 60 ;;
    *name*) echo 'NVIDIA A100-SXM4-80GB, 550.54, 81920 MiB, 3 MiB' ;;
esac
"""


@pytest.mark.parametrize("ends", ["exit 0", "exit 1", "exit 75", "kill -TERM $PPID; exec sleep 20"])
def test_gpu_is_named_and_sampled_until_the_stage_ends(ends: str, slurm_job: Job) -> None:
    put(slurm_job.folder / "bin/nvidia-smi", NVIDIA)
    slurm_job.variables = {"GPU_LOG_SECONDS": "7"}
    slurm_job.job = f"until [ -s logs/gpu_job_3_monotonic_17.csv ]; do sleep 0.02; done; {ends}"
    said = slurm_job.run()[1]
    assert "    GPU (name, driver, memory, used at start): NVIDIA A100-SXM4-80GB, 550.54, 81920 MiB, 3 MiB\n" in said
    assert (slurm_job.root / "logs/gpu_job_3_monotonic_17.csv").read_text().splitlines()[-1] == "2026/01/01, 97"
    assert "--loop=7" in (slurm_job.folder / "bin/nvidia-smi.asked").read_text()
    sampler = int((slurm_job.folder / "bin/nvidia-smi.pid").read_text())
    soon(lambda: not alive(sampler), "the sampler is left behind")


def test_real_program_is_reached_in_the_frozen_code(own_folders: Path) -> None:
    """The last stage refuses for want of its inputs; the code in the checkout is another one and is not used."""
    job = Job(own_folders, name="job_7_aggregate")
    (job.root / "stages").mkdir()
    (job.root / "stages/__main__.py").write_text("raise SystemExit(99)")
    frozen = Snapshot.of(ROOT, load(TINY), Cluster(), sys.executable)
    frozen.write()
    job.code = frozen.folder
    site = (frozen.folder / "site.sh").read_text().replace(f"root={ROOT}", f"root={shlex.quote(str(job.root))}")
    (frozen.folder / "site.sh").write_text(site)
    code, said = job.end(job.start_as_it_is())
    assert code == 2, said
    assert "[stage 7 aggregate] refused: the input" in said, said
