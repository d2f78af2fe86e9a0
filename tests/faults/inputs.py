"""Files of the wrong shape: every reader on inputs that are nearly right, bombs, the real command line, and text that nobody expects."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from configs.presets import PRESETS
from tests.fake_stages import ROOT, TINY
from tests.faults.bombs import exploded
from tests.faults.confined import judged
from tests.faults.mutation import Corpus
from tests.faults.outcome import Outcome
from tests.faults.readers import Reader, readers
from tests.faults.texts import read

AMOUNT = 20_000  # changed inputs; bombs and texts are always all of them
ROUND = 200  # inputs after which what they led to is learnt
TYPED = 200  # changed inputs for one that goes through the command line
LONGEST_ARGUMENT = 100_000  # bytes, below the kernel's limit
CODES = {0, 2}  # done, refused


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    there = readers(folder)
    total = sum(reader.share for reader in there)
    for reader in there:
        yield from fuzzed(reader, max(1, round(amount * reader.share / total)), seed)
    yield from exploded(folder)
    yield from typed(folder, max(2, amount // TYPED), seed)
    yield from read(folder, seed)


def fuzzed(reader: Reader, amount: int, seed: int) -> Iterator[Outcome]:
    """`amount` changed inputs for one reader; each is read, or refused by the project's own error, which names the file."""
    corpus = Corpus(reader.kind, reader.valid)
    for start in range(0, amount, ROUND):
        given = corpus.drawn(min(ROUND, amount - start), zlib.crc32(f"{reader.name} {seed} {start}".encode()))
        for each, verdict in zip(given, judged(reader.look, given), strict=True):
            corpus.learn(each, verdict.lines)
            fault = verdict.fault
            if verdict.refused and reader.named not in verdict.refused:
                fault = f"a refusal that does not name {reader.named}: {verdict.refused[:100]}"
            yield Outcome(f"{reader.name}: {each[:60]!r}", not fault, fault or verdict.refused or "read")


def typed(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    """Changed presets and overrides through `python -m stages`: an exit code and words, no traceback."""
    presets = Corpus("yaml", [Path(TINY).read_bytes(), (PRESETS / "mini.yaml").read_bytes()]).drawn(amount // 2, seed)
    overrides = Corpus("bytes", [b"training.steps=5", b"model.name=a", b"paths.work=/tmp/a"]).drawn(amount - amount // 2, seed)
    for number, given in enumerate(presets):
        path = folder / f"typed{number}.yaml"
        path.write_bytes(given)
        yield _answered(["--config", str(path)], given, folder)
    for given in overrides:
        yield _answered(["--set", given.replace(b"\0", b"")[:LONGEST_ARGUMENT]], given, folder)


def _answered(options: list[str | bytes], given: bytes, folder: Path) -> Outcome:
    places = {"SCRATCH": str(folder / "typed"), "PROJECT": str(folder / "typed")}
    command = [sys.executable, "-m", "stages", "plan", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | places, capture_output=True, text=True, errors="replace", timeout=60)
    good = done.returncode in CODES and "Traceback" not in done.stderr
    return Outcome(f"stages plan: {given[:60]!r}", good, f"exit code {done.returncode}: {done.stderr[-200:]}")
