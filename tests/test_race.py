"""The race against scoring every edit on every text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_models import VOCABULARY, random_ids, random_model
from utils.attacks.race import best_edit
from utils.attacks.referee import Referee
from utils.attacks.scoring import Scorer

SCORED = 10


def everywhere(ids: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """(K,) mean loss over all texts by the referee."""
    referee, means = Referee(random_model(spread=0.4)), []
    for where, what in zip(places, tokens, strict=True):
        edited = ids.clone()
        edited[:, where] = what
        means.append(referee.nll(edited, SCORED).double().mean())
    return torch.stack(means)


@pytest.mark.parametrize("texts", [3, 4, 20])
def test_the_winner_is_scored_on_all_texts_and_among_the_best(texts: int) -> None:
    ids, scorer = random_ids(texts, 14), Scorer(random_model(spread=0.4), "fp32")
    places, tokens = torch.full((VOCABULARY - 1, 1), 2), torch.arange(1, VOCABULARY)[:, None]
    winner, nll = best_edit(scorer, ids, places, tokens, SCORED)
    means = everywhere(ids, places, tokens)
    assert float(nll) == pytest.approx(float(means[winner]), rel=1e-5)
    assert int((means > nll + 1e-6).sum()) <= (0 if texts <= 4 else 2)


def test_it_scores_less() -> None:
    """39 edits on 4 texts, 19 on the next 4, 9 on the next 8, 4 on the last 16."""
    ids, scorer = random_ids(32, 14), Scorer(random_model(), "fp32")
    best_edit(scorer, ids, torch.full((39, 1), 2), torch.arange(1, 40)[:, None], SCORED)
    assert scorer.work.forwards == 39 * 4 + 19 * 4 + 9 * 8 + 4 * 16


def test_all_edits_run_where_none_may_be_dropped() -> None:
    ids, scorer = random_ids(20, 14), Scorer(random_model(spread=0.4), "fp32")
    places, tokens = torch.full((VOCABULARY - 1, 1), 2), torch.arange(1, VOCABULARY)[:, None]
    winner, _ = best_edit(scorer, ids, places, tokens, SCORED, keep=1.0)
    assert int(winner) == int(everywhere(ids, places, tokens).argmax())
