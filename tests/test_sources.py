"""Rows from files in the Pile's form and from packages, and their splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from configs.schema import Data, Embedded, Files
from utils.data.embedded import documents
from utils.data.sources import SPLITS, describe, pile_rows, rows, unit
from utils.run.errors import InputError

LIMITS = {"sequence_length": 8, "train_tokens": 10, "validation_tokens": 10, "test_tokens": 10}


def lines(count: int, start: int = 0) -> str:
    return "".join(
        json.dumps({"text": f"text {number} ü", "meta": {"pile_set_name": "Wiki"}}) + "\n" for number in range(start, start + count)
    )


def from_files(folder: Path, **named: str) -> Data:
    """Data of three plain files with these contents."""
    for name, text in named.items():
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    paths = {name: (str(folder / f"{name}.jsonl"),) for name in ("train", "validation", "test")}
    return Data(source="files", files=Files(**paths), **LIMITS)


def test_plain_and_compressed_rows_are_the_same(tmp_path: Path) -> None:
    plain, packed, framed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"
    plain.write_text(lines(50) + '{"text": "no meta"}', encoding="utf-8")
    packed.write_bytes(zstandard.compress(plain.read_bytes()))
    data = plain.read_bytes()
    framed.write_bytes(zstandard.compress(data[:700]) + zstandard.compress(data[700:]))
    expected = [(f"text {number} ü", "Wiki") for number in range(50)] + [("no meta", "unknown")]
    assert list(pile_rows(plain)) == list(pile_rows(packed)) == list(pile_rows(framed)) == expected


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = zstandard.compress(lines(20).encode())
    path = tmp_path / "cut.jsonl.zst"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.jsonl\.zst: .*the file is damaged or truncated, fetch it again"):
            list(pile_rows(path))
    path.write_bytes(whole + b"garbage")
    with pytest.raises(InputError, match="damaged or truncated"):
        list(pile_rows(path))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "\xfc"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl: expected UTF-8 rows"):
        list(pile_rows(path))


@pytest.mark.parametrize(
    "line",
    ['{"text": "cut o', "[1, 2]", "7", "null", '{"body": "x"}', '{"text": 5}', '{"text": "x", "meta": 3}', "", "not json"],
)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(2) + line + "\n" + lines(1), encoding="utf-8")
    with pytest.raises(InputError, match=r'rows\.jsonl, line 3: found .*, expected \{"text".*repair or remove the line'):
        list(pile_rows(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    data = from_files(tmp_path, train=lines(1), validation=lines(1))
    with pytest.raises(InputError, match=r"data\.files: found no file .*test\.jsonl; expected \.jsonl or \.jsonl\.zst rows"):
        describe(data)
    with pytest.raises(InputError, match="found no file"):
        list(rows(data, "test"))


def test_the_description_of_files_changes_with_them(tmp_path: Path) -> None:
    data = from_files(tmp_path, train=lines(5), validation=lines(5, 5), test=lines(5, 10))
    before = describe(data)
    assert describe(data) == before
    from_files(tmp_path, train=lines(6))
    assert describe(data) != before


def test_half_of_the_validation_files_becomes_attack_text(tmp_path: Path) -> None:
    data = from_files(tmp_path, train=lines(5), validation=lines(200, 5), test=lines(7, 300))
    found = {split: [row.text for row in rows(data, split)] for split in SPLITS}
    assert found["train"] == [f"text {number} ü" for number in range(5)]
    assert found["test"] == [f"text {number} ü" for number in range(300, 307)]
    assert not set(found["validation"]) & set(found["attack"])
    assert sorted(found["validation"] + found["attack"]) == sorted(f"text {number} ü" for number in range(5, 205))
    assert 70 < len(found["attack"]) < 130
    reordered = from_files(tmp_path, validation="".join(reversed(lines(200, 5).splitlines(keepends=True))))
    assert {row.text for row in rows(reordered, "attack")} == set(found["attack"])


def test_packages_are_split_by_module_without_overlap() -> None:
    source = Embedded(packages=("pydantic",), characters=300_000, document_characters=600)
    data = Data(source="embedded", embedded=source, **LIMITS)
    found = {split: [row.text for row in rows(data, split)] for split in SPLITS}
    module = {document.text: document.module for document in documents(source)}
    modules = {split: {module[text] for text in texts} for split, texts in found.items()}
    assert all(modules.values())
    assert sum(map(len, modules.values())) == len(set.union(*modules.values()))
    assert sum(map(len, found.values())) == len(documents(source))
    assert describe(data)["packages"].keys() == {"pydantic"}


def test_files_of_a_hub_dataset_are_fetched_at_their_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, *, repo_type: str, revision: str) -> str:
        asked.append((repository, name, repo_type, revision))
        (tmp_path / name).write_text(lines(3), encoding="utf-8")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    files = Files(repository="some/pile", revision="abc", train=("a.jsonl",), validation=("b.jsonl",), test=("c.jsonl",))
    data = Data(source="files", files=files, **LIMITS)
    assert [row.text for row in rows(data, "test")] == [text for text, _ in pile_rows(tmp_path / "c.jsonl")]
    assert asked == [("some/pile", "c.jsonl", "dataset", "abc")]
    assert describe(data) == {"files": files.model_dump(mode="json")}


def test_units_are_spread_evenly_and_depend_on_the_key_alone() -> None:
    drawn = [unit(f"key {number}") for number in range(4000)]
    assert all(0 <= value < 1 for value in drawn)
    assert all(abs(sum(value < edge for value in drawn) / 4000 - edge) < 0.03 for edge in (0.1, 0.5, 0.9))
    assert unit("key 7") == drawn[7]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b", "meta": {"pile_set_name": "\\udfff"}}\n')
    assert list(pile_rows(path)) == [("a?b", "?")]


def test_a_hub_file_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = Files(repository="nobody/nothing", train=("a.jsonl",), validation=("b.jsonl",), test=("c.jsonl",))
    data = Data(source="files", files=files, sequence_length=4, train_tokens=9, validation_tokens=9, test_tokens=9)
    with pytest.raises(InputError, match=r"'a\.jsonl' of the hub dataset 'nobody/nothing', revision 'main', cannot be had"):
        next(rows(data, "train"))
