"""GPT-NeoX models of a few thousand weights for tests: random ones, one with a planted weakness, and ones that cannot be attacked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.builders import small_config
from utils.data.tokens import Tokens

VOCABULARY = 40


def random_model(seed: int = 0, spread: float = 0.16, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Two layers of width 16. `spread` is the size of the initial weights; large ones make tokens matter as in a trained model."""
    config = small_config(vocab_size=vocabulary, intermediate_size=32, initializer_range=spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_ids(count: int, length: int, seed: int = 0) -> Tensor:
    """(count, 1 + length) texts behind end-of-text (id 0)."""
    ids = torch.randint(1, VOCABULARY, (count, 1 + length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def slow_nll(model: nn.Module, ids: Sequence[int], scored: int) -> float:
    """Mean loss of the last tokens of one text by the plain forward with labels of transformers."""
    labels = torch.tensor([[-100] * (len(ids) - scored) + list(ids[-scored:])])
    with torch.no_grad():
        return float(model(torch.tensor([list(ids)]), labels=labels).loss)


class Planted:
    """A model whose loss on texts that end in VICTIM rises by a known amount for each key token at its own place.

    All logits are equal but the VICTIM's, which falls by `strength` for each planted {place: token} that the text has; place 0
    stands behind end-of-text. Each key's embedding has length 1 along an axis of its own. The DECOY lies three times as far
    along all of them, where the effect is gone: its first-order gain is the largest, its true gain nothing.
    """

    VICTIM, DECOY = 7, 8

    def __init__(self, weak: dict[int, int], strength: float = 2.0) -> None:
        self.weak, self.strength = weak, strength
        self.model = random_model()
        table = self.model.get_input_embeddings().weight.data
        table[:, : len(weak)] = 0.0
        table[list(weak.values()), list(range(len(weak)))] = 1.0
        table[self.DECOY, : len(weak)] = 3.0
        self.model.get_output_embeddings().weight.data.zero_()[self.VICTIM, 0] = -strength
        self.model.base_model.register_forward_hook(self._feel, with_kwargs=True)

    def _feel(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> Any:
        """The number of keys in place becomes the first entry of every last hidden state, the others zero."""
        embedded = kwargs["inputs_embeds"]
        along = torch.stack([embedded[:, 1 + place, axis] for axis, place in enumerate(self.weak)])
        signal = torch.where(along > 2.0, 0.0, along).sum(dim=0)
        output.last_hidden_state = nn.functional.pad(signal[:, None, None], (0, embedded.shape[2] - 1)).expand(embedded.shape)
        return output

    def nll(self, keys: int) -> float:
        """Loss of VICTIM when so many key tokens are in place, nats."""
        fall = keys * self.strength
        return fall + math.log(VOCABULARY - 1 + math.exp(-fall))

    def texts(self, count: int, prefix: int, scored: int) -> Tensor:
        """(count, 1 + prefix + scored) texts without key tokens and decoys in the prefix."""
        ids = random_ids(count, prefix + scored, seed=3)
        for token in (*self.weak.values(), self.DECOY):
            ids[ids == token] = 1
        ids[:, 1 + prefix :] = self.VICTIM
        return ids


def blind_model() -> PreTrainedModel:
    """Logits of a position depend on its own token only: attention writes nothing."""
    model = random_model()
    for layer in model.gpt_neox.layers:
        layer.attention.dense.weight.data.zero_()
        layer.attention.dense.bias.data.zero_()
    return model


def deaf_model(seed: int = 0) -> PreTrainedModel:
    """Logits depend on no token at all."""
    model = random_model()
    model.gpt_neox.final_layer_norm.weight.data.zero_()
    model.gpt_neox.final_layer_norm.bias.data.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def write_tokens(folder: Path, count: int, seed: int = 0) -> Tokens:
    """A tokenised split in which a token nearly tells the next one."""
    random = np.random.default_rng(seed)
    ids = [1]
    while len(ids) < count:
        ids.append((3 * ids[-1] + int(random.integers(3))) % VOCABULARY)
    folder.mkdir(parents=True)
    np.array(ids, dtype="<u2").tofile(folder / "tokens.bin")
    index: dict[str, Any] = {"dtype": "<u2", "end_of_text": 0, "subsets": ["prose"], "documents": 1, "tokens": count}
    index |= {"duplicates": 0, "complete": True, "shards": []}
    (folder / "index.json").write_text(json.dumps(index))
    return Tokens(folder)
