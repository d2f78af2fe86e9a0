"""Small files that stand for more than any memory holds, and large ones that have to be read all the same."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from configs.presets import load
from tests.fake_stages import TINY
from tests.faults.confined import one
from tests.faults.outcome import Outcome
from utils.data.formats import items
from utils.run.artifacts import read_json
from utils.run.records import read_rows

MB = 1 << 20
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + depth)}: &{chr(98 + depth)} [{', '.join([f'*{chr(97 + depth)}'] * 9)}]\n" for depth in range(9)
)
MEGABYTES, SECONDS = 900, 60.0  # above what the libraries take


def packed(path: Path, block: bytes, times: int) -> Path:
    """`block` so many times over, in zstandard or gzip as the name says."""
    if path.suffix == ".zst":
        with path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as handle:
            for _ in range(times):
                handle.write(block)
    else:
        with gzip.open(path, "wb", compresslevel=1) as handle:
            for _ in range(times):
                handle.write(block)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def extending(folder: Path, count: int) -> Path:
    """A preset that extends one that extends one, and so on."""
    for number in range(count):
        (folder / f"link{number}.yaml").write_text(f"extends: link{number + 1}.yaml\n")
    return folder / "link0.yaml"


def bombs(folder: Path) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, whether it is to be read, what reads it): read to the end, or refused."""

    def preset(content: str) -> Callable[[], object]:
        path = written(folder / "bomb.yaml", content.encode())
        return lambda: load(str(path))

    def rows(path: Path) -> Callable[[], object]:
        return lambda: sum(len(item.text) for item in items(path))

    yield "YAML: ten lines of aliases for gigabytes", False, preset(f"extends: {TINY}\n{ALIASES}")
    yield "YAML: 100,000 lists within each other", False, preset(f"extends: {TINY}\na: {'[' * 100_000}")
    yield "YAML: 1,000 sections within each other", False, preset("".join(f"{' ' * depth}a:\n" for depth in range(1000)))
    yield "YAML: 20,000 unknown keys", False, preset(f"extends: {TINY}\n" + "".join(f"k{number}: 1\n" for number in range(20_000)))
    yield "YAML: a number of 100,000 digits", False, preset(f"extends: {TINY}\nseeds: [{'9' * 100_000}]")
    yield "YAML: 10 MB", False, preset(f"extends: {TINY}\na: '{'a' * 10 * MB}'")
    yield "YAML: 2,000 files that extend each other", False, lambda: load(str(extending(folder, 2000)))
    yield "--set: aliases for gigabytes", False, lambda: load(TINY, [f"model={{{ALIASES.replace(chr(10), ', ')}}}"])
    yield "--set: 5,000 sections within each other", False, lambda: load(TINY, [f"{'a.' * 5000}b=1"])
    deep = b'{"text": ' + b"[" * 100_000 + b"\n"
    yield "JSON line: 100,000 lists within each other", False, rows(written(folder / "deep.jsonl", deep))
    yield "JSON line: a number of a million digits", False, rows(written(folder / "digits.jsonl", b'{"text": ' + b"9" * 1_000_000 + b"}\n"))
    yield (
        "JSON line: a document of 50 MB",
        True,
        rows(written(folder / "long.jsonl", json.dumps({"text": "ab cd " * (50 * MB // 6)}).encode())),
    )
    yield "JSON line: 300 MB without an end", False, rows(packed(folder / "endless.jsonl.gz", b"a" * MB, 300))
    yield "zstandard: 8 GB in 250 kB, one line", False, rows(packed(folder / "zeros.jsonl.zst", bytes(16 * MB), 512))
    yield "zstandard: 2 GB of line ends", False, rows(packed(folder / "ends.jsonl.zst", b"\n" * 16 * MB, 128))
    yield "zstandard: 8 GB as one text", False, rows(packed(folder / "zeros.txt.zst", bytes(16 * MB), 512))
    yield "zstandard: a document of 50 MB", True, rows(packed(folder / "fifty.txt.zst", b"ab cd\n" * (MB // 6), 50))
    yield "zstandard: 100,000 empty frames", True, rows(written(folder / "frames.jsonl.zst", zstandard.compress(b"") * 100_000))
    yield "gzip: 1 GB of zeros", False, rows(packed(folder / "zeros.txt.gz", bytes(16 * MB), 64))
    yield "mark: 100,000 lists within each other", False, lambda: read_json(written(folder / "deep.json", b"[" * 100_000))
    yield "records: 100,000 lists within each other", False, lambda: read_rows(written(folder / "records.jsonl", b"[" * 100_000))


def exploded(folder: Path) -> Iterator[Outcome]:
    for name, good, look in bombs(folder):
        verdict = one(look, MEGABYTES, SECONDS)
        read = not (verdict.refused or verdict.fault)
        yield Outcome(name, not verdict.fault and read == good, verdict.fault or verdict.refused[:200] or "read")
