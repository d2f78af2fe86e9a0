"""Files of the wrong shape: every reader on inputs that are nearly right, bombs, the real command line, and text that nobody expects."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.faults.confined import judged
from tests.faults.mutation import Corpus
from tests.faults.outcome import Outcome
from tests.faults.readers import Reader, readers

AMOUNT = 20_000
ROUND = 200  # inputs after which what they led to is learnt


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    """Changed inputs for every reader."""
    there = readers(folder)
    total = sum(reader.share for reader in there)
    for reader in there:
        yield from fuzzed(reader, max(1, round(amount * reader.share / total)), seed)


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
