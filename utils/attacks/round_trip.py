"""Whether ids are what their own text is encoded to. Only then can an attack be typed, and reach a model through its tokenizer.

The ids of a decoded text may differ: neighbours merge, and half a character has no text. The check is that of the whole text, not
of the edited part alone. A text may be cut within a word or a character, and then its own end does not come back either; hence an
edited text must come back as far as the clean one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from utils.data.encode import Ids, encoder


class RoundTrip:
    """Decoding and encoding again, many texts at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.encode = tokenizer, encoder(tokenizer)

    def reach(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """How many leading ids of each text come back."""
        return [_agreeing(again, ids) for again, ids in zip(self._again(texts), texts, strict=True)]

    def kept(self, texts: Sequence[Sequence[int]], reach: Sequence[int]) -> list[bool]:
        """Whether the first `reach` ids of each text come back."""
        return [found >= wanted for found, wanted in zip(self.reach(texts), reach, strict=True)]

    def _again(self, texts: Sequence[Sequence[int]]) -> list[Ids]:
        return self.encode(self.tokenizer.decode_batch([list(ids) for ids in texts], skip_special_tokens=False))


def first_kept(candidates: range, wanted: int, kept: Callable[[Sequence[int]], list[bool]]) -> list[int]:
    """The first `wanted` of the candidates, in their order, that `kept` says yes to; asks for as many at a time as are wanted."""
    found: list[int] = []
    for start in range(0, len(candidates), wanted):
        if len(found) >= wanted:
            break
        some = candidates[start : start + wanted]
        found += [number for number, good in zip(some, kept(some), strict=True) if good]
    return found[:wanted]


def _agreeing(again: Ids, ids: Sequence[int]) -> int:
    """Length of the common beginning."""
    for place, (one, other) in enumerate(zip(again.tolist(), ids, strict=False)):
        if one != other:
            return place
    return min(len(again), len(ids))
