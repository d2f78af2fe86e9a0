"""Edits of texts in the order in which an engine scores them, and what each of them cost.

K distinct edits of m tokens each, of B texts of T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.attacks.work import Prices, Work

LEAST_PREFIX = 32  # tokens; a shorter beginning saves too little for the copies of keys and values that its use needs
ENOUGH = 8192  # rows that fill a GPU; edits at other places then go into a pass of their own, which computes fewer rows


@dataclass
class Edits:
    """Distinct edits, sorted by the first row that must be computed again, then by text. Arrays are on the host, tensors on the device."""

    first: NDArray[np.int64]  # (K,) rows before it are the unedited text's
    text: NDArray[np.int64]  # (K,)
    writes: Tensor  # (K, 1 + 2m): text, places, tokens
    back: Tensor  # which of them each given edit is
    nll: Tensor  # (K,) filled in by the engine
    cached: NDArray[np.int64]  # (K,) rows that it did not compute
    begun: NDArray[np.int64]  # (B,) rows of unedited texts that it computed

    @classmethod
    def of(cls, ids: Tensor, which: Tensor, places: Tensor, tokens: Tensor, scored: int) -> Edits:
        """ids (B, T), which (K,), places and tokens (K, m). The host waits for the device, once."""
        count, length = ids.shape
        first = places.amin(dim=1).clamp(max=length - 1 - scored)  # scored rows are computed, whatever the place
        first = torch.where(first < LEAST_PREFIX, 0, first)
        table, back = np.unique(torch.column_stack([first, which, places, tokens]).cpu().numpy(), axis=0, return_inverse=True)
        device = ids.device
        return cls(
            first=table[:, 0],
            text=table[:, 1],
            writes=torch.from_numpy(table[:, 1:]).to(device),
            back=torch.from_numpy(back.reshape(-1)).to(device),
            nll=torch.empty(len(table), device=device),
            cached=np.zeros(len(table), np.int64),
            begun=np.zeros(count, np.int64),
        )

    def of_texts(self, group: slice) -> NDArray[np.int64]:
        """Numbers of the edits of some of the texts, in order."""
        return np.flatnonzero((self.text >= group.start) & (self.text < group.stop))

    def stop(self, numbers: NDArray[np.int64], most: int, rows: int) -> int:
        """How many of the numbered edits go into one pass of at most `most` of them, each of `rows` rows: all that it can hold, or so
        many that it is large enough and the next edit is at another place."""
        moves = np.flatnonzero(np.diff(self.first[numbers[:most]])) + 1
        enough = moves[moves * rows >= ENOUGH]
        return int(enough[0]) if len(enough) else most

    def works(self, prices: Prices, rows: int, scored: int) -> list[Work]:
        """Work of each text, whose rows are `rows` each."""
        counts = np.bincount(self.text, minlength=len(self.begun))
        cached = np.bincount(self.text, weights=self.cached, minlength=len(self.begun)).astype(np.int64)
        return [
            prices.scoring(int(n), int(n * rows - kept + begun), int(n * scored), int(kept))
            for n, kept, begun in zip(counts, cached, self.begun, strict=True)
        ]
