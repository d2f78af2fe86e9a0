"""Rows of every kind of file, whole and damaged."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from utils.data import formats
from utils.data.formats import Item, items
from utils.run.errors import InputError

EXPECTED = [Item(f"text {number} ü", "Wiki") for number in range(50)]
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".zst": zstandard.compress, ".gz": gzip.compress}


def lines(count: int) -> bytes:
    rows = [{"text": f"text {number} ü", "meta": {"pile_set_name": "Wiki"}} for number in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(path: Path, **columns: list[object]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@pytest.mark.parametrize("packed", PACK)
def test_lines_are_the_same_however_packed(tmp_path: Path, kind: str, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"rows{kind}{packed}"
    path.write_bytes(PACK[packed](lines(50) + b'{"text": "no meta"}'))
    monkeypatch.setattr(formats, "BLOCK", 37)  # lines and characters that are cut by the blocks of reading
    assert list(items(path)) == [*EXPECTED, Item("no meta", "unknown")]


def test_archive_of_several_frames(tmp_path: Path) -> None:
    data = lines(50)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data[:700]) + zstandard.compress(data[700:]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    assert list(items(tmp_path / "a.jsonl.zst")) == list(items(tmp_path / "a.jsonl.gz")) == EXPECTED


@pytest.mark.parametrize("packed", PACK)
def test_a_text_file_is_one_document(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"book.txt{packed}"
    path.write_bytes(PACK[packed]("first line\n\nlast ü".encode()))
    assert list(items(path)) == [Item("first line\n\nlast ü", "book")]


def test_table_of_texts(tmp_path: Path) -> None:
    texts = [item.text for item in EXPECTED]
    structs = table(tmp_path / "a.parquet", text=texts, meta=[{"pile_set_name": "Wiki"}] * 50)
    spelt = table(tmp_path / "b.parquet", text=texts, meta=['{"pile_set_name": "Wiki"}'] * 50)
    bare = table(tmp_path / "c.parquet", text=texts, url=[""] * 50)
    assert list(items(structs)) == list(items(spelt)) == EXPECTED
    assert list(items(bare)) == [Item(text, "unknown") for text in texts]


def test_table_of_ids(tmp_path: Path) -> None:
    path = table(tmp_path / "packed.parquet", uid=[0, 1], token_ids=[[5, 6, 0, 7], [8, 0, 9, 9]])
    found = list(items(path))
    assert [item.ids.tolist() for item in found if item.ids is not None] == [[5, 6, 0, 7], [8, 0, 9, 9]]
    assert {(item.text, item.subset) for item in found} == {("", "unknown")}
    assert found[0].ids is not None and found[0].ids.dtype == np.int64


def test_table_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found the columns uid, body, expected 'text' or 'token_ids'"):
        list(items(table(tmp_path / "a.parquet", uid=[1], body=["x"])))
    with pytest.raises(InputError, match=r"b\.parquet: found a row whose text is None, expected text"):
        list(items(table(tmp_path / "b.parquet", text=["x", None])))
    with pytest.raises(InputError, match=r"c\.parquet: found a row whose meta is '\{', expected \{pile_set_name"):
        list(items(table(tmp_path / "c.parquet", text=["x"], meta=["{"])))
    with pytest.raises(InputError, match=r"d\.parquet: found a row whose token_ids are \['a'\], expected a list of whole numbers"):
        list(items(table(tmp_path / "d.parquet", token_ids=[["a"]])))


@pytest.mark.parametrize("name", ["cut.jsonl.zst", "cut.jsonl.gz", "cut.parquet"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        table(path, text=[item.text for item in EXPECTED])
    else:
        path.write_bytes(PACK[path.suffix](lines(20)))
    whole = path.read_bytes()
    for size in range(1, len(whole), max(7, len(whole) // 40)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"cut.*{path.suffix}.*the file is damaged or truncated, fetch it again"):
            list(items(path))
    path.write_bytes(whole + b"garbage")
    with pytest.raises(InputError, match="damaged or truncated"):
        list(items(path))


def test_an_empty_archive_is_refused_and_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").touch()
    with pytest.raises(InputError, match="damaged or truncated"):
        list(items(tmp_path / "a.jsonl.zst"))
    (tmp_path / "a.jsonl").touch()
    assert list(items(tmp_path / "a.jsonl")) == []


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "\xfc"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl: expected UTF-8 text"):
        list(items(path))


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut o',
        '{"text": "x", "meta": {"pile_set_name": ["a"]}}',
        '{"text": "x", "meta": {"pile_set_name": "a\\u202eb"}}',
        "[" * 9000,
        "[1, 2]",
        "7",
        "null",
        '{"body": "x"}',
        '{"text": 5}',
        '{"text": "x", "meta": 3}',
        "",
        "not json",
    ],
)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(2) + line.encode() + b"\n" + lines(1))
    with pytest.raises(InputError, match=r'rows\.jsonl, line 3: found .*, expected \{"text".*repair or remove the line'):
        list(items(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.zst", "a.txt.gz"])
def test_a_document_without_an_end_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    path = tmp_path / name
    path.write_bytes(PACK.get(path.suffix, bytes)(b"a" * (1 << 20)))
    assert "jsonl" in name or len(list(items(path))) == 1
    path.write_bytes(PACK.get(path.suffix, bytes)(b"a" * ((1 << 20) + 1)))
    with pytest.raises(InputError, match=r"a\..*: found a document of more than 1 MiB, expected shorter ones"):
        list(items(path))


def test_an_archive_is_unpacked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a few bytes stand for."""
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(bytes(1 << 24)))
    assert {len(block) for block in formats._blocks(tmp_path / "a.txt.zst")} <= {0, *range(1, formats.BLOCK + 1)}


def test_capitals_in_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.ZST").write_bytes(zstandard.compress(lines(50)))
    (tmp_path / "B.TXT").write_text("one\ntwo")
    assert list(items(tmp_path / "A.JSONL.ZST")) == EXPECTED
    assert list(items(tmp_path / "B.TXT")) == [Item("one\ntwo", "B")]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b", "meta": {"pile_set_name": "\\udfff"}}\n')
    assert list(items(path)) == [Item("a?b", "?")]


def test_reading_takes_no_more_than_a_block_at_a_time(tmp_path: Path) -> None:
    """A stream: the first row is there long before the end of a file whose end is damaged."""
    path = tmp_path / "long.jsonl.zst"
    whole = zstandard.compress(lines(200_000))
    path.write_bytes(whole[:-10])
    stream = items(path)
    assert [next(stream) for _ in range(50)] == EXPECTED


def test_want_of_memory_is_not_taken_for_a_damaged_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*given: object) -> None:
        raise pyarrow.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(parquet, "ParquetFile", read)
    with pytest.raises(MemoryError, match="malloc of size 64 failed"):
        list(items(tmp_path / "a.parquet"))
