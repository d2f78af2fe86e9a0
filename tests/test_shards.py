"""A split that is written shard by shard: what is marked is kept, what is beyond the mark is cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utils.data import shards as shards_module
from utils.data.shards import Shards
from utils.data.tokens import COLUMNS, Tokens

FILES = ("tokens.bin", *(f"{name}.bin" for name in COLUMNS), "index.json")
DOCUMENTS = [(np.arange(1, 2 + number % 5), f"subset {number % 3}") for number in range(30)]


def add(shards: Shards, first: int, last: int) -> None:
    for number in range(first, last):
        ids, subset = DOCUMENTS[number]
        shards.add(ids, number, subset, bytes([number]) * 16)


def write(folder: Path, *marks: int) -> Shards:
    """Documents up to each mark, a shard a mark; the last one completes the split."""
    shards = Shards(folder, 100, 0)
    for first, last in zip([0, *marks], marks, strict=False):
        add(shards, first, last)
        shards.mark(last, duplicates=last // 10, complete=last == 30)
    return shards


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_shards_make_one_split(tmp_path: Path) -> None:
    write(tmp_path, 7, 20, 30)
    split = Tokens(tmp_path)
    assert [ids.tolist() for ids in split.documents()] == [ids.tolist() for ids, _ in DOCUMENTS]
    assert split.subset_names() == [subset for _, subset in DOCUMENTS]
    assert split.column("bytes").tolist() == list(range(30))
    assert [bytes(key)[0] for key in split.column("keys")] == list(range(30))
    assert split.ids.dtype == np.dtype("<u2")
    assert [split.index[name] for name in ("documents", "tokens", "duplicates", "complete")] == [30, len(split.ids), 3, True]
    assert [shard["documents"] for shard in split.index["shards"]] == [7, 20, 30]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 70_000, 69_998)
    shards.add(np.array([69_999, 5]), 3, "x", bytes(16))
    shards.mark(1, 0, complete=True)
    assert Tokens(tmp_path).ids.tolist() == [69_999, 5, 69_998]


def _beyond(folder: Path) -> None:
    for name in FILES[:-1]:
        with (folder / name).open("ab") as handle:
            handle.write(b"torn")


def _flip(folder: Path) -> None:
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[2 * 25] ^= 1  # in the second shard
    (folder / "tokens.bin").write_bytes(data)


def _cut(folder: Path) -> None:
    (folder / "keys.bin").write_bytes((folder / "keys.bin").read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda folder: None, 20),
        (_beyond, 20),
        (_flip, 7),
        (_cut, 7),
        (lambda folder: (folder / "index.json").unlink(), 0),
        (lambda folder: (folder / "index.json").write_text("{"), 0),
        (lambda folder: (folder / "ends.bin").unlink(), 0),
    ],
)
def test_a_killed_writer_goes_on_after_the_last_intact_shard(tmp_path: Path, harm: Callable[[Path], object], kept: int) -> None:
    write(tmp_path / "straight", 7, 20, 30)
    write(tmp_path / "killed", 7, 20)
    harm(tmp_path / "killed")
    shards = Shards(tmp_path / "killed", 100, 0)
    assert shards.marks[-1].pieces == shards.documents == kept and not shards.complete
    for first, last in ((0, 7), (7, 20), (20, 30)):
        if first >= kept:
            add(shards, first, last)
            shards.mark(last, duplicates=last // 10, complete=last == 30)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_complete_split_is_found_complete_unless_it_was_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 7, 20, 30)
    assert Shards(tmp_path, 100, 0).complete
    _flip(tmp_path)
    shards = Shards(tmp_path, 100, 0)
    assert not shards.complete and shards.documents == 7
    assert "a shard is damaged and made again, with those after it" in capsys.readouterr().out


def test_a_shard_is_counted_only_once_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are synced before index.json names the shard."""
    order: list[str] = []
    monkeypatch.setattr(shards_module.os, "fsync", lambda handle: order.append("data"))
    monkeypatch.setattr(shards_module, "write_sealed", lambda path, value: order.append(path.name))
    shards = Shards(tmp_path, 100, 0)
    add(shards, 0, 3)
    shards.mark(3, 0)
    assert order == ["data"] * (1 + len(COLUMNS)) + ["index.json"]


def test_full_after_a_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 10)
    shards = Shards(tmp_path, 100, 0)
    sizes = []
    for number in range(30):
        add(shards, number, number + 1)
        if shards.full:
            shards.mark(number + 1, 0)
            sizes.append(json.loads((tmp_path / "index.json").read_text())["tokens"])
    assert all(10 <= later - earlier < 17 for earlier, later in zip([0, *sizes], sizes, strict=False))
