"""A state that is cut over processes: each writes its parts, any number of processes reads them, and a damage to one part is found."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.test_distributed import company, together
from utils.run.errors import InputError
from utils.training import checkpoint
from utils.training.checkpoint import Checkpoints, TrainState
from utils.training.distributed import World, joined

__all__ = ["company"]  # a fixture


def model(step: int) -> dict[str, Tensor]:
    """Rows that two processes share evenly, unevenly, and not at all."""
    shapes = {"even": (6, 3), "odd": (7, 2), "single": (1, 5), "vector": (3,)}
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def moments(step: int) -> dict[str, Tensor]:
    """The moments are cut; what the guard remembers is not."""
    cut = {
        f"{name}.{moment}": value * factor for name, value in model(step).items() for moment, factor in (("exp_avg", 2), ("exp_avg_sq", 3))
    }
    return cut | uncut(step)


def uncut(step: int) -> dict[str, Tensor]:
    return {"guard.recent": torch.arange(4.0) + step, "guard.count": torch.tensor([step])}


def shared_out(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (size,))
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("guard")}
    return {name: distribute_tensor(tensor.clone(), mesh, [Shard(0)]) for name, tensor in tensors.items() if name not in kept} | kept


def save(folder: Path, world: World, size: int, steps: tuple[int, ...] = (4, 8)) -> None:
    with closing(Checkpoints(folder, 2, world)) as checkpoints:
        for step in steps:
            checkpoints.save(TrainState(step=step), shared_out(model(step), size), shared_out(moments(step), size))
        checkpoints.wait()


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    together("fsdp2", lambda world: save(folder, world, 2))
    return folder


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name]) or tensor.dtype != expected[name].dtype]
    assert wrong == []


def test_each_process_writes_its_part_alone(saved_by_two: Path) -> None:
    """No bytes twice, nothing but safetensors and JSON, and the sums of all files in one manifest."""
    folder = saved_by_two / "step_00000008"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    parts = [f"{kind}/0000{rank}.safetensors" for kind in ("model", "optimizer", "optimizer_squares") for rank in (0, 1)]
    assert names == sorted([*parts, "manifest.json", "state.json"])
    held = []
    for part in parts[:2]:
        with safe_open(folder / part, "pt") as file:
            held.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert held[0] == {"even": [3, 3], "odd": [4, 2], "single": [1, 5], "vector": [2]}
    assert held[1] == {"even": [3, 3], "odd": [3, 2], "vector": [1]}
    assert [path.name for path in sorted(saved_by_two.iterdir())] == ["step_00000004", "step_00000008"]


def test_one_process_reads_what_two_wrote(saved_by_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whole, and no pickle is loaded."""
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, lambda *given, **more: pytest.fail("a pickle was loaded"))
    checkpoints = Checkpoints(saved_by_two, 2)
    state = checkpoints.newest()
    assert state is not None
    for step in (4, state.step):
        assert_equal(checkpoints.model_tensors(step), model(step))
        assert_equal(checkpoints.optimizer_tensors(step), moments(step))
    assert state.step == 8


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_reads_its_part(saved_by_two: Path, size: int) -> None:
    """Cut anew, without ever being whole, and equal to the bit to what a whole tensor cut so is."""

    def act(world: World) -> None:
        checkpoints = Checkpoints(saved_by_two, 2, world)
        if world.first:
            assert checkpoints.newest() is not None
        expected = shared_out(model(8), size)
        found = checkpoints.model_tensors(8, {name: torch.zeros_like(tensor) for name, tensor in expected.items()})
        assert all(isinstance(tensor, DTensor) for tensor in found.values())
        for name, tensor in found.items():
            assert torch.equal(tensor.to_local(), expected[name].to_local()), name
        expected = shared_out(moments(8), size)
        found = checkpoints.optimizer_tensors(
            8, {name: torch.zeros_like(tensor) for name, tensor in expected.items() if "guard" not in name}
        )
        for name, tensor in found.items():
            assert torch.equal(getattr(tensor, "_local_tensor", tensor), getattr(expected[name], "_local_tensor", expected[name])), name
        assert found.keys() == expected.keys()

    together("fsdp2", act, size)


