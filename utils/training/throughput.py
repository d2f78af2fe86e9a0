"""How much of the device a training run uses: the operations of a token, and what the card could do."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

# dense bf16 products with fp32 sums, FLOP/s, from the makers' data sheets; the first name that the card's contains counts
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A40": 150e12}


def flops_per_token(model: PreTrainedModel, length: int, whole_square: bool = False) -> float:
    """Floating-point operations of forward and backward pass for a token of a sequence of `length` = T: 6 N + 6 L d T.

    N: entries of all matrices that multiply (those of the blocks, 12 L d^2 in GPT-NeoX, and d V of the unembedding; not the input
    embedding). A token attends to T/2 others on average, 2 * 2 * d * T/2 operations a layer, three times for both passes; d is the width
    of all heads together. `whole_square` counts T others, as Chowdhery et al. 2022 (PaLM, appendix B) do: 6 N + 12 L d T. The teacher's
    pass is not counted: it is overhead of distillation, not progress of the model. Nor are activations that are computed twice.
    """
    config = model.config
    looked_up = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    head = model.get_output_embeddings().weight
    entries = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and id(weight) not in looked_up)
    entries += head.numel() if id(head) in looked_up else 0
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 6 * entries + (12 if whole_square else 6) * config.num_hidden_layers * width * length


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the card is built for in this precision of products; None where that is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
