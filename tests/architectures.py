"""A random model of a few thousand weights for every architecture that has an adapter, made from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 53
PLAIN, GATED = ("gpt_neox", "gpt2", "opt"), ("llama", "mistral", "qwen2", "qwen3", "gemma")
_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 64},
    "opt": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    "gemma": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
}
_COMMON = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def architecture(kind: str, seed: int = 0, *, positive_gains: bool = False, **settings: Any) -> PreTrainedModel:
    """Weights and norms are random, so that no gain is one, no bias zero and no adapter right by chance."""
    shape = _SHAPES[kind] if kind in ("gpt2", "opt") else _COMMON | _SHAPES.get(kind, {})
    if kind == "gpt_neox":
        shape = {key: value for key, value in shape.items() if key != "num_key_value_heads"}
    shape = shape | {"max_position_embeddings": 64} if kind != "gpt2" else shape
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **tokens, **settings), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            gain = 0.0 if parameter.ndim > 1 else 1.0 if positive_gains else 0.5
            size = 0.2 if parameter.ndim == 1 and positive_gains else 0.4
            parameter.copy_(gain + size * torch.randn(parameter.shape, generator=generator))
    return model
