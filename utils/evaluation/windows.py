"""Documents cut into windows, by two protocols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import Evaluate
from utils.data.tokens import Tokens
from utils.run.records import grouped


@dataclass(frozen=True)
class Window:
    """A piece of a document with its context: `ids` (n,), of which the last `scored` are predicted."""

    document: int
    ids: NDArray[np.int64]
    scored: int


def windows(tokens: Tokens, spec: Evaluate) -> list[Window]:
    """Cut every document, with end-of-text in front, into windows of `context` tokens that advance by `stride`.

    A document's first token is predicted from end-of-text; each of its n tokens is scored in exactly one window.
    """
    return [window for number, ids in enumerate(tokens.documents()) for window in _cut(number, np.append(tokens.end_of_text, ids), spec)]


def _cut(number: int, ids: NDArray[np.int64], spec: Evaluate) -> Iterator[Window]:
    end = min(spec.context, len(ids))
    if end > 1:
        yield Window(number, ids[:end], end - 1)
    while end < len(ids):
        scored = min(spec.stride, len(ids) - end)
        end += scored
        yield Window(number, ids[max(0, end - spec.context) : end], scored)


def first_windows(tokens: Tokens, spec: Evaluate) -> list[Window]:
    """The reference's protocol (arXiv 2602.02686): of every document the first `context` tokens, of which the first is not scored."""
    cut = ((number, ids[: spec.context]) for number, ids in enumerate(tokens.documents()))
    return [Window(number, ids, len(ids) - 1) for number, ids in cut if len(ids) > 1]


def batches(cut: Sequence[Window], size: int) -> list[Sequence[Window]]:
    """Batches of windows of like length, so that little is padded; their composition depends on the windows alone."""
    return grouped(sorted(cut, key=lambda window: (len(window.ids), window.document)), size)


def sample(cut: Sequence[Window], count: int) -> list[Window]:
    """At most `count` windows, evenly spaced."""
    places = np.linspace(0, len(cut) - 1, min(count, len(cut))).round().astype(int)
    return [cut[place] for place in places.tolist()]
