"""One JSON line for each example, appended as it is done; what a killed process left torn is dropped and done again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from utils.run.artifacts import make_folder, write_text
from utils.run.errors import InputError

Row = dict[str, Any]
Item = TypeVar("Item")
CHECK = re.compile(rb"\t([0-9a-f]{8})\n$")  # behind a row that is not finished work yet


def read_rows(path: Path) -> list[Row]:
    """All rows of a finished file. A damaged line raises InputError with its number."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = _row(line)
        if row is None:
            raise InputError(f"{path}, line {number}: found {line[:60]!r}, expected a JSON object; run its stage again")
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a complete file at once. NaN and infinity raise ValueError."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: Row) -> str:
    """One line of a record file. NaN and infinity raise ValueError."""
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


class Records:
    """An append-only file of rows in a fixed order, each with its checksum, with resume.

    Work comes in groups whose composition does not depend on where the work was interrupted (the last bits of a
    batched result depend on its batch). `pending` drops the rows of an unfinished group and goes on from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)

    def pending(self, groups: Sequence[Sequence[Item]]) -> Iterator[Sequence[Item]]:
        """Yield the groups that have no rows yet; every item of a group gives one row."""
        lines = self._intact()
        done = rows = 0
        while done < len(groups) and rows + len(groups[done]) <= len(lines):
            rows += len(groups[done])
            done += 1
        with self.path.open("ab") as handle:
            handle.truncate(sum(len(line) for line, _ in lines[:rows]))
        yield from groups[done:]

    def rows(self) -> list[Row]:
        """All rows, once no group is pending. Raises InputError if the file was damaged meanwhile."""
        found = self._intact()
        if sum(len(line) for line, _ in found) != self.path.stat().st_size:
            raise InputError(f"{self.path}, line {len(found) + 1}: damaged since it was written; run the stage again")
        return [row for _, row in found]

    def append(self, rows: Iterable[Row]) -> None:
        lines = [json_line(row).rstrip("\n").encode() for row in rows]
        with self.path.open("ab") as handle:
            handle.write(b"".join(line + b"\t%08x\n" % crc32(line) for line in lines))

    def _intact(self) -> list[tuple[bytes, Row]]:
        """Leading lines, as written, that agree with their checksums, and what they say; damage is said."""
        lines: list[tuple[bytes, Row]] = []
        data = self.path.read_bytes() if self.path.exists() else b""
        for line in data.splitlines(keepends=True):
            row = _checked_row(line)
            if row is None:
                print(f"  {self.path}, line {len(lines) + 1}: torn or damaged, and done again with what follows")
                break
            lines.append((line, row))
        return lines


def _checked_row(line: bytes) -> Row | None:
    """The row of a line with a checksum; None if the one is not of the other."""
    check = CHECK.search(line)
    return _row(line[: check.start()]) if check and int(check[1], 16) == crc32(line[: check.start()]) else None


def whole_lines(path: Path) -> list[tuple[bytes, Row]]:
    """Leading lines of a file, which need not be there, that end in a newline and parse, and what they say."""
    lines: list[tuple[bytes, Row]] = []
    data = path.read_bytes() if path.exists() else b""
    for line in data.splitlines(keepends=True):
        row = _row(line)
        if row is None or not line.endswith(b"\n"):
            break
        lines.append((line, row))
    return lines


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def grouped(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
