"""The small text, tokens and models that the checks work on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from configs.schema import Scratch
from utils.data.encode import encoded, encoder
from utils.data.shards import Shards
from utils.data.tokenise import key_of
from utils.data.tokenizer import train_tokenizer
from utils.data.tokens import Tokens
from utils.models.loading import scratch_model

VOCABULARY = 320
END_OF_TEXT = 0


def sample_texts(count: int, seed: int) -> list[str]:
    """Texts of words made of a few letters, with blanks, line ends and characters of two to four bytes."""
    random = np.random.default_rng(seed)
    letters, ends = list("abcdeéß漢😀"), [" ", " ", " ", "\n", "  "]
    words = ["".join(random.choice(letters, 3)) + str(random.choice(ends)) for _ in range(60 * count)]
    return ["".join(words[60 * number : 60 * (number + 1)]) for number in range(count)]


def sample_tokenizer() -> Tokenizer:
    return train_tokenizer(iter(sample_texts(40, seed=0)), VOCABULARY)


def write_tokens(folder: Path, texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """A split on disk, written as setup writes it."""
    shards, encode = Shards(folder, tokenizer.get_vocab_size(), END_OF_TEXT), encoder(tokenizer, texts)
    for text, ids in encoded(texts, str, encode):
        assert ids is not None
        shards.add(ids, len(text.encode()), "prose", key_of(text))
    shards.mark(len(texts), duplicates=0, complete=True)
    return Tokens(folder)


def sample_model(seed: int, *, hidden: int = 64, layers: int = 2, heads: int = 2) -> PreTrainedModel:
    """A random GPT-NeoX model with room for 64 tokens."""
    shape = Scratch(
        vocabulary=VOCABULARY,
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=2 * hidden,
        context=64,
        steps=1,
        batch_size=1,
        sequence_length=64,
        learning_rate=1e-3,
        seed=seed,
    )
    return scratch_model(shape, END_OF_TEXT).eval()
