"""Records: torn lines and unfinished groups are dropped, and an interrupted file equals a straight one byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.run.errors import InputError
from utils.run.records import Records, grouped, read_rows, write_rows

ITEMS = list(range(10))
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def row(item: int) -> dict[str, object]:
    return {"item": item, "text": f"é\u2028\r\n{item}"}


def work(path: Path) -> list[int]:
    """Do what is pending; return the items that were done now."""
    done: list[int] = []
    records = Records(path)
    for group in records.pending(grouped(ITEMS, 4)):
        records.append(row(item) for item in group)
        done += group
    return done


def test_grouped_equals_the_obvious_list() -> None:
    assert grouped(ITEMS, 4) == GROUPS
    assert grouped([], 4) == []


def test_straight_run_writes_one_readable_line_each(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    assert work(path) == ITEMS
    assert Records(path).rows() == [row(item) for item in ITEMS]
    assert path.read_bytes().count(b"\n") == 10
    assert "é" in path.read_text(encoding="utf-8")
    assert work(path) == []


def test_cut_at_any_byte_ends_as_the_straight_run(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    work(path)
    whole = path.read_bytes()
    ends = [0, *(sum(len(line) for line in whole.splitlines(keepends=True)[:count]) for count in (4, 8, 10))]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = max(number for number, end in enumerate(ends) if end <= size)
        assert work(path) == [item for group in GROUPS[kept:] for item in group]
        assert path.read_bytes() == whole


def test_finished_file_is_plain_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "whole", map(row, ITEMS))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_rows(tmp_path / "whole", [{"a": float("inf")}])
    assert read_rows(tmp_path / "whole") == [row(item) for item in ITEMS]


@pytest.mark.parametrize("line", [b"\x00\x00\x00\n", b'{"item": \n', b"\xff\n"])
def test_damaged_line_ends_what_is_kept(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    work(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], line, *lines[6:]]))
    with pytest.raises(InputError, match=r"records\.jsonl, line 6: damaged since it was written; run the stage again"):
        Records(path).rows()
    assert work(path) == ITEMS[4:]
    assert path.read_bytes() == b"".join(lines)


def test_lines_beyond_the_work_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    work(path)
    Records(path).append([row(99)])
    assert work(path) == []
    assert [line["item"] for line in Records(path).rows()] == ITEMS


def test_rows_are_strict_json(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append([{"a": 1.0}, {"a": float("nan")}])
    assert not records.path.exists()
    records.append([{"a": 0.1 + 0.2}])
    assert records.rows() == [{"a": 0.1 + 0.2}]


def test_one_changed_bit_anywhere_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a digit: the row would be JSON still."""
    path = tmp_path / "records.jsonl"
    work(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert work(path) != []
        assert path.read_bytes() == whole
        assert f"{path}, line " in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"\x00\x00\x00\n", b'{"item": \n', b"\xff\n"])
def test_damaged_line_of_a_finished_file_is_named(line: bytes, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", map(row, ITEMS))
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_bytes(b"".join([*lines[:5], line, *lines[6:]]))
    with pytest.raises(InputError, match=r"rows\.jsonl, line 6: found .*, expected a JSON object; run its stage again"):
        read_rows(tmp_path / "rows.jsonl")
