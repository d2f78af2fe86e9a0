"""The scorer against a plain forward of transformers, its gradient against finite differences, candidates against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import VOCABULARY, blind_model, random_ids, random_model, slow_nll
from utils.attacks import scoring
from utils.attacks.scoring import Scorer, allowed_tokens, first_order_candidates
from utils.data.attack_texts import Alphabet

SCORED = 6


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


@pytest.fixture
def scorer(model: PreTrainedModel) -> Scorer:
    return Scorer(model, "fp32")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(5, 14)


@pytest.mark.parametrize("scored", [1, SCORED, 14])
def test_nll_equals_the_plain_forward_of_each_text(scorer: Scorer, model: PreTrainedModel, ids: Tensor, scored: int) -> None:
    assert scorer.nll(ids, scored).tolist() == pytest.approx([slow_nll(model, row, scored) for row in ids.tolist()], rel=1e-5)


def test_token_nll_is_the_loss_of_each_single_token(scorer: Scorer, model: PreTrainedModel, ids: Tensor) -> None:
    losses = scorer.token_nll(ids, SCORED)
    for row, text in enumerate(ids.tolist()):
        expected = [slow_nll(model, text[: len(text) - back], 1) for back in reversed(range(SCORED))]
        assert losses[row].tolist() == pytest.approx(expected, rel=1e-4)


def test_many_texts_are_scored_in_parts(scorer: Scorer, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scorer.nll(ids, SCORED)
    for budget in (1, 30, 45):
        monkeypatch.setattr(scoring, "ROW_BUDGET", budget)
        torch.testing.assert_close(scorer.nll(ids, SCORED), whole, rtol=1e-5, atol=1e-6)


def test_bf16_products_give_fp32_losses_that_are_near(model: PreTrainedModel, scorer: Scorer, ids: Tensor) -> None:
    rough = Scorer(model, "bf16").nll(ids, SCORED)
    assert rough.dtype == torch.float32
    exact = scorer.nll(ids, SCORED)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(rough, exact)


def test_gradient_equals_finite_differences(ids: Tensor) -> None:
    """Central ones, in fp64 up to the logits."""
    model = random_model().double()
    scorer = Scorer(model, "fp32")
    scorer.embeddings = scorer.embeddings.double()
    few = ids[:2]
    slope = scorer.gradient(few, SCORED, slice(1, 9))
    embedded, step = scorer._embed(few), 2e-3
    for text, place, entry in [(0, 1, 0), (0, 8, 3), (1, 4, 15), (1, 7, 7), (0, 5, 11)]:
        ahead, behind = embedded.clone(), embedded.clone()
        ahead[text, place, entry] += step
        behind[text, place, entry] -= step
        with torch.no_grad():
            up, down = (float(scorer._losses(few, each, SCORED).double().mean(dim=1)[text]) for each in (ahead, behind))
        assert float(slope[text, place - 1, entry]) == pytest.approx((up - down) / (2 * step), rel=5e-3, abs=3e-4)


def test_gradient_of_a_text_does_not_depend_on_its_neighbours(scorer: Scorer, ids: Tensor) -> None:
    together = scorer.gradient(ids, SCORED, slice(1, 9))
    for row in range(len(ids)):
        torch.testing.assert_close(scorer.gradient(ids[row : row + 1], SCORED, slice(1, 9))[0], together[row], rtol=1e-4, atol=1e-6)


def test_tokens_before_an_edit_lose_nothing(scorer: Scorer, ids: Tensor) -> None:
    """A causal model: exactly zero, not nearly. After the edit there is an effect."""
    for place in (3, 7, 10):
        edited = ids.clone()
        edited[:, place] = (edited[:, place] + 1) % VOCABULARY
        before, after = scorer.token_nll(ids, 14), scorer.token_nll(edited, 14)
        assert torch.equal(before[:, : place - 1], after[:, : place - 1])  # column t is the loss of token t + 1
        assert bool((before[:, place:] != after[:, place:]).any(dim=1).all())


def test_a_blind_model_feels_an_edit_only_where_it_is(ids: Tensor) -> None:
    """Its edit shows in the edited token's own loss and in the next one's; everything else is exactly equal."""
    scorer = Scorer(blind_model(), "fp32")
    edited = ids.clone()
    edited[:, 6] = (edited[:, 6] + 1) % VOCABULARY
    changed = scorer.token_nll(ids, 14) != scorer.token_nll(edited, 14)
    assert changed.any(dim=0).nonzero().flatten().tolist() == [5, 6]
    assert float(scorer.gradient(ids, SCORED, slice(1, 8)).abs().max()) == 0.0


def slow_candidates(scorer: Scorer, slope: Tensor, current: Tensor, allowed: Tensor, count: int) -> list[tuple[float, int, int]]:
    gains = [
        (float(slope[place] @ (scorer.embeddings[token] - scorer.embeddings[int(current[place])])), place, token)
        for place in range(len(current))
        for token in range(VOCABULARY)
        if bool(allowed[place, token]) and token != int(current[place])
    ]
    return sorted(gains, reverse=True)[:count]


@pytest.mark.parametrize("count", [1, 7, 60])
def test_candidates_are_the_best_of_all_substitutions(scorer: Scorer, ids: Tensor, count: int) -> None:
    slope = scorer.gradient(ids[:1], SCORED, slice(1, 9))[0]
    allowed = torch.rand(8, VOCABULARY, generator=torch.Generator().manual_seed(1)) < 0.7
    current = ids[0, 1:9]
    found = first_order_candidates(scorer, slope, current, allowed, count).tolist()
    assert found == [[place, token] for _, place, token in slow_candidates(scorer, slope, current, allowed, count)]


def test_fewer_candidates_than_asked_for(scorer: Scorer) -> None:
    """The current token and what is not allowed are never proposed; a plain (V,) mask holds for all places."""
    slope, current = torch.ones(2, 16), torch.tensor([3, 9])
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    assert first_order_candidates(scorer, slope, current, allowed, 5).shape == (0, 2)
    allowed[[3, 4]] = True
    found = {tuple(pair) for pair in first_order_candidates(scorer, slope, current, allowed, 5).tolist()}
    assert found == {(0, 4), (1, 3), (1, 4)}


def test_special_tokens_are_not_allowed() -> None:
    mask = allowed_tokens(8, Alphabet(0, 6, (0, 3)).writable(), torch.device("cpu"))
    assert mask.tolist() == [False, True, True, False, True, True, False, False]  # the model has two rows without a token


def test_work_is_counted(scorer: Scorer, ids: Tensor) -> None:
    scorer.nll(ids, SCORED)
    scorer.token_nll(ids[:2], SCORED)
    scorer.gradient(ids[:3], SCORED, slice(1, 3))
    assert (scorer.forwards, scorer.backwards) == (7, 3)


def test_weights_get_no_gradient(scorer: Scorer, model: PreTrainedModel, ids: Tensor) -> None:
    scorer.gradient(ids, SCORED, slice(1, 3))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
