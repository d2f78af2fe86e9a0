"""Starting several processes: what each is told, how a request to stop reaches them, and what becomes of one that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import Experiment, Monotone, Training
from tests.tiny_models import random_model, write_tokens
from utils.models.loading import save_model
from utils.run import launch
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.launch import StopFile, of_several
from utils.run.preemption import Stop
from utils.training import recovery, worker
from utils.training.recovery import Files, recover


def start(how: str, state: Path, stop: Stop | None = None) -> None:
    launch.launch("tests.fake_process", [how, str(state)], 2, state, stop or Stop())


def test_each_process_knows_its_place(tmp_path: Path) -> None:
    start("0=0", tmp_path)
    assert [(tmp_path / f"seen_{rank}").read_text() for rank in (0, 1)] == ["2 0 127.0.0.1", "2 1 127.0.0.1"]


def test_the_request_to_stop_reaches_all(tmp_path: Path) -> None:
    stop = Stop()
    Timer(0.3, lambda: setattr(stop, "reason", "signal SIGUSR1")).start()
    with pytest.raises(StoppedInTime, match="signal SIGUSR1"):
        start("0=wait,1=wait", tmp_path, stop)
    assert (tmp_path / "process_1.log").read_text().strip() == "signal SIGUSR1"


def test_the_code_is_that_of_the_stages_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the folder that a job stands in: the checkout may have changed since the run was submitted."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/fake_process.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    start("0=0", tmp_path)
    assert (tmp_path / "seen_0").exists()


def test_an_earlier_request_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("signal SIGUSR1")
    start("0=0", tmp_path)
    assert not (tmp_path / "stop").exists()


def test_a_failed_process_ends_the_others_soon_and_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 600.0)
    with pytest.raises(WorkFailed, match=r"^process 1 of 2 ended with code 3: process 1 says why$"):
        start("0=hang,1=3", tmp_path)


@pytest.mark.parametrize("under_way", [False, True])
def test_a_checkpoint_that_is_being_written_is_waited_for(under_way: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WHEN_TOLD", 0.0)
    if under_way:
        (tmp_path / "checkpoints/.tmp-step_00000100").mkdir(parents=True)
    with pytest.raises(WorkFailed, match="process 1 says why"):
        start("0=write,1=3", tmp_path)
    assert (tmp_path / "written").exists() == under_way


def test_one_that_crashed_leaves_the_others_time_to_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.3)
    with pytest.raises(WorkFailed, match=rf"^process 1 of 2 ended with code {launch.CRASHED}: process 1 says why$"):
        start(f"0=hang,1={launch.CRASHED}", tmp_path)


def test_the_one_that_knows_why_is_quoted(tmp_path: Path) -> None:
    """Not the one that crashed because it had lost the other."""
    with pytest.raises(WorkFailed, match=r"^process 1 of 2 ended with code 3: process 1 says why$"):
        start(f"0={launch.CRASHED},1=3", tmp_path)


def test_a_refusal_stays_one(tmp_path: Path) -> None:
    """Whatever the others make of having lost that process."""
    with pytest.raises(InputError, match=r"^process 1 of 2 ended with code 2: process 1 says why$"):
        start(f"0={launch.CRASHED},1={REFUSED}", tmp_path)


def test_the_first_process_speaks_for_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkFailed, match=r"^process 0 of 2 ended with code 1: its messages are above"):
        start("0=1", tmp_path)
    assert "process 0 says why" in capfd.readouterr().err


def test_on_several_nodes_srun_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    ((command, environment),) = launch._commands(["python", "-m", "x"], 4)
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=4"]
    assert command[-3:] == ["python", "-m", "x"]
    assert environment["MASTER_ADDR"] == os.uname().nodename
    assert int(environment["MASTER_PORT"]) > 1023


def test_processes_die_with_the_one_that_keeps_the_books(tmp_path: Path) -> None:
    """Otherwise they would go on writing where its successor writes."""
    child = (
        "import sys, time; from utils.run.preemption import die_with_parent; die_with_parent(); "
        f"open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(600)"
    )
    parent = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        number = int(keeper.stdout.readline())
        until(lambda: (tmp_path / "up").exists())
        keeper.kill()
    until(lambda: not alive(number))


def test_one_whose_parent_died_before_it_could_listen_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    monkeypatch.setattr(launch.signal, "signal", lambda *arguments: None)
    done: list[str] = []
    for parent in (os.getpid(), os.getppid()):
        monkeypatch.setenv("LAUNCHED_BY", str(parent))
        done.append(str(of_several(lambda: done.append("work"))))
    assert done == ["1", "work", "0"]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_stop_file(tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    assert not stop.requested()
    (tmp_path / "stop").write_text("")
    assert stop.requested()
    assert stop.reason == "asked to stop"


@pytest.fixture
def together(tiny: Experiment, tmp_path: Path) -> tuple[Experiment, Files]:
    """A recovery of five steps in two processes."""
    save_model(random_model(seed=1), tmp_path / "base")
    save_model(random_model(seed=0), tmp_path / "start")
    text = [tmp_path / "train", tmp_path / "validation"]
    write_tokens(text[0], 200)
    write_tokens(text[1], 60, seed=1)
    training = Training(steps=5, batch_size=4, micro_batch=2, validate_every=2)
    changes: dict[str, Any] = {"training": training, "compute": tiny.compute.model_copy(update={"parallel": "ddp", "processes": 2})}
    config = tiny.model_copy(update=changes | {"data": tiny.data.model_copy(update={"sequence_length": 8})})
    out = tmp_path / "out"
    names = {name: out / name for name in ("state", "best", "last", "metrics", "history", "certificate")}
    return config, Files(start=tmp_path / "start", base=tmp_path / "base", train_tokens=text[0], validation_tokens=text[1], **names)


@pytest.mark.integration
def test_recovery_in_two_processes(together: tuple[Experiment, Files], tmp_path: Path) -> None:
    """From files to files, with real processes; the books are as after a recovery in one."""
    config, files = together
    recover(config, 3, 2e-2, Monotone(parametrisation="softplus"), files, Stop(), "train")
    history = json.loads(files.history.read_text())
    assert history["val_nll"][-1] < history["val_nll"][0]
    weights = load_file(files.last / "model.safetensors")
    assert all(float(tensor.min()) >= 0 for name, tensor in weights.items() if ".mlp." in name and name.endswith("weight"))
    assert files.certificate is not None
    assert json.loads(files.certificate.read_text())["constraint_holds"] is True
    alone = config.model_copy(update={"compute": config.compute.model_copy(update={"parallel": "none"})})
    places = {name: tmp_path / "alone" / name for name in ("state", "best", "last", "metrics", "history", "certificate")}
    inputs = {name: getattr(files, name) for name in ("start", "base", "train_tokens", "validation_tokens")}
    recover(alone, 3, 2e-2, Monotone(parametrisation="softplus"), Files(**inputs, **places), Stop(), "train")
    expected = json.loads((tmp_path / "alone" / "history").read_text())
    assert history["val_nll"] == pytest.approx(expected["val_nll"], abs=1e-5)
    assert history["train_losses"] == pytest.approx(expected["train_losses"], abs=1e-5)


def test_processes_without_a_checkpoint_are_a_failure(together: tuple[Experiment, Files], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "launch", lambda *arguments: None)
    with pytest.raises(WorkFailed, match="found no intact checkpoint of step 5 after training"):
        recover(together[0], 3, 2e-2, None, together[1], Stop(), "train")


@pytest.mark.parametrize(("device", "processes"), [("cuda", 3), ("cpu", 2)])
def test_a_gpu_for_each_process(together: tuple[Experiment, Files], monkeypatch: pytest.MonkeyPatch, device: str, processes: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config, files = together
    compute = config.compute.model_copy(update={"device": device, "processes": processes})
    with pytest.raises(InputError, match=rf"compute.device={device}: found {processes} processes and 2 GPUs, expected a GPU for each"):
        recover(config.model_copy(update={"compute": compute}), 3, 2e-2, None, files, Stop(), "train")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(None, DONE, "left"), ("WorkFailed('lost')", FAILED, "lost"), ("KeyError(7)", launch.CRASHED, "KeyError: 7")],
)
def test_a_process_that_failed_waits_for_nobody(error: str | None, code: int, said: str) -> None:
    """What libraries have put off until the end of the interpreter would wait for the others."""
    program = (
        "import atexit, sys; from utils.run.launch import end_of_several; from utils.run.errors import WorkFailed\n"
        "atexit.register(lambda: print('left'))\n"
        f"def work():\n    {'pass' if error is None else f'raise {error}'}\n"
        "end_of_several(work)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.returncode == code and said in ended.stdout + ended.stderr
    assert ("left" in ended.stdout) == (error is None)


@pytest.mark.parametrize("error", [None, StoppedInTime("signal"), WorkFailed("lost"), InputError("wrong"), KeyError(7)])
def test_how_a_process_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception | None) -> None:
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    monkeypatch.setattr(launch.signal, "signal", lambda *arguments: None)
    at_once: list[int] = []
    monkeypatch.setattr(launch.os, "_exit", at_once.append)

    def work() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        launch.end_of_several(work)
    code = {type(None): DONE, StoppedInTime: STOPPED, WorkFailed: FAILED, InputError: REFUSED, KeyError: launch.CRASHED}[type(error)]
    assert ended.value.code == code
    assert at_once == ([] if code in (DONE, STOPPED) else [code])
    assert str(error or "") in "".join(capsys.readouterr())


def test_without_gpus_there_is_nothing_to_start(together: tuple[Experiment, Files], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config, files = together
    compute = config.compute.model_copy(update={"processes": 0})
    with pytest.raises(InputError, match=r"compute.parallel=ddp: found no GPU.*or set compute.processes"):
        recover(config.model_copy(update={"compute": compute}), 3, 2e-2, None, files, Stop(), "train")


def test_processes_that_cannot_share_a_step_are_not_started(together: tuple[Experiment, Files], monkeypatch: pytest.MonkeyPatch) -> None:
    """On two nodes there are twice as many, which the configuration cannot know."""
    monkeypatch.setattr(recovery, "launch", lambda *arguments: pytest.fail("started"))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    config, files = together
    with pytest.raises(InputError, match=r"with 6 training processes; expected a multiple of 6"):
        recover(config, 3, 2e-2, None, files, Stop(), "train")


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (StoppedInTime("signal"), 75), (WorkFailed("lost"), 1), (InputError("wrong"), 2)], ids=str
)
def test_a_worker_ends_as_a_stage_does(
    together: tuple[Experiment, Files], error: Exception | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker alone, in this process, up to the training."""
    config, files = together
    monkeypatch.setattr(recovery, "launch", lambda module, arguments, *rest: codes.append(of_several(lambda: worker.main(*arguments))))
    monkeypatch.setattr(launch.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(launch, "die_with_parent", lambda: None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(launch._free_port()))
    codes: list[int] = []
    runs = []

    def train(run: Any) -> None:
        runs.append(run)
        if error is not None:
            raise error

    monkeypatch.setattr(worker, "train", train)
    with pytest.raises(WorkFailed, match="no intact checkpoint"):
        recover(config, 3, 2e-2, Monotone(), files, Stop(), "train")
    assert codes == [code]
    assert (runs[0].world.parallel, runs[0].peak_rate, runs[0].label, runs[0].constraint is None) == ("ddp", 2e-2, "train", False)
    assert (runs[0].teacher is None, runs[0].metrics) == (False, files.metrics)
