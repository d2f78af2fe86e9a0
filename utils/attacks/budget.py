"""How many token rows one pass may have: fewer when memory has run out, more again after a while."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

ROWS = 32_768  # keeps a GPU busy, and bounds memory whatever the number of candidates
PATIENCE = 64  # passes without an error before the budget is doubled again


class Budget:
    """Token rows of a pass, `ROWS` at most. What was learnt from running out of memory is kept from call to call."""

    def __init__(self) -> None:
        self.rows, self._passes = ROWS, 0

    def sequences(self, count: int, rows: int) -> int:
        """How many of `count` sequences of `rows` rows go into a pass, at least one: parts of equal size are as large as possible."""
        parts = math.ceil(count / max(1, self.rows // rows))
        return math.ceil(count / parts)

    def attempt(self, run: Callable[[], Result], rows: int, divisible: bool) -> Result | None:
        """`run()`, or None if memory ran out: the pass of `rows` rows must then be cut smaller. Raises if it is not divisible."""
        try:
            found = run()
        except torch.OutOfMemoryError:
            if not divisible:
                raise
        else:
            self._passes += 1
            if self._passes >= PATIENCE:
                self.rows, self._passes = min(ROWS, 2 * self.rows), 0
            return found
        self.rows, self._passes = max(1, min(self.rows, rows) // 2), 0  # here the error, which held on to the pass's tensors, is gone
        torch.cuda.empty_cache()  # does nothing where no GPU is in use
        return None

    def spread(self, run: Callable[[slice], Tensor], count: int, rows: int) -> Tensor:
        """Concatenated results of `run` over slices of `count` sequences of `rows` rows each."""
        found: list[Tensor] = []
        done = 0
        while done < count:
            part = slice(done, min(count, done + self.sequences(count - done, rows)))
            size = part.stop - part.start
            result = self.attempt(partial(run, part), size * rows, size > 1)
            if result is not None:
                found.append(result)
                done = part.stop
        return torch.cat(found)
