"""The attack stages in several processes and in tasks of an array: whoever does the work, and whatever becomes of them, files are the same.

The processes are forked, which spares each of them the seconds that importing torch takes; all else is as launched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Experiment
from stages.pipeline import stages
from utils.attacks import study, worker
from utils.attacks.hotflip import FlipSearch
from utils.attacks.uat import TriggerSearch
from utils.run import launch
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED
from utils.run.launch import of_several
from utils.run.lock import locked
from utils.run.preemption import Stop
from utils.run.stage import run_stage
from utils.run.units import Place

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_sync")]
OUTPUTS = {
    5: ("records.jsonl", "uat_results.json", "learned_triggers.csv"),
    6: ("records.jsonl", "hotflip_results.json"),
}
Fault = Callable[[int], None]  # done in a launched process of this number before its work


class Forked:
    """A child process in place of `subprocess.Popen`."""

    fault: Fault = staticmethod(lambda rank: None)

    def __init__(self, command: list[str], env: dict[str, str], stdout: Any, stderr: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.environ.update(env)
                for stream, number in ((stdout, 1), (stderr, 2)):
                    if stream is not None:
                        os.dup2(stream.fileno(), number)
                type(self).fault(int(env["RANK"]))
                assert command[-2] == "utils.attacks.worker"
                code = of_several(lambda: worker.main(command[-1]))
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.subprocess, "Popen", Forked)
    monkeypatch.setattr(launch, "PATIENCE", 0.1)
    monkeypatch.setattr(launch, "WHEN_TOLD", 0.1)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)


def again(root: Path, number: int, stage_folder: Callable[[Path, int], Path]) -> tuple[Path, dict[str, bytes]]:
    """The stage's folder, emptied, and what was in its outputs."""
    folder = stage_folder(root, number)
    expected = {name: (folder / name).read_bytes() for name in OUTPUTS[number]}
    shutil.rmtree(folder)
    return folder, expected


def found(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS[int(folder.name.split("_")[1])]}


def run(config: Experiment, number: int, count: int, stop: Stop | None = None, task: tuple[int, int] | None = None) -> int:
    several = config.model_copy(update={"attack_workers": config.attack_workers.model_copy(update={"processes": count})})
    return run_stage(stages()[number], several, 42, stages(), stop or Stop(), task=task)


def after(patch: Any, calls: int, act: Callable[[], None], engine: Any = FlipSearch, step: str = "_flip") -> None:
    """Do something in the middle of the work: before this call of the engine's step."""
    real, left = getattr(engine, step), iter(range(calls))

    def counted(*arguments: Any) -> Any:
        if next(left, None) is None:
            act()
        return real(*arguments)

    patch.setattr(engine, step, counted)


