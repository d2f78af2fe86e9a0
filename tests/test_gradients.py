"""What a gradient is worth: known answers on models whose loss is linear in the embeddings, deaf, or neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import HotFlip
from tests.tiny_models import VOCABULARY, deaf_model, random_ids, random_model, slow_nll
from utils.attacks.controls import random_substitutions
from utils.attacks.gradients import SUBSTITUTIONS, gradient_facts
from utils.attacks.hotflip import rank_correlation
from utils.attacks.scoring import Scorer, allowed_tokens

PREFIX, SCORED = 8, 6
SPEC = HotFlip(texts=1, prefix_tokens=PREFIX, scored_tokens=SCORED, flips=1, candidates=4)
ALLOWED = allowed_tokens(VOCABULARY, np.arange(1, VOCABULARY), torch.device("cpu"))


def scorers(model: PreTrainedModel) -> tuple[Scorer, Scorer]:
    return Scorer(model, "fp32"), Scorer(model, "bf16")


def test_nothing_is_known_of_a_deaf_model() -> None:
    facts = gradient_facts(*scorers(deaf_model()), random_ids(1, PREFIX + SCORED)[0], "attack-0", SPEC, ALLOWED)
    assert facts == {"random_rank_correlation": None, "bf16_cosine": None}


def test_foretold_and_true_gains_by_the_plain_forward() -> None:
    model, ids = random_model(), random_ids(1, PREFIX + SCORED, seed=3)[0]
    scorer = Scorer(model, "fp32")
    facts = gradient_facts(*scorers(model), ids, "attack-0", SPEC, ALLOWED)
    slope = scorer.gradient(ids[None], SCORED, slice(1, 1 + PREFIX))[0]
    drawn = random_substitutions(0, ("foretold", "attack-0"), SUBSTITUTIONS, ids[1 : 1 + PREFIX].numpy(), np.arange(8), np.arange(1, 40))
    foretold, true = [], []
    for place, token in drawn.tolist():
        text = ids.tolist()
        foretold.append(float(slope[place] @ (scorer.embeddings[token] - scorer.embeddings[text[1 + place]])))
        text[1 + place] = token
        true.append(slow_nll(model, text, SCORED))
    assert facts["random_rank_correlation"] == pytest.approx(rank_correlation(np.array(foretold), np.array(true)), abs=0.01)
    assert 0.9 < facts["bf16_cosine"] < 1.0


def test_small_steps_are_foretold_well() -> None:
    """Embeddings so near to each other that the loss is nearly linear between them."""
    model = random_model()
    table = model.get_input_embeddings().weight.data
    table[:] = table[:1] + 0.02 * (table - table[:1])
    facts = gradient_facts(*scorers(model), random_ids(1, PREFIX + SCORED, seed=3)[0], "attack-0", SPEC, ALLOWED)
    assert facts["random_rank_correlation"] > 0.95
