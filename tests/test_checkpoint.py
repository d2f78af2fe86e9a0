"""Checkpoints: whole or not at all, damaged ones named and passed over, the needed ones kept."""

from __future__ import annotations

from concurrent.futures import wait
from contextlib import closing, nullcontext
from pathlib import Path
from threading import Event, Timer
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import torch
from torch import Tensor

from utils.run.errors import InputError
from utils.training import checkpoint
from utils.training.checkpoint import Checkpoints, Snapshot, TrainState


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(4.0) + step}


def moments(step: int) -> dict[str, Tensor]:
    return {"weight.exp_avg": torch.full((3, 2), -float(step)), "weight.exp_avg_sq": torch.full((3, 2), 2.0 * step)}


def saved(folder: Path, steps: dict[int, int], keep_last: int = 9) -> Checkpoints:
    """Checkpoints of {step: best step so far}."""
    checkpoints = Checkpoints(folder, keep_last)
    for step, best in steps.items():
        state = TrainState(step=step, metrics_bytes=10 * step, best_step=best, best_nll=1 / (1 + best), seconds=0.5, resumed_at=[1])
        checkpoints.save(state, tensors(step), moments(step))
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_there(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2).newest() is None


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, {4: 4, 8: 4})
    state = checkpoints.newest()
    assert state == TrainState(step=8, metrics_bytes=80, best_step=4, best_nll=0.2, seconds=0.5, resumed_at=[1])
    assert all(torch.equal(tensor, tensors(8)[name]) for name, tensor in checkpoints.model_tensors(8).items())
    assert all(torch.equal(tensor, moments(4)[name]) for name, tensor in checkpoints.optimizer_tensors(4).items())
    assert checkpoints.optimizer_tensors(4).keys() == moments(4).keys()


def test_a_glimpse_is_not_a_check(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 9)
    assert checkpoints.glimpse() is None
    saved(tmp_path, {4: 4, 8: 4})
    (tmp_path / "step_00000008" / "model.safetensors").unlink()
    likely = checkpoints.glimpse()
    assert likely is not None
    assert likely.step == 8
    for text in ("{", '{"unknown": 1}'):
        (tmp_path / "step_00000008" / "state.json").write_text(text)
        assert checkpoints.glimpse() is None


FILES = (*checkpoint.FILES, "state.json", "manifest.json")


