"""What all parts of the attack benchmark share: shapes, the model with its engines, a tokenizer of the right size, and timing."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from utils.attacks.referee import Referee
from utils.attacks.scoring import Scorer
from utils.data.tokenizer import END_OF_TEXT, train_tokenizer
from utils.models.loading import load_model

GOALS = {"A": 1.5, "B": 20.0, "B share": 0.5, "C": 3.0, "D": 1.0}
ROUNDS = 3
SPREAD = 1.5  # of random weights, over the root of the width: large enough for tokens to matter


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    vocabulary: int
    prefix: int
    suffix: int
    target: int
    search_width: int
    topk: int
    steps: int
    trigger: int
    texts: int
    text: int
    candidates: int
    attacked: int
    flips: int
    flip_candidates: int
    long: int  # tokens of a text in the one-shot attack's own settings
    matmul: int
    study: str  # preset


SHAPES = {
    "pythia-1.4b": Shape(24, 2048, 16, 50304, 256, 20, 64, 512, 256, 25, 10, 32, 128, 100, 8, 10, 64, 2048, 8192, "pythia-1.4b"),
    "tiny": Shape(2, 64, 2, 1024, 48, 6, 12, 32, 32, 3, 3, 6, 24, 10, 2, 2, 6, 96, 256, "mini"),
}


class Bench:
    """One model on one device, its tokenizer, and what was found so far."""

    def __init__(self, shape: str, folder: Path | None) -> None:
        self.shape = SHAPES[shape]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = filled_tokenizer(self.shape.vocabulary)
        self.model = (load_model(folder, self.device) if folder else self._random()).requires_grad_(False)
        self.fast, self.exact, self.referee = Scorer(self.model, "bf16"), Scorer(self.model, "fp32"), Referee(self.model)
        self.allowed = torch.tensor(printable(self.tokenizer, self.model.config.vocab_size), device=self.device)
        self.random = torch.Generator(self.device).manual_seed(0)
        self.found: dict[str, Any] = {}

    def _random(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=self.shape.vocabulary,
            hidden_size=self.shape.width,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            intermediate_size=4 * self.shape.width,
            max_position_embeddings=2048,
            initializer_range=SPREAD / self.shape.width**0.5,
        )
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def ids(self, count: int, length: int) -> Tensor:
        """(count, length) random printable ids."""
        pool = self.allowed.nonzero().flatten()
        return pool[torch.randint(len(pool), (count, length), device=self.device, generator=self.random)]


def filled_tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocabulary` entries: a few thousand learnt from this repository's text, the rest random joins of those."""
    root = Path(__file__).parents[2]
    texts = (path.read_text(encoding="utf-8") for folder in ("docs", "utils") for path in sorted((root / folder).rglob("*.[mp][dy]")))
    state = json.loads(train_tokenizer(texts, min(4096, vocabulary // 2)).to_str())
    entries, merges = state["model"]["vocab"], state["model"]["merges"]
    begins = [word for word in entries if word[0] == "Ġ" and word[1:].isalpha() and word.isprintable()]
    ends = [word for word in entries if word.isascii() and word.isalpha()]
    random = np.random.default_rng(0)
    while len(entries) < vocabulary:
        pair = [begins[random.integers(len(begins))], ends[random.integers(len(ends))]]
        if "".join(pair) not in entries:
            entries["".join(pair)] = len(entries)
            merges.append(pair)
    return Tokenizer.from_str(json.dumps(state))


def printable(tokenizer: Tokenizer, rows: int) -> list[bool]:
    """Which rows of the model a search may write: nanoGCG's rule, printable ASCII and nothing special."""
    words = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())]
    fine = [word.isascii() and word.isprintable() and word != END_OF_TEXT for word in words]
    return (fine + [False] * rows)[:rows]


def surviving(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """(N,) whether each of ids (N, L), decoded and encoded again, is the same: nanoGCG's filter, all rows in one call."""
    rows = ids.tolist()
    again = tokenizer.encode_batch_fast(tokenizer.decode_batch(rows, skip_special_tokens=False), add_special_tokens=False)
    return torch.tensor([one.ids == row for one, row in zip(again, rows, strict=True)], device=ids.device)


def now() -> float:
    """Seconds, with the device idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(act: Callable[[], Any]) -> float:
    began = now()
    act()
    return now() - began


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of large bf16 products of random matrices, median of five rounds of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = [seconds_of(lambda: [a @ b for _ in range(10)]) for _ in range(6)]
    return 10 * 2 * size**3 / statistics.median(taken[1:])


def median(values: list[float], digits: int = 1) -> str:
    """Median with range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def peak() -> float:
    """GiB allocated at most since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found
