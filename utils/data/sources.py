"""Rows of text with their subset and split, from installed packages or from files in the Pile's own form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zstandard

from configs.schema import Data, Files
from utils.data import embedded
from utils.run.errors import InputError

Split = Literal["train", "validation", "attack", "test"]
SPLITS: tuple[Split, ...] = ("test", "attack", "validation", "train")  # held-out text first: it wins over a duplicate in train


@dataclass(frozen=True)
class Row:
    text: str
    subset: str
    split: Split


def describe(data: Data) -> dict[str, Any]:
    """What identifies the text of a source, for the cache: package versions, or names, sizes and times of files."""
    if data.embedded:
        return {"embedded": data.embedded.model_dump(mode="json"), "packages": embedded.package_versions(data.embedded.packages)}
    assert data.files is not None
    described: dict[str, Any] = {"files": data.files.model_dump(mode="json")}
    if data.files.repository is None:
        stats = {name: existing(Path(name)).stat() for name in (*data.files.train, *data.files.validation, *data.files.test)}
        described["local"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return described


def rows(data: Data, split: Split) -> Iterator[Row]:
    """All rows of one split, in a fixed order."""
    if data.embedded:
        for document in embedded.documents(data.embedded):
            if (found := _embedded_split(document.module)) == split:
                yield Row(document.text, document.subset, found)
    else:
        assert data.files is not None
        yield from _file_rows(data.files, split)


def unit(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64


def _embedded_split(module: str) -> Split:
    place = unit(module)
    return "test" if place < 0.08 else "attack" if place < 0.18 else "validation" if place < 0.22 else "train"


def _file_rows(files: Files, split: Split) -> Iterator[Row]:
    named = {"train": files.train, "test": files.test}.get(split, files.validation)
    for name in named:
        for text, subset in pile_rows(_fetch(files, name)):
            if split in ("validation", "attack") and (unit(text) < 0.5) != (split == "attack"):
                continue
            yield Row(text, subset, split)


def _fetch(files: Files, name: str) -> Path:
    if files.repository is None:
        return existing(Path(name))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(files.repository, name, repo_type="dataset", revision=files.revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"data.files: {name!r} of the hub dataset {files.repository!r}, revision {files.revision!r}, cannot be had: "
            f"{str(error).splitlines()[0]}. Check name, network and access, or give local files"
        ) from None


def existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"data.files: found no file {path}; expected .jsonl or .jsonl.zst rows, correct the path")
    return path


def pile_rows(path: Path) -> Iterator[tuple[str, str]]:
    """(text, pile_set_name) of each row of a .jsonl or .jsonl.zst file, read as a stream."""
    try:
        for number, line in enumerate(_lines(path), 1):
            yield _row(line.decode(), f"{path}, line {number}")
    except (zstandard.ZstdError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path}: expected UTF-8 rows ({error}); the file is damaged or truncated, fetch it again") from None


def _row(line: str, place: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        text, subset = row["text"], (row.get("meta") or {}).get("pile_set_name", "unknown")
        if isinstance(text, str) and isinstance(subset, str):
            return _utf8(text), _utf8(subset)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f'{place}: found {line[:60]!r}, expected {{"text": ..., "meta": {{"pile_set_name": ...}}}}; repair or remove the line')


def _utf8(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding can hold; it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, which may be zstandard frames. zstandard's own reader takes a truncated file for a complete one."""
    with path.open("rb") as raw:
        if path.suffix != ".zst":
            yield from raw
            return
        frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
        while block := raw.read(1 << 18):
            while block:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
                *whole, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from whole
                block = frame.unused_data
        if not frame.eof:
            raise EOFError("the last frame is not complete")
        if rest:
            yield rest
