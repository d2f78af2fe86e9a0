"""Ids that come back from their own text, and ids that do not."""

from __future__ import annotations

from utils.attacks.round_trip import RoundTrip, first_kept
from utils.data.tokenizer import train_tokenizer

WORDS = RoundTrip(train_tokenizer(iter(["the cat and the hat " * 20]), 270))


def ids(text: str) -> list[int]:
    return WORDS.tokenizer.encode(text).ids


def test_what_was_encoded_comes_back() -> None:
    texts = [ids("the cat sat"), ids("\n\n  x"), ids("")]
    assert WORDS.reach(texts) == [len(text) for text in texts]


def test_neighbours_merge() -> None:
    """'t' and 'he cat' are 'the cat' when they meet: the first id already differs. Behind a blank line nothing merges."""
    assert ids("the cat") != [*ids("t"), *ids("he cat")]
    assert WORDS.reach([[*ids("t"), *ids("he cat")], [*ids("t"), *ids("\n"), *ids("he cat")]]) == [0, len(ids("t\nhe cat"))]


def test_half_a_character_at_the_end_costs_the_end_alone() -> None:
    """The first byte of 'é' has no text; what is in front of it comes back, and an edit is held to no more than that."""
    text = ids("the hat é")[:-1]
    reach = WORDS.reach([text])[0]
    assert reach == len(text) - 1
    edited, merged = [*ids("x"), *text[1:]], [*ids("t"), *ids("he"), *text[2:]]
    assert WORDS.kept([text, edited, merged], [reach] * 3) == [True, True, False]


def test_the_first_that_are_kept_in_their_order() -> None:
    asked: list[int] = []

    def even(rows: list[int]) -> list[bool]:
        asked.extend(rows)
        return [row % 2 == 0 for row in rows]

    assert first_kept(range(3, 100), 4, even) == [4, 6, 8, 10]
    assert asked == list(range(3, 11))
    assert first_kept(range(3, 8), 4, even) == [4, 6]
    assert first_kept(range(0), 4, even) == []
