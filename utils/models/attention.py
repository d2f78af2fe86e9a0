"""Causal attention over rows without padding: no mask is built, and the host never waits for the device.

Queries may be the last rows of the keys only: the others' keys and values are then those of an earlier pass (utils/models/prefix.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.run.errors import InputError

NAME = "packed_causal"
FASTEST_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ANY_SHAPE = FASTEST_FIRST[1:]  # cuDNN makes a plan for every new shape, which costs more than it saves where shapes keep changing


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> tuple[Tensor, None]:
    window = options.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise InputError(f"model: attention sees {window} tokens back, expected the whole sequence of {key.shape[2]}; shorten the sequence")
    rows, seen = query.shape[2], key.shape[2]
    mask = causal_lower_right(rows, seen) if 1 < rows < seen else None  # a name for the kernel, not a matrix
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, _attention)  # without a mask function of its own, transformers builds no mask


@contextmanager
def packed_causal(*models: PreTrainedModel, kernels: Sequence[SDPBackend] = FASTEST_FIRST) -> Iterator[None]:
    """Let the models attend causally to whole rows. By default transformers looks into the position ids of every forward pass
    for packed texts, for which the host waits until the device has caught up."""
    before = [model.config._attn_implementation for model in models]
    with ExitStack() as stack:
        if torch.cuda.is_available():  # whatever the models say: one to be cut over processes is not there yet
            stack.enter_context(sdpa_kernel(list(kernels), set_priority=True))
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(NAME)
            stack.callback(model.set_attn_implementation, name)
        yield