@pytest.mark.parametrize("how", ["deleted", "truncated", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = saved(tmp_path, {4: 4, 8: 8})
    file = tmp_path / "step_00000008" / name
    data = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    state = checkpoints.newest()
    assert state is not None
    assert state.step == 4
    said = capsys.readouterr().out
    assert "checkpoint step_00000008 is damaged and passed over" in said
    assert "manifest" in said if name == "manifest.json" and how != "one bit" else "step_00000008" in said
    assert names(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"files": 5}', '{"files": {"model.safetensors": {}}}'])
def test_a_manifest_of_another_kind_is_a_damage(tmp_path: Path, text: str) -> None:
    checkpoints = saved(tmp_path, {4: 4, 8: 8})
    (tmp_path / "step_00000008" / "manifest.json").write_text(text)
    state = checkpoints.newest()
    assert state is not None
    assert state.step == 4


def test_all_damaged(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, {4: 4, 8: 8})
    for path in tmp_path.glob("step_*/model.safetensors"):
        path.write_bytes(b"")
    assert checkpoints.newest() is None
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    saved(tmp_path, {4: 4})
    (tmp_path / ".tmp-step_00000008-0badcafe").mkdir()
    (tmp_path / ".tmp-step_00000008-0badcafe" / "model.safetensors").write_bytes(b"half")
    state = Checkpoints(tmp_path, 2).newest()
    assert state is not None
    assert state.step == 4
    assert names(tmp_path) == ["step_00000004"]


def test_a_save_that_fails_half_way_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, {4: 4})

    def full(values: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    checkpoints.save(TrainState(step=8), tensors(8), {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    assert names(tmp_path) == ["step_00000004"]
    checkpoints.wait()  # an error is raised once


class Slow:
    """Stands for the file writer: writes when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = Event(), Event()
        self.real = checkpoint.write_tensors
        monkeypatch.setattr(checkpoint, "write_tensors", self)

    def __call__(self, values: dict[str, Tensor], path: Path) -> dict[str, Any]:
        self.begun.set()
        assert self.go.wait(10)
        return self.real(values, path)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns at once, and what is written are the values of its time, not those that training made since."""
    slow, checkpoints, weights = Slow(monkeypatch), Checkpoints(tmp_path, 2), tensors(1)
    state = TrainState(step=1)
    checkpoints.save(state, weights, {"weight.exp_avg": weights["weight"]})
    assert slow.begun.wait(10)
    weights["weight"].fill_(99.0)
    state.metrics_bytes = 99
    checkpoints.check()
    assert not (tmp_path / "step_00000001").exists()
    slow.go.set()
    found = checkpoints.newest()  # waits
    assert found == TrainState(step=1)
    assert torch.equal(checkpoints.model_tensors(1)["weight"], tensors(1)["weight"])
    assert torch.equal(checkpoints.optimizer_tensors(1)["weight.exp_avg"], tensors(1)["weight"])


def test_one_save_is_under_way_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers are the same: a second save must not fill them while the first is written."""
    slow, checkpoints = Slow(monkeypatch), Checkpoints(tmp_path, 9)
    checkpoints.save(TrainState(step=1), tensors(1), {})
    Timer(0.05, slow.go.set).start()
    checkpoints.save(TrainState(step=2), tensors(2), {})
    assert (tmp_path / "step_00000001").exists()
    checkpoints.wait()
    for step in (1, 2):
        assert torch.equal(checkpoints.model_tensors(step)["weight"], tensors(step)["weight"])


@pytest.mark.parametrize("how", ["check", "wait", "save", "newest", "model_tensors"])
def test_an_error_of_the_writer_is_raised_by_whatever_comes_next(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, {4: 4})

    def fail(values: dict[str, Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    checkpoints.save(TrainState(step=8), tensors(8), {})
    wait([checkpoints._pending])
    arguments = {"save": (TrainState(step=9), tensors(9), {}), "model_tensors": (4,)}
    with pytest.raises(OSError, match="No space left"):
        getattr(checkpoints, how)(*arguments.get(how, ()))


def test_closing_waits_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, before = Slow(monkeypatch), set(enumerate_threads())
    with closing(Checkpoints(tmp_path, 2)) as checkpoints:
        checkpoints.save(TrainState(step=1), tensors(1), {})
        begun = set(enumerate_threads()) - before
        assert begun
        slow.go.set()
    assert names(tmp_path) == ["step_00000001"]
    assert not any(thread.is_alive() for thread in begun)


def test_files_are_read_for_their_checksums_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, {2: 2, 4: 2})
    read: list[Path] = []
    real = checkpoint.damage
    monkeypatch.setattr(checkpoint, "damage", lambda path, facts: read.append(path) or real(path, facts))
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.newest()
    checkpoints.model_tensors(4)
    checkpoints.optimizer_tensors(4)
    checkpoints.model_tensors(2)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in read) == sorted(
        [*(f"step_00000004/{name}" for name in FILES[:4]), "step_00000002/model.safetensors", "step_00000002/state.json"]
    )


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: FakeStream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeStream) -> None:
        self.said.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> FakeStream:
        return FakeStream(f"copies of {self.name}", self.said)

    def synchronize(self) -> None:
        self.said.append(f"host waits for {self.name}")


def test_on_a_gpu_the_copy_waits_for_the_past_and_the_update_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    main = FakeStream("main", said)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    snapshot = Snapshot()
    snapshot.before_update()
    snapshot.arrived()
    assert said == []
    snapshot.stream = FakeStream("side", said)  # type: ignore[assignment]
    snapshot.take(tensors(1))
    snapshot.before_update()
    snapshot.arrived()
    assert said == ["side waits for main", "main waits for copies of side", "host waits for copies of side"]


def test_what_was_gathered_for_a_copy_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gathered tensor is freed at once; without a word to the allocator its memory would be used again while it is copied."""
    said: list[str] = []
    snapshot = Snapshot()
    snapshot.stream = FakeStream("side", said)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream("main", said))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: said.append(f"{stream.name} uses {float(self[0])}"))
    monkeypatch.setattr(checkpoint, "whole", lambda tensor: tensor.clone() if float(tensor[0]) == 1.0 else tensor)
    snapshot.take({"cut": torch.ones(2), "plain": torch.zeros(2)})
    assert said == ["side waits for main", "side uses 1.0"]


def test_buffers_are_kept_and_replaced_only_for_another_shape() -> None:
    snapshot = Snapshot()
    first = snapshot.take(tensors(1))["weight"]
    assert snapshot.take(tensors(2))["weight"] is first
    assert float(first[0, 0]) == 2.0
    assert snapshot.take({"weight": torch.ones(5)})["weight"].shape == (5,)


def test_without_locked_memory_a_plain_buffer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def limited(*given: Any, **more: Any) -> Tensor:
        if "pin_memory" in more:
            raise RuntimeError("CUDA error: out of memory")
        return real(*given, **more)

    monkeypatch.setattr(torch, "empty", limited)
    assert torch.equal(Snapshot().take({"weight": torch.ones(5)})["weight"], torch.ones(5))


def test_only_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, {2: 2, 4: 4, 6: 4, 8: 4, 10: 4}, keep_last=2)
    assert names(tmp_path) == ["step_00000004", "step_00000008", "step_00000010"]


def test_the_best_of_an_older_kept_one_is_kept_too(tmp_path: Path) -> None:
    """If the newest is damaged, the one before it is the start, and the best it points to must be there."""
    checkpoints = saved(tmp_path, {2: 2, 4: 2, 6: 6}, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000006"]
    (tmp_path / "step_00000006" / "state.json").unlink()
    state = checkpoints.newest()
    assert state is not None
    assert state.step == 4
    assert float(checkpoints.model_tensors(state.best_step)["weight"][0, 0]) == 2.0


def test_before_the_first_validation_there_is_no_best(tmp_path: Path) -> None:
    saved(tmp_path, {1: 0, 2: 0, 3: 0}, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_needed_one_that_is_damaged_says_what_to_do(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, {4: 4})
    (tmp_path / "step_00000004" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"checkpoint of step 4: .*has 1 bytes, expected \d+; run the stage again with --discard"):
        checkpoints.model_tensors(4)
    with pytest.raises(InputError, match=r"checkpoint of step 7: its manifest is not readable .*not found"):
        checkpoints.model_tensors(7)


def test_one_whose_best_is_damaged_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the run would train to the end and only then miss its best model."""
    checkpoints = saved(tmp_path, {2: 2, 4: 4, 6: 4})
    (tmp_path / "step_00000004" / "model.safetensors").write_bytes(b"x")
    found = checkpoints.newest()
    assert found is None or found.best_step != 4
    assert "step_00000006 is damaged and passed over" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, {4: 4, 8: 8})
    there = sorted(tmp_path.rglob("*"))

    def fails(path: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match=r"manifest\.json"):
        patch.setattr(Path, "read_text", fails)
        Checkpoints(tmp_path, 2).newest()
    assert sorted(tmp_path.rglob("*")) == there
    found = Checkpoints(tmp_path, 2).newest()
    assert found is not None and found.step == 8
