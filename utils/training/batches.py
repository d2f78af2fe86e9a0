"""The batches of coming steps, read by a thread while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from utils.data.tokens import PackedBatches

AHEAD = 3  # steps that are read ahead


def prefetched(source: PackedBatches, size: int, steps: range, device: torch.device, rows: slice = slice(None)) -> Generator[Tensor]:
    """Yield the (size, T + 1) ids of each step on the device, in order, or some of their rows. Batch t is a function of (seed, t) alone,
    hence nothing is saved.

    For a GPU the thread puts them into locked memory, from which they are copied without the host waiting. Close it to end the thread.
    """

    def read(step: int) -> Tensor:
        ids = torch.from_numpy(source.batch(step, size)[rows])
        return ids.pin_memory() if device.type == "cuda" else ids

    with ThreadPoolExecutor(1, "batches") as pool:
        coming = deque(pool.submit(read, step) for step in steps[:AHEAD])
        for step in steps:
            ids = coming.popleft().result()
            if step + AHEAD < steps.stop:
                coming.append(pool.submit(read, step + AHEAD))
            yield ids.to(device, non_blocking=True)
