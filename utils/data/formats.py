"""Rows of files as streams: JSON lines in the Pile's own form, Parquet, plain text; compressed with zstandard or gzip, or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from utils.run.errors import InputError
from utils.run.trouble import exhausted, first_line

LINES, TEXT, TABLE = (".jsonl", ".json"), (".txt",), (".parquet",)
COMPRESSED = ("", ".zst", ".gz")
SUFFIXES = (*(kind + packed for kind in (*LINES, *TEXT) for packed in COMPRESSED), *TABLE)
BLOCK = 1 << 18
PIECE = 1 << 11  # bytes of a zstandard archive unpacked at a time: three of them can stand for 128 KiB
LONGEST_NAME = 200  # characters of a subset's name
LONGEST = 1 << 27  # bytes of a document; an archive of some kilobytes can stand for more than any memory holds
TABLE_ROWS = 256
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a row of another shape raises


class Item(NamedTuple):
    """A row of a file: a text, or ids that were made before (a packed sequence, with end-of-text between its documents)."""

    text: str
    subset: str
    ids: NDArray[np.int64] | None = None


def readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def items(path: Path) -> Iterator[Item]:
    """All rows of a file, in order, in bounded memory. Raises InputError that names the place of a fault."""
    stem = path.with_suffix("") if _packed(path) else path
    if stem.suffix.lower() in TABLE:
        return _table(path)
    if stem.suffix.lower() in TEXT:
        return iter([Item(_decoded(path, _whole(path)), stem.stem)])
    return _rows(path)


def _packed(path: Path) -> str:
    """.zst, .gz or nothing."""
    return found if (found := path.suffix.lower()) in COMPRESSED else ""


def _rows(path: Path) -> Iterator[Item]:
    for number, line in enumerate(_lines(path), 1):
        yield _row(_decoded(path, line), f"{path}, line {number}")


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text ({error}); the file is damaged or of another kind, fetch or write it again"
        ) from None


def _row(line: str, place: str) -> Item:
    with suppress(*MALFORMED):
        row = json.loads(line)
        text, subset = row["text"], _subset(row.get("meta"))
        if isinstance(text, str):
            return Item(_utf8(text), subset)
    raise InputError(f'{place}: found {line[:60]!r}, expected {{"text": ..., "meta": {{"pile_set_name": ...}}}}; repair or remove the line')


def _subset(meta: Any) -> str:
    """The name of a subset, which stands in every table. Raises one of MALFORMED for what is none, control characters among it."""
    name = _utf8((meta or {}).get("pile_set_name", "unknown"))
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(name)
    return name


def _utf8(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding can hold; it becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _table(path: Path) -> Iterator[Item]:
    """Rows of a Parquet file with a column `text` (and perhaps `meta`), or `token_ids`."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        columns = [name for name in ("text", "meta", "token_ids") if name in table.schema_arrow.names]
        if not {"text", "token_ids"}.intersection(columns):
            raise InputError(
                f"{path}: found the columns {', '.join(table.schema_arrow.names)}, expected 'text' or 'token_ids'; name other files"
            )
        for batch in table.iter_batches(TABLE_ROWS, columns=columns):
            yield from _batch(batch, path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if exhausted(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise InputError(
            f"{path}: not readable as Parquet ({first_line(error)}); the file is damaged or truncated, fetch it again"
        ) from None


def _batch(batch: Any, path: Path) -> Iterator[Item]:
    columns = {name: batch.column(name) for name in batch.schema.names}
    for number in range(batch.num_rows):
        if "text" not in columns:
            yield Item("", "unknown", _ids(columns["token_ids"][number], path))
            continue
        text = columns["text"][number].as_py()
        if not isinstance(text, str):
            raise InputError(f"{path}: found a row whose text is {str(text)[:60]}, expected text; repair or remove the row")
        meta = columns["meta"][number].as_py() if "meta" in columns else None
        try:
            subset = _subset(json.loads(meta) if isinstance(meta, str) else meta)
        except MALFORMED:
            found = f"{path}: found a row whose meta is {str(meta)[:60]!r}"
            raise InputError(f"{found}, expected {{pile_set_name: ...}}; repair or remove the row") from None
        yield Item(text, subset)


def _ids(row: Any, path: Path) -> NDArray[np.int64]:
    ids = row.as_py()
    if not isinstance(ids, list) or not all(isinstance(number, int) for number in ids):
        raise InputError(f"{path}: found a row whose token_ids are {str(ids)[:60]}, expected a list of whole numbers; remove the row")
    return np.array(ids, dtype=np.int64)


def _lines(path: Path) -> Iterator[bytes]:
    parts: list[bytes] = []
    size = 0
    for block in _blocks(path):
        first, *others = block.split(b"\n")
        parts.append(first)
        size = _allowed(path, size + len(first))
        for line in others:
            yield b"".join(parts)
            parts, size = [line], len(line)
    if size:
        yield b"".join(parts)


def _whole(path: Path) -> bytes:
    parts: list[bytes] = []
    size = 0
    for block in _blocks(path):
        parts.append(block)
        size = _allowed(path, size + len(block))
    return b"".join(parts)


def _allowed(path: Path, size: int) -> int:
    if size > LONGEST:
        raise InputError(f"{path}: found a document of more than {LONGEST >> 20} MiB, expected shorter ones; cut it, or name other files")
    return size


def _blocks(path: Path) -> Iterator[bytes]:
    """The unpacked content. Raises InputError for a damaged or truncated archive."""
    try:
        if _packed(path) == ".zst":
            yield from _zstandard(path)
            return
        with gzip.open(path) if _packed(path) == ".gz" else path.open("rb") as handle:
            while block := handle.read(BLOCK):
                yield block
    except (zstandard.ZstdError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not readable as {path.suffix} ({error}); the file is damaged or truncated, fetch it again") from None


def _zstandard(path: Path) -> Iterator[bytes]:
    """The frames of an archive. zstandard's own reader takes a truncated file for a complete one."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as raw:
        while block := raw.read(PIECE):
            while block:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
                found = frame.decompress(block)
                yield from (found[start : start + BLOCK] for start in range(0, len(found), BLOCK))
                block = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame is not complete")
