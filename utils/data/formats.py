"""Rows of files as streams: JSON lines in the Pile's own form, Parquet, plain text; compressed with zstandard or gzip, or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from utils.run.errors import InputError

LINES, TEXT, TABLE = (".jsonl", ".json"), (".txt",), (".parquet",)
COMPRESSED = ("", ".zst", ".gz")
SUFFIXES = (*(kind + packed for kind in (*LINES, *TEXT) for packed in COMPRESSED), *TABLE)
BLOCK = 1 << 18
TABLE_ROWS = 256


class Item(NamedTuple):
    """A row of a file: a text, or ids that were made before (a packed sequence, with end-of-text between its documents)."""

    text: str
    subset: str
    ids: NDArray[np.int64] | None = None


def readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def items(path: Path) -> Iterator[Item]:
    """All rows of a file, in order, in bounded memory. Raises InputError that names the place of a fault."""
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    if stem.suffix in TABLE:
        return _table(path)
    if stem.suffix in TEXT:
        return iter([Item(_decoded(path, b"".join(_blocks(path))), stem.stem)])
    return _rows(path)


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
    try:
        row = json.loads(line)
        text, subset = row["text"], _subset(row.get("meta"))
        if isinstance(text, str) and isinstance(subset, str):
            return Item(_utf8(text), _utf8(subset))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f'{place}: found {line[:60]!r}, expected {{"text": ..., "meta": {{"pile_set_name": ...}}}}; repair or remove the line')


def _subset(meta: Any) -> Any:
    return (meta or {}).get("pile_set_name", "unknown")


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
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = str(error).splitlines()[0]
        raise InputError(f"{path}: not readable as Parquet ({said}); the file is damaged or truncated, fetch it again") from None


def _batch(batch: Any, path: Path) -> Iterator[Item]:
    columns = {name: batch.column(name) for name in batch.schema.names}
    for number in range(batch.num_rows):
        if "text" not in columns:
            yield Item("", "unknown", np.asarray(columns["token_ids"][number].as_py(), dtype=np.int64))
            continue
        text = columns["text"][number].as_py()
        meta = columns["meta"][number].as_py() if "meta" in columns else None
        subset = _subset(json.loads(meta) if isinstance(meta, str) else meta)
        if not isinstance(text, str):
            raise InputError(f"{path}: found a row whose text is {text!r}, expected text; repair or remove the row")
        yield Item(text, subset)


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for block in _blocks(path):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _blocks(path: Path) -> Iterator[bytes]:
    """The unpacked content. Raises InputError for a damaged or truncated archive."""
    try:
        if path.suffix == ".zst":
            yield from _zstandard(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            while block := handle.read(BLOCK):
                yield block
    except (zstandard.ZstdError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not readable as {path.suffix} ({error}); the file is damaged or truncated, fetch it again") from None


def _zstandard(path: Path) -> Iterator[bytes]:
    """The frames of an archive. zstandard's own reader takes a truncated file for a complete one."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as raw:
        while block := raw.read(BLOCK):
            while block:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
                yield frame.decompress(block)
                block = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame is not complete")
