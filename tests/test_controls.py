"""Random and neutral controls: a function of the seed and of what they are for, of nothing else."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from utils.attacks.controls import neutral_trigger, random_flips, random_trigger
from utils.data.tokenizer import train_tokenizer

ALLOWED = np.array([2, 3, 5, 7, 11, 13, 17])


def test_flips_depend_on_seed_and_text_alone() -> None:
    texts = [f"attack-{number}" for number in range(5)]
    forward = {text: random_flips(0, text, 3, 4, 9, ALLOWED) for text in texts}
    np.random.default_rng(1).random(10)
    backward = {text: random_flips(0, text, 3, 4, 9, ALLOWED) for text in reversed(texts)}
    assert all(np.array_equal(forward[text], backward[text]) for text in texts)
    assert len({array.tobytes() for array in forward.values()}) == 5
    assert not np.array_equal(forward["attack-0"], random_flips(1, "attack-0", 3, 4, 9, ALLOWED))


def test_flips_have_distinct_places_and_allowed_tokens() -> None:
    flips = random_flips(0, "attack-0", 50, 4, 5, ALLOWED)
    assert flips.shape == (50, 4, 2)
    assert all(len(set(draw[:, 0])) == 4 and set(draw[:, 0]) <= set(range(5)) for draw in flips)
    assert set(flips[..., 1].ravel()) == set(ALLOWED)


def test_all_places_and_tokens_are_equally_likely() -> None:
    flips = random_flips(0, "attack-0", 3000, 2, 5, ALLOWED).reshape(-1, 2)
    for column, values in ((0, np.arange(5)), (1, ALLOWED)):
        shares = np.array([(flips[:, column] == value).mean() for value in values])
        assert np.abs(shares - 1 / len(values)).max() < 0.025


def test_triggers_depend_on_seed_number_and_purpose() -> None:
    drawn = [random_trigger(seed, number, 6, ALLOWED, purpose) for seed in (0, 1) for number in (0, 1) for purpose in ("start", "control")]
    assert len({tuple(trigger) for trigger in drawn}) == 8
    assert drawn[0] == random_trigger(0, 0, 6, ALLOWED, "start")
    assert set(drawn[0]) <= set(ALLOWED.tolist())
    assert all(type(token) is int for token in drawn[0])


def test_neutral_trigger_is_line_ends() -> None:
    tokenizer: Tokenizer = train_tokenizer(iter(["one\ntwo\n\nthree"]), 260)
    ids = neutral_trigger(tokenizer, 3)
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "\n\n\n"
