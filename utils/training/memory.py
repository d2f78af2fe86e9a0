"""What fits into the memory of the device: the split of a step into micro-batches, and what to say when it did not fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from configs.schema import Training
from utils.run.errors import WorkFailed
from utils.training.distributed import last_micro_batch, local
from utils.training.run import Run
from utils.training.step import Stepper

CPU_TOKENS = 2048  # of a micro-batch on a CPU: large enough for full use of the cores, and a rule that needs no measurement
MARGIN = 0.92  # share of the memory that a plan may fill; the rest is for fragments and for the libraries' own buffers
RECOMPUTE = (0.0, 0.5, 1.0)  # shares of the blocks that auto tries
Split = tuple[int, float]


def choose(run: Run, stepper: Stepper) -> Split:
    """(micro_batch, recompute) as configured; `auto` is replaced by what fits. Prints what it chose, and from what."""
    spec = run.spec
    if run.device.type == "cuda" and "auto" in (spec.micro_batch, spec.recompute):
        ids = torch.from_numpy(run.train.batch(0, spec.batch_size)).to(run.device)

        def peak(size: int, share: float) -> float:
            """Of the process that needs most: all have to come to the same choice."""
            found = _peak(stepper, ids[:size], share)
            return run.world.largest(math.inf if found is None else found)

        split = measured(spec, _sizes(run), peak, -run.world.largest(-MARGIN * _usable(run.device) / 2**30))
    else:
        fitting = [size for size in _sizes(run) if size * run.train.length <= CPU_TOKENS]
        split = (max(fitting, default=_sizes(run)[0]), 0.0 if spec.recompute == "auto" else spec.recompute)
    if spec.micro_batch == "auto" or split[1]:
        print(f"  micro-batches of {split[0]} sequences, {split[1]:.0%} of the blocks recomputed", flush=True)
    return split


def _sizes(run: Run) -> list[int]:
    """The micro-batches that are possible in this process, ascending."""
    share, given = run.spec.batch_size // run.world.size, run.spec.micro_batch
    return [given] if given != "auto" else [size for size in range(1, share + 1) if share % size == 0]


def measured(spec: Training, sizes: list[int], peak: Callable[[int, float], float | None], limit: float) -> Split:
    """The largest micro-batch that fits with the least recomputation.

    peak: (sequences, share of recomputed blocks) -> GiB that a step with such micro-batches needs, or None if that ran out of memory.
    It is called for the two smallest micro-batches; memory grows linearly from there. limit: GiB.
    """
    for share in RECOMPUTE if spec.recompute == "auto" else (spec.recompute,):
        first = peak(sizes[0], share)
        second = peak(sizes[1], share) if len(sizes) > 1 and first is not None and first <= limit else None
        slope = (second - first) / (sizes[1] - sizes[0]) if first is not None and second is not None else math.inf
        fitting = [size for size in sizes[1:] if first is not None and first + (size - sizes[0]) * slope <= limit]
        if first is not None and first <= limit:
            return max([sizes[0], *fitting]), share
    raise WorkFailed(
        f"a micro-batch of {sizes[0]} does not fit into the {limit:.1f} GiB that may be used; set training.micro_batch to auto and "
        "training.recompute to 1.0, shorten data.sequence_length, or use a larger GPU or several (docs/DETAILS.md)"
    )


def _peak(stepper: Stepper, ids: Tensor, share: float) -> float | None:
    """GiB at the peak of a real forward and backward pass over `ids` (b, T + 1), with room for the moments of AdamW; None: too much."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        stepper.split(len(ids), share)
        for last in (False, True):  # the second pass also holds the gradients of the first
            last_micro_batch(stepper.loss, last)
            stepper.gradients(ids)
        if stepper.run.layerwise_steps:
            stepper.switch(True)
            stepper.gradients(ids)
            stepper.switch(False)
        moments = 0 if stepper.optimizer.state else 8 * sum(local(parameter).numel() for parameter in stepper.parameters)
        return (torch.cuda.max_memory_allocated() + moments) / 2**30
    except torch.OutOfMemoryError:
        if stepper.run.world.size > 1:
            raise  # in the middle of an exchange with the others, after which neither ddp nor fsdp2 can be used again
        return None
    finally:
        stepper.optimizer.zero_grad(set_to_none=True)


def _usable(device: torch.device) -> float:
    """Bytes of the device that this process may hold."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free + torch.cuda.memory_reserved(device), total * torch.cuda.get_per_process_memory_fraction(device))


def out_of_memory(run: Run, split: Split, error: Exception) -> WorkFailed:
    """What to say, and to change, when a step did not fit."""
    return WorkFailed(
        f"the device ran out of memory with micro-batches of {split[0]} and {split[1]:.0%} of the blocks recomputed. Set "
        "training.micro_batch=auto and training.recompute=auto, or a smaller training.micro_batch "
        f"(a divisor of training.batch_size={run.spec.batch_size}), or training.recompute=1.0, and run with --discard; "
        f"is another process on the device? ({str(error).splitlines()[0]})"
    )
