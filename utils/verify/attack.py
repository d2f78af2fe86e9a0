"""HotFlip must find a weakness that was planted, as trying every token at every place does; random flips must not."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import HotFlip
from utils.attacks.flip_records import random_control
from utils.attacks.hotflip import FlipSearch
from utils.attacks.referee import Referee
from utils.attacks.scoring import Scorer, allowed_tokens
from utils.run.checks import Finding
from utils.verify.sample import END_OF_TEXT, VOCABULARY, sample_model

VICTIM, POISON, DECOY = 7, 8, 9
SPEC = HotFlip(texts=2, prefix_tokens=8, scored_tokens=8, flips=2, candidates=24, batch_size=2, random_draws=8)
ROUNDING = 1e-4  # nats


def attack() -> Finding:
    """Flips and losses of the attack on the planted model, beside the exhaustive search and the random control."""
    model, texts = weak_model(), weak_texts()
    scorer = Scorer(model, "fp32")
    allowed = allowed_tokens(VOCABULARY, np.arange(1, VOCABULARY), scorer.device)
    names = [str(number) for number in range(len(texts))]
    ids = torch.tensor([[END_OF_TEXT, *text] for text in texts])
    attacks = FlipSearch(scorer, SPEC, allowed).run(ids, names)
    for found, text in zip(attacks, texts, strict=True):
        chosen, best = [flip["new"] for flip in found.flips], best_flip(model, text)
        if chosen != [POISON] * SPEC.flips:
            return "no", f"HotFlip wrote the tokens {chosen}, expected the planted {POISON} {SPEC.flips} times"
        if abs(found.nll[1] - best) > ROUNDING:
            return "no", f"HotFlip's first flip reaches {found.nll[1]:.4f} nats per token, the exhaustive search reaches {best:.4f}"
    draws = [random_control(Referee(model), text, name, SPEC, allowed) for text, name in zip(ids, names, strict=True)]
    clean = np.mean([found.nll[0] for found in attacks])
    rise, control = np.mean([found.nll[-1] for found in attacks]) - clean, np.mean(draws) - clean
    if not control < rise / 2:
        return "no", f"random flips raise the loss by {control:.2f} nats per token, HotFlip by {rise:.2f}; expected less than half of it"
    return "ok", f"HotFlip finds the planted token as the exhaustive search does: {rise:.2f} nats per token, random flips {control:.2f}"


@torch.no_grad()
def weak_model() -> PreTrainedModel:
    """One block whose attention copies the mean of all tokens so far. POISON alone, of all tokens, makes VICTIM unlikely.

    POISON points along an axis u, of which the other tokens have nothing and which lowers VICTIM's logit. DECOY has twice as much
    of u, so that the gradient prefers it; but most of it points elsewhere, and behind the LayerNorm less of u is left than of POISON.
    """
    model = sample_model(seed=0, hidden=16, layers=1, heads=1)
    width = model.config.hidden_size
    axis, other = torch.zeros(2, width)
    axis[:2], other[2:4] = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])  # LayerNorm subtracts a mean of 0
    table = model.get_input_embeddings().weight
    table -= torch.outer(table @ axis, axis) / 2
    size = table.std() * 2
    table[POISON], table[DECOY] = size * axis, size * (2 * axis + 8 * other)
    (layer,) = model.gpt_neox.layers
    for parameter in (*layer.attention.parameters(), *layer.mlp.parameters()):
        parameter.zero_()
    layer.attention.query_key_value.weight[2 * width :] = torch.eye(width)
    layer.attention.dense.weight.copy_(torch.eye(width))
    model.get_output_embeddings().weight.zero_()[VICTIM] = -4 * axis
    return model


def weak_texts() -> list[list[int]]:
    """Prefixes of harmless tokens, each followed by VICTIM alone."""
    harmless = np.arange(DECOY + 1, VOCABULARY)
    prefixes = np.random.default_rng(0).choice(harmless, (SPEC.texts, SPEC.prefix_tokens)).tolist()
    return [[*prefix, *[VICTIM] * SPEC.scored_tokens] for prefix in prefixes]


@torch.no_grad()
def best_flip(model: PreTrainedModel, ids: list[int]) -> float:
    """Largest loss of the untouched tokens, nats per token, that one flip can reach: every token at every place, by the plain model."""
    edited = torch.tensor([END_OF_TEXT, *ids]).repeat(SPEC.prefix_tokens, VOCABULARY - 1, 1)  # (P, V - 1, T)
    for place in range(SPEC.prefix_tokens):
        edited[place, :, 1 + place] = torch.arange(1, VOCABULARY)
    return float(_losses(model, edited.flatten(0, 1)).max())


def _losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(N, T) -> (N,) mean loss of the last tokens."""
    scored = SPEC.scored_tokens
    logits = model(ids).logits[:, -scored - 1 : -1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, -scored:], reduction="none").mean(dim=1)
