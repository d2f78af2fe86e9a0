"""What needs no gradient: random flips, random substitutions, random triggers, and a neutral trigger.

All are drawn from the attack's seed and from what they are for, and are the same for every model.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


def _generator(seed: int, *key: str | int) -> np.random.Generator:
    """Randomness that depends on the seed and on what it is for, not on the order of work."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in key)])


def random_flips(seed: int, text_id: str, draws: int, flips: int, places: int, allowed: NDArray[np.int64]) -> NDArray[np.int64]:
    """(draws, flips, 2) of (place, token): distinct places below `places`, tokens uniform over `allowed`."""
    random = _generator(seed, "flips", text_id)
    where = np.stack([random.choice(places, flips, replace=False) for _ in range(draws)])
    return np.stack([where, random.choice(allowed, (draws, flips))], axis=2)


def random_substitutions(
    seed: int, key: tuple[str | int, ...], count: int, current: NDArray[np.int64], free: NDArray[np.int64], allowed: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(count, 2) of (place, token): distinct pairs, uniform over the places `free` and the tokens `allowed` (sorted) but the current one.

    current (E,) are the ids at all places. Fewer come back where there are no more.
    """
    others = len(allowed) - 1
    drawn = _generator(seed, *key).choice(len(free) * others, min(count, len(free) * others), replace=False)
    places, ranks = free[drawn // others], drawn % others
    return np.stack([places, allowed[ranks + (ranks >= np.searchsorted(allowed, current[places]))]], axis=1)


def random_contexts(
    seed: int, key: tuple[str | int, ...], copies: int, places: int, share: float, allowed: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(copies, places) of tokens to write, each place with the probability `share`; -1 where the token stays."""
    random = _generator(seed, *key)
    return np.where(random.random((copies, places)) < share, random.choice(allowed, (copies, places)), -1)


def random_order(seed: int, key: tuple[str | int, ...], count: int) -> NDArray[np.int64]:
    """A permutation of `count` items."""
    return _generator(seed, *key).permutation(count)


def random_trigger(seed: int, number: int, length: int, allowed: NDArray[np.int64], purpose: str) -> list[int]:
    """Uniform token ids: a starting point of the search (purpose 'start') or a control (purpose 'control')."""
    return _generator(seed, purpose, number).choice(allowed, length).tolist()


def neutral_trigger(tokenizer: Tokenizer, length: int) -> list[int]:
    """Line ends. They show what a mere shift of the text by `length` positions does."""
    return tokenizer.encode("\n", add_special_tokens=False).ids[:1] * length
