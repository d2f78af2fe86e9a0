"""Where the rows of each split are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import Data, Embedded, Files
from utils.data.embedded import documents
from utils.data.sources import SPLITS, Source, Split, describe, unit
from utils.run.errors import InputError
from utils.run.preemption import Stop

LIMITS = {"sequence_length": 8, "train_tokens": 10, "validation_tokens": 10, "test_tokens": 10}


def lines(count: int, start: int = 0) -> str:
    return "".join(
        json.dumps({"text": f"text {number} ü", "meta": {"pile_set_name": "Wiki"}}) + "\n" for number in range(start, start + count)
    )


def of_entries(**entries: tuple[str, ...]) -> Data:
    return Data(source="files", files=Files(**entries), **LIMITS)


def from_files(folder: Path, **named: str) -> Data:
    """Data of three plain files with these contents."""
    for name, text in named.items():
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return of_entries(**{name: (str(folder / f"{name}.jsonl"),) for name in ("train", "validation", "test")})


def texts(data: Data, split: Split) -> list[str]:
    return [row.text for row in Source.of(data, Path("unused"), Stop()).rows(split)]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    data = from_files(tmp_path, train=lines(1), validation=lines(1))
    with pytest.raises(InputError, match=r"data\.files: found no file .*test\.jsonl; expected a file, a folder or a pattern"):
        describe(data)
    with pytest.raises(InputError, match="found no file"):
        texts(data, "test")


def test_the_description_of_files_changes_with_them(tmp_path: Path) -> None:
    data = from_files(tmp_path, train=lines(5), validation=lines(5, 5), test=lines(5, 10))
    before = describe(data)
    assert describe(data) == before
    from_files(tmp_path, train=lines(6))
    assert describe(data) != before


def test_half_of_the_validation_files_becomes_attack_text(tmp_path: Path) -> None:
    data = from_files(tmp_path, train=lines(5), validation=lines(200, 5), test=lines(7, 300))
    found = {split: texts(data, split) for split in SPLITS}
    assert found["train"] == [f"text {number} ü" for number in range(5)]
    assert found["test"] == [f"text {number} ü" for number in range(300, 307)]
    assert not set(found["validation"]) & set(found["attack"])
    assert sorted(found["validation"] + found["attack"]) == sorted(f"text {number} ü" for number in range(5, 205))
    assert 70 < len(found["attack"]) < 130
    reordered = from_files(tmp_path, validation="".join(reversed(lines(200, 5).splitlines(keepends=True))))
    assert set(texts(reordered, "attack")) == set(found["attack"])


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    """A folder is read with all below it, whatever else lies there; entries in their order, files of one by name."""
    (tmp_path / "train/deep").mkdir(parents=True)
    for number, name in enumerate(("train/b.jsonl", "train/deep/a.jsonl", "x1.jsonl", "x2.jsonl", "val.jsonl", "test.jsonl")):
        (tmp_path / name).write_text(lines(1, number), encoding="utf-8")
    (tmp_path / "train/README.md").write_text("no rows")
    folder = str(tmp_path)
    data = of_entries(train=(f"{folder}/x*.jsonl", f"{folder}/train"), validation=(f"{folder}/val.jsonl",), test=(f"{folder}/test.jsonl",))
    assert texts(data, "train") == [f"text {number} ü" for number in (2, 3, 0, 1)]


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n")
    (tmp_path / "a.jsonl").write_text(lines(1))
    data = of_entries(train=(f"{tmp_path}/rows.csv",), validation=(f"{tmp_path}/a.jsonl",), test=(f"{tmp_path}/b.jsonl",))
    with pytest.raises(InputError, match=r"rows\.csv is of no known kind; expected \.jsonl, \.jsonl\.zst, .*\.parquet"):
        describe(data)


def test_a_file_that_two_splits_share_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(lines(1))
    data = of_entries(train=(f"{tmp_path}/[ab].jsonl",), validation=(f"{tmp_path}/c.jsonl",), test=(f"{tmp_path}/b.jsonl",))
    with pytest.raises(InputError, match=r"b\.jsonl is in train and in test; splits must not share files"):
        Source.of(data, tmp_path, Stop())


def test_packages_are_split_by_module_without_overlap() -> None:
    source = Embedded(packages=("pydantic",), characters=300_000, document_characters=600)
    data = Data(source="embedded", embedded=source, **LIMITS)
    found = {split: texts(data, split) for split in SPLITS}
    module = {document.text: document.module for document in documents(source)}
    modules = {split: {module[text] for text in members} for split, members in found.items()}
    assert all(modules.values())
    assert sum(map(len, modules.values())) == len(set.union(*modules.values()))
    assert sum(map(len, found.values())) == len(documents(source))
    assert describe(data)["packages"].keys() == {"pydantic"}


def test_units_are_spread_evenly_and_depend_on_the_key_alone() -> None:
    drawn = [unit(f"key {number}") for number in range(4000)]
    assert all(0 <= value < 1 for value in drawn)
    assert all(abs(sum(value < edge for value in drawn) / 4000 - edge) < 0.03 for edge in (0.1, 0.5, 0.9))
    assert unit("key 7") == drawn[7]
