"""The blocks of a transformer while it is trained: compiled, and some of them recomputed in the backward pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.schema import Compute

GRAPHS = 64  # versions of a block's code kept: shapes, formats, with and without gradient; beyond them PyTorch falls back to eager


def compiles(compute: Compute, device: torch.device) -> bool:
    """Whether blocks are compiled: on a GPU, unless the configuration says otherwise."""
    return compute.compile == "on" or (compute.compile == "auto" and device.type == "cuda")


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers, bottom to top."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def prepare_blocks(model: PreTrainedModel, compiled: bool, recompute: float = 0.0) -> None:
    """Compile every block in place (names of parameters stay), and recompute a share of them, evenly spread, in the backward pass.

    One block is compiled, not the model: all blocks share the graph, so compilation costs seconds. A compiled block already keeps only
    what is dear to compute again. `prepare_blocks(model, False)` undoes it.
    """
    found = blocks(model)
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # it would cut every block at DDP's buckets: blocks are small graphs already
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for number, block in enumerate(found):
        block._compiled_call_impl = None
        if compiled:
            block.compile(dynamic=False)
        if int((number + 1) * recompute) > int(number * recompute):
            call = block._compiled_call_impl or block._call_impl  # outside the compiled code: one graph for both kinds of block
            block._compiled_call_impl = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
