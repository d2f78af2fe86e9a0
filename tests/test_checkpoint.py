"""Checkpoints: whole or not at all, damaged ones named and passed over, the needed ones kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.run.errors import InputError
from utils.training import checkpoint
from utils.training.checkpoint import Checkpoints, TrainState


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(4.0) + step}


def saved(folder: Path, steps: dict[int, int], keep_last: int = 9) -> Checkpoints:
    """Checkpoints of {step: best step so far}."""
    checkpoints = Checkpoints(folder, keep_last)
    for step, best in steps.items():
        state = TrainState(step=step, metrics_bytes=10 * step, best_step=best, best_nll=1 / (1 + best), seconds=0.5, resumed_at=[1])
        checkpoints.save(state, tensors(step), {"weight.exp_avg": torch.full((3, 2), -float(step))})
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
    assert torch.equal(checkpoints.optimizer_tensors(4)["weight.exp_avg"], torch.full((3, 2), -4.0))


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


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

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(TrainState(step=8), tensors(8), {})
    assert names(tmp_path) == ["step_00000004"]


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