def test_flips_by_three_processes_stopped_and_killed(
    finished_copy: Path, tiny: Experiment, stage_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First all are asked to stop, then one is killed in the middle of its work, and with it go the others; then the work is done."""
    folder, expected = again(finished_copy, 6, stage_folder)
    stop = Stop()

    def ask() -> None:
        (folder / "state/asked").touch()

    def watch() -> bool:
        stop.reason = "signal SIGUSR1" if (folder / "state/asked").exists() else None
        return stop.reason is not None

    monkeypatch.setattr(Forked, "fault", staticmethod(lambda rank: after(pytest.MonkeyPatch(), 3, ask) if rank == 1 else None))
    monkeypatch.setattr(stop, "requested", watch)
    assert run(tiny, 6, 3, stop) == STOPPED
    assert "stopped in time (signal SIGUSR1)" in capsys.readouterr().out
    begun = [json.loads(path.read_text())["steps"] for path in (folder / "state/units").glob("*.json")]
    assert begun and min(begun) > 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Forked, "fault", staticmethod(lambda rank: after(pytest.MonkeyPatch(), 4, die) if rank == 2 else None))
    assert run(tiny, 6, 3) == FAILED
    assert "failed: process 2 of 3 ended with code -9" in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()
    monkeypatch.setattr(Forked, "fault", staticmethod(lambda rank: None))
    assert run(tiny, 6, 3) == DONE
    assert found(folder) == expected
    assert not (folder / "state").exists()


def test_triggers_by_two_processes(finished_copy: Path, tiny: Experiment, stage_folder: Any) -> None:
    folder, expected = again(finished_copy, 5, stage_folder)
    assert run(tiny, 5, 2) == DONE
    assert found(folder) == expected
    assert run(tiny, 5, 1) == DONE  # how many did it is nothing that a folder is held to


def test_a_process_that_fails_says_why(
    finished_copy: Path, tiny: Experiment, stage_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again(finished_copy, 6, stage_folder)

    def fail() -> None:
        raise RuntimeError("planted: the second process is broken")

    monkeypatch.setattr(Forked, "fault", staticmethod(lambda rank: after(pytest.MonkeyPatch(), 0, fail) if rank == 1 else None))
    assert run(tiny, 6, 2) == FAILED
    said = capsys.readouterr().err
    assert "failed: process 1 of 2 ended with code 1" in said
    assert "RuntimeError: planted: the second process is broken" in said


def test_tasks_share_the_work_and_the_stage_does_what_they_left(
    finished_copy: Path, tiny: Experiment, stage_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is stopped at once, the second on its way; neither completes the stage, nor is it run meanwhile."""
    folder, expected = again(finished_copy, 5, stage_folder)
    stop = Stop()
    with monkeypatch.context() as patch:
        after(patch, 0, lambda: setattr(stop, "reason", "signal SIGUSR1"), TriggerSearch, "_improve")
        assert run(tiny, 5, 1, stop, task=(0, 2)) == STOPPED
    with monkeypatch.context() as patch:
        stop = Stop()
        after(patch, 9, lambda: setattr(stop, "reason", "signal SIGUSR1"), TriggerSearch, "_improve")
        with locked(folder, shared=True):
            assert run(tiny, 5, 1, task=None) == REFUSED
            assert run(tiny, 5, 1, stop, task=(1, 2)) == STOPPED
    assert "task 2 of 2: search universal adversarial triggers" in capsys.readouterr().out
    begun, done = (len(list((folder / "state/units").glob(pattern))) for pattern in ("*.json", "*.done"))
    assert (begun, done) == (2, 3)
    assert len(json.loads((folder / "started.json").read_text())["starts"]) == 2
    assert not (folder / "records.jsonl").exists()
    assert run(tiny, 5, 1) == DONE
    assert found(folder) == expected
    assert run(tiny, 5, 1, task=(0, 2)) == DONE
    assert "already complete" in capsys.readouterr().out


@pytest.fixture
def flip_study(
    finished: Path, tiny: Experiment, stage_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Any]:
    """A study on a machine with four GPUs, whose work is never done; so many processes are asked for."""
    setup = stage_folder(finished, 0)
    inputs = {"texts": setup / "attack_texts.json", "tokenizer": setup / "tokenizer"}
    files = study.Files({"base": setup / "base_model"}, setup / "earlier_models", setup / "tokens/validation", **inputs, state=tmp_path)
    for module in (study, worker):
        monkeypatch.setattr(module, "device_of", lambda compute: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def make(processes: int) -> worker.FlipStudy:
        workers = tiny.attack_workers.model_copy(update={"processes": processes})
        return worker.FlipStudy(tiny.model_copy(update={"attack_workers": workers}), files)

    return make


@pytest.mark.parametrize(("asked", "launched"), [(0, [4]), (2, [2]), (1, [])])
def test_one_process_for_each_gpu(flip_study: Any, monkeypatch: pytest.MonkeyPatch, asked: int, launched: list[int]) -> None:
    """With one there is nothing to launch."""
    counts: list[int] = []
    monkeypatch.setattr(study, "launch", lambda module, arguments, count, state, stop: counts.append(count))
    monkeypatch.setattr(study.Share, "run", lambda share: None)
    flip_study(asked).work(Stop())
    assert counts == launched


def test_each_process_has_its_own_gpu_and_place(flip_study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second of three tasks, on four GPUs: places 4 to 7 of 12. A task's first process speaks for it."""
    seen: list[Any] = []
    specs: list[str] = []
    monkeypatch.setattr(study, "launch", lambda module, arguments, count, state, stop: specs.extend([*arguments, str(state)]))
    flip_study(0).work(Stop(), 1, 3)
    assert specs == [str(tmp_path / "task_1/processes.json"), str(tmp_path / "task_1")]
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(worker.Share, "run", lambda share: seen.append((share.place, share.speaks, share.stop.path, share.folder)))
    for rank in ("0", "3"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(name, value)
        worker.main(specs[0])
    where = (tmp_path / "task_1/stop", tmp_path / "units")
    assert seen == [0, (Place(4, 12, waits=False), True, *where), 3, (Place(7, 12, waits=False), False, *where)]
