"""Our writer against the library that reads the format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from utils.run.artifacts import inventory
from utils.training import tensor_file
from utils.training.tensor_file import write_tensors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, generator=random)
    return {
        "a.half": values[:3, :3].bfloat16(),
        "b.long": torch.arange(3),
        "c.turned": values.T,
        "d.double": values.double(),
        "e.scalar": torch.tensor(3.5),
        "f.empty": torch.zeros(0, 4),
        "g.short": values[0].half(),
    }


@pytest.mark.parametrize("block", [16, 1 << 24])
def test_what_was_written_is_read(tensors: dict[str, Tensor], tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK", block)
    facts = write_tensors(tensors, tmp_path / "x.safetensors")
    assert facts == inventory(tmp_path / "x.safetensors")["."]
    stored = load_file(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_tied_tensors_are_written_under_both_names(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    write_tensors({"a": tied, "b": tied, "c": torch.ones(2)}, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert stored.keys() == {"a", "b", "c"} and torch.equal(stored["b"], tied)


def test_a_format_without_a_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_tensors({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
