"""Keys and values of the beginning of texts, computed once and read by every edit that leaves the beginning as it is.

In a causal model the rows before the first edited token do not change. n edits, B texts, t tokens, h heads, e entries of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Pairs = list[tuple[Tensor, Tensor]]  # keys and values (B, h, t, e) of every layer, bottom to top


class Recorder(Cache):
    """Given to a pass over whole texts, it keeps the keys and values in `pairs`; the pass is as without it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.pairs: Pairs = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.pairs.append((key.detach(), value.detach()))
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Prefix(Cache):
    """Given to a pass over the rest of n edited texts: edit k follows the first `length` tokens of text which[k]."""

    def __init__(self, pairs: Pairs, which: Tensor, length: int) -> None:
        super().__init__(layers=[])
        self.pairs, self.which, self.length = pairs, which, length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (self._spread(stored) for stored in self.pairs[layer_idx])
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)

    def _spread(self, stored: Tensor) -> Tensor:
        """(n, h, length, e), made for one layer at a time: those of all layers together would not fit."""
        begin = stored[:, :, : self.length]
        return begin.expand(len(self.which), -1, -1, -1) if len(begin) == 1 else begin[self.which]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length