def test_an_error_of_one_process_is_that_of_all(tmp_path: Path) -> None:
    """Nothing is published, nothing is left, and each process says what the one found."""

    def act(world: World) -> None:
        real = checkpoint.write_tensors

        def fail(tensors: dict[str, Tensor], path: Path, told: dict[str, str]) -> dict[str, object]:
            if path.name == "00001.safetensors":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(tensors, path, told)

        checkpoint.write_tensors = fail  # type: ignore[assignment]
        with pytest.raises(OSError, match=r"No space left on device.*0000[1]\.safetensors") as caught:
            save(tmp_path / "checkpoints", world, 2, (4,))
        assert caught.value.errno == errno.ENOSPC

    together("fsdp2", act)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def cut(company: None) -> Iterator[World]:
    """A world of two of which this process is the first, in a group of one: all code of a cut state, in this process."""
    with joined("fsdp2"):
        yield World(0, 2, "fsdp2")


@pytest.mark.parametrize("how", ["deleted", "truncated", "changed", "folder deleted"])
@pytest.mark.parametrize("kind", ["model", "optimizer", "optimizer_squares"])
def test_a_damaged_part_is_named_and_passed_over(
    cut: World, tmp_path: Path, how: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, cut, 1)
    victim = tmp_path / "step_00000008" / kind / "00000.safetensors"
    content = victim.read_bytes()
    victim.unlink()
    if how == "truncated":
        victim.write_bytes(content[:-1])
    elif how == "changed":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "folder deleted":
        victim.parent.rmdir()
    checkpoints = Checkpoints(tmp_path, 2, cut)
    state = checkpoints.newest()
    said = capsys.readouterr().out
    assert state is not None
    assert state.step == 4
    assert "checkpoint step_00000008 is damaged and passed over" in said
    assert str(victim) in said
    assert not victim.parents[1].exists()
    assert_equal(checkpoints.model_tensors(4), model(4))


def test_a_needed_part_that_is_damaged_says_what_to_do(cut: World, tmp_path: Path) -> None:
    save(tmp_path, cut, 1)
    (tmp_path / "step_00000004" / "model" / "00000.safetensors").unlink()
    with pytest.raises(InputError, match=r"checkpoint of step 4: .*model/00000.safetensors is missing; run the stage again with --discard"):
        Checkpoints(tmp_path, 2).model_tensors(4)


def test_parts_are_read_cut_or_whole(cut: World, tmp_path: Path) -> None:
    save(tmp_path, cut, 1, (5,))
    checkpoints = Checkpoints(tmp_path, 2, cut)
    like = shared_out(model(0), 1)
    found = checkpoints.model_tensors(5, {"odd": like["odd"]})
    assert isinstance(found["odd"], DTensor)
    assert not isinstance(found["even"], DTensor)
    assert_equal({name: getattr(tensor, "_local_tensor", tensor) for name, tensor in found.items()}, model(5))
    assert_equal({name: tensor.to_local() for name, tensor in like.items()}, model(0))


def test_a_process_that_is_not_the_first_writes_its_part_where_the_first_says(
    cut: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither publishes nor prunes; what every process has it leaves to the first."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, World(1, 2, "fsdp2"))
    told = [[tmp_path], [{}]]
    monkeypatch.setattr(checkpoints, "_all", lambda value: told.pop(0))
    checkpoints.save(TrainState(step=4), shared_out(model(4), 1), shared_out(moments(4), 1))
    checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "optimizer", "optimizer_squares"]
    with safe_open(tmp_path / "optimizer" / "00001.safetensors", "pt") as file:
        assert not any("guard" in name for name in file.keys())  # noqa: SIM118
