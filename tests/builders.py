"""Small models and token folders, made by hand for the tests of several modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from configs.schema import Monotone
from utils.data.shards import Shards
from utils.data.tokenise import key_of
from utils.data.tokens import Tokens
from utils.models.orders import all_plus
from utils.models.starts import start_within

VOCABULARY = 97


def small_config(**settings: Any) -> GPTNeoXConfig:
    """Two layers of width 16; end-of-text is id 0."""
    return GPTNeoXConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **settings,
    )


def small_model(seed: int = 0, *, scale: float = 0.3, tied: bool = False) -> PreTrainedModel:
    """A GPT-NeoX model with weights large enough that every token of the context matters."""
    config = small_config(vocab_size=VOCABULARY, intermediate_size=24, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def token_folder(folder: Path, documents: Sequence[Sequence[int]], subsets: Sequence[str] | None = None) -> Tokens:
    """A split on disk whose documents have these ids (end-of-text is 0, a document counts ten bytes a token)."""
    shards = Shards(folder, VOCABULARY, end_of_text=0)
    for document, subset in zip(documents, subsets or ["prose"] * len(documents), strict=True):
        shards.add(np.array(document), 10 * len(document), subset, key_of(str(list(document))))
    shards.mark(len(documents), duplicates=0, complete=True)
    return Tokens(folder)


def non_negative_start(model: PreTrainedModel, settings: Monotone) -> dict[str, float]:
    """Bring a model within the product order, as stage 1 does; returns the share of entries that were not, by matrix."""
    return start_within(model, settings, all_plus(model), torch.zeros(1, 1, dtype=torch.long), None)
