"""Successive halving of edits: exact scores for those that arrive, and the work that the rounds promise."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import VOCABULARY, Planted, random_ids, random_model
from utils.attacks.race import race
from utils.attacks.scoring import Scorer

SCORED, COUNT = 6, 24


def edits() -> tuple[torch.Tensor, torch.Tensor]:
    """A token each at place 2, in no order."""
    tokens = 1 + torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(0))[:COUNT, None]
    return torch.full_like(tokens, 2), tokens


def exact(scorer: Scorer, ids: torch.Tensor) -> torch.Tensor:
    """(K,) mean over all texts, one edit at a time."""
    places, tokens = edits()
    copies = [ids.scatter(1, places[row].expand(len(ids), 1), tokens[row].expand(len(ids), 1)) for row in range(COUNT)]
    return torch.stack([scorer.nll(copy, SCORED).double().mean() for copy in copies])


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_those_that_arrive_have_their_exact_loss_on_all_texts(keep: float) -> None:
    scorer, ids = Scorer(random_model(), "fp32"), random_ids(13, 10)
    numbers, nll = race(scorer, ids, *edits(), SCORED, keep, least=3)
    torch.testing.assert_close(nll, exact(scorer, ids)[numbers], rtol=1e-5, atol=1e-6)
    assert nll.tolist() == sorted(nll.tolist(), reverse=True)
    assert len(numbers) == {0.25: 3, 0.5: 6, 1.0: COUNT}[keep]


def test_keeping_all_is_scoring_all() -> None:
    scorer, ids = Scorer(random_model(), "fp32"), random_ids(9, 10)
    numbers, _ = race(scorer, ids, *edits(), SCORED, 1.0)
    assert float(exact(scorer, ids)[numbers[0]]) == pytest.approx(float(exact(scorer, ids).max()))


def test_a_weakness_on_which_all_texts_agree_wins() -> None:
    planted = Planted({1: 11})
    places, tokens = edits()
    numbers, nll = race(Scorer(planted.model, "fp32"), planted.texts(16, 4, SCORED), places, tokens, SCORED, 0.25)
    assert int(tokens[numbers[0]]) == 11
    assert float(nll[0]) == pytest.approx(planted.nll(1), abs=1e-4)


def test_work_of_the_rounds() -> None:
    """24 edits on 4 texts, 12 on 4 more, 6 on the other 8."""
    scorer = Scorer(random_model(), "fp32")
    race(scorer, random_ids(16, 10), *edits(), SCORED, 0.5)
    assert scorer.forwards == 24 * 4 + 12 * 4 + 6 * 8
