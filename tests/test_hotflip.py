"""HotFlip: finds what is planted, finds nothing where there is nothing, and never touches what it scores."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import HotFlip
from tests.tiny_models import VOCABULARY, Planted, blind_model, deaf_model, random_ids, random_model, slow_nll
from utils.attacks import hotflip
from utils.attacks.controls import random_contexts
from utils.attacks.flip_records import random_control
from utils.attacks.hotflip import REPLACED, WIDER, Attack, FlipSearch, rank_correlation, replay
from utils.attacks.referee import Referee
from utils.attacks.scoring import Scorer, allowed_tokens, first_order_candidates
from utils.data.attack_texts import Alphabet

PREFIX, SCORED = 8, 6
ALPHABET = Alphabet(0, VOCABULARY, (0,))
ALLOWED = allowed_tokens(VOCABULARY, ALPHABET.writable(), torch.device("cpu"))


def spec(**settings: Any) -> HotFlip:
    return HotFlip(
        **{"texts": 5, "prefix_tokens": PREFIX, "scored_tokens": SCORED, "flips": 3, "candidates": 6, "batch_size": 2, "random_draws": 3}
        | settings
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


def attacked(model: PreTrainedModel, ids: Tensor, **settings: Any) -> list[Attack]:
    return run(Scorer(model, "fp32"), ids, spec(**settings))


def run(scorer: Scorer, ids: Tensor, settings: HotFlip, gradient: bool = True) -> list[Attack]:
    return FlipSearch(scorer, settings, ALLOWED, gradient=gradient).run(ids, [f"attack-{number}" for number in range(len(ids))])


def final(ids: Tensor, attacks: list[Attack]) -> Tensor:
    return torch.stack([replay(text, attack.flips, 3)[-1] for text, attack in zip(ids, attacks, strict=True)])


def test_a_planted_weakness_is_found_within_the_budget() -> None:
    """Two keys, two flips: the exact rises, although the decoy has the largest first-order gain at both places."""
    planted = Planted({2: 11, 5: 12})
    ids = planted.texts(3, PREFIX, SCORED)
    for attack in attacked(planted.model, ids, flips=2, candidates=4):
        assert {(flip["position"], flip["new"]) for flip in attack.flips} == {(2, 11), (5, 12)}
        assert attack.nll == pytest.approx([planted.nll(keys) for keys in range(3)], abs=1e-4)


def test_the_decoy_would_win_without_exact_scores() -> None:
    """It is the only candidate, and does nothing; the key is found in the wider round, with all of whose candidates the work is counted."""
    planted = Planted({2: 11})
    scorer, ids = Scorer(planted.model, "fp32"), planted.texts(1, PREFIX, SCORED)
    slope = scorer.gradient(ids, SCORED, slice(1, 1 + PREFIX))[0]
    assert first_order_candidates(scorer, slope, ids[0, 1 : 1 + PREFIX], ALLOWED, 2).tolist() == [[2, Planted.DECOY], [2, 11]]
    (attack,) = attacked(planted.model, ids, flips=1, candidates=1)
    assert [(flip["position"], flip["new"]) for flip in attack.flips] == [(2, 11)]
    assert (attack.wider_rounds, attack.evaluations, attack.stuck) == (1, 1 + WIDER, False)


def test_a_spent_weakness_ends_the_attack() -> None:
    """One key and a budget of four: a single flip, and the curve goes on flat."""
    planted = Planted({2: 11})
    (attack,) = attacked(planted.model, planted.texts(1, PREFIX, SCORED), flips=4)
    assert (len(attack.flips), attack.wider_rounds, attack.stuck) == (1, 1, True)
    assert attack.curve(4) == pytest.approx([planted.nll(0)] + 4 * [planted.nll(1)], abs=1e-4)
    assert (attack.forwards, attack.backwards) == (1 + 6 + 6 + 6 * WIDER, 2 * 4)
    assert attack.flips[0]["predicted"] == pytest.approx(planted.strength * (1 - 1 / VOCABULARY), rel=0.02)


def test_a_deaf_model_is_not_attacked() -> None:
    """Its loss is the same for every text: no flip is accepted, and the random control is exactly zero."""
    ids = random_ids(3, PREFIX + SCORED)
    scorer = Scorer(deaf_model(), "fp32")
    for attack, row in zip(run(scorer, ids, spec()), ids, strict=True):
        assert attack.flips == []
        assert attack.curve(3) == 4 * attack.nll
        assert attack.zero_gradient == 1.0
        assert random_control(Referee(scorer.model), row, "attack-0", spec(), ALLOWED) == [attack.nll[0]] * 3


def test_a_blind_model_is_attacked_next_to_the_scored_tokens_alone() -> None:
    ids = random_ids(3, PREFIX + SCORED)
    scorer = Scorer(blind_model(), "fp32")
    attacks = run(scorer, ids, spec())
    assert {flip["position"] for attack in attacks for flip in attack.flips} <= {PREFIX - 1}
    clean, after = scorer.token_nll(ids, SCORED), scorer.token_nll(final(ids, attacks), SCORED)
    assert torch.equal(clean[:, 1:], after[:, 1:])


@pytest.mark.parametrize("seed", range(3))
def test_a_step_with_all_candidates_is_the_best_of_all_single_edits(seed: int) -> None:
    """Brute force by the plain forward of transformers, over every place and token."""
    model, prefix = random_model(seed), 3
    ids = random_ids(2, prefix + SCORED, seed)
    attacks = attacked(model, ids, prefix_tokens=prefix, flips=1, candidates=prefix * VOCABULARY)
    for attack, text in zip(attacks, ids.tolist(), strict=True):
        best = max(
            slow_nll(model, [*text[: 1 + place], token, *text[2 + place :]], SCORED)
            for place, token in itertools.product(range(prefix), range(1, VOCABULARY))
        )
        assert attack.nll[1] == pytest.approx(best, rel=1e-5)


def test_the_curve_never_falls_and_is_the_truth(model: PreTrainedModel) -> None:
    """Replaying the flips one by one by the plain forward gives the curve; scored tokens and end-of-text are as they were."""
    ids = random_ids(4, PREFIX + SCORED, seed=2)
    for attack, text in zip(attacked(model, ids, flips=5), ids.tolist(), strict=True):
        assert attack.nll == sorted(attack.nll)
        assert len(attack.nll) == 6
        replayed, curve = list(text), [slow_nll(model, text, SCORED)]
        for flip in attack.flips:
            assert replayed[1 + flip["position"]] == flip["old"] != flip["new"] != 0
            replayed[1 + flip["position"]] = flip["new"]
            curve.append(slow_nll(model, replayed, SCORED))
        assert attack.nll[: len(curve)] == pytest.approx(curve, rel=1e-5)
        assert replay(torch.tensor(text), attack.flips, 5)[-1].tolist() == replayed
        assert replayed[0] == 0
        assert replayed[-SCORED:] == text[-SCORED:]
        assert len({flip["position"] for flip in attack.flips}) == len(attack.flips) > 0


def test_flips_do_more_than_chance(model: PreTrainedModel) -> None:
    ids = random_ids(4, PREFIX + SCORED, seed=2)
    scorer = Scorer(model, "fp32")
    for number, (attack, row) in enumerate(zip(run(scorer, ids, spec()), ids, strict=True)):
        assert attack.nll[-1] > max(random_control(Referee(scorer.model), row, f"attack-{number}", spec(), ALLOWED))


def test_random_control_scores_the_drawn_texts(model: PreTrainedModel) -> None:
    """With all places flipped and one token allowed there is only one outcome."""
    (row,) = random_ids(1, PREFIX + SCORED)
    only = torch.zeros(VOCABULARY, dtype=torch.bool)
    only[9] = True
    found = random_control(Referee(model), row, "attack-0", spec(flips=PREFIX), only)
    assert found == pytest.approx([slow_nll(model, [0, *[9] * PREFIX, *row.tolist()[-SCORED:]], SCORED)] * 3, rel=1e-5)


def test_batching_does_not_change_an_attack(model: PreTrainedModel) -> None:
    ids = random_ids(4, PREFIX + SCORED, seed=4)
    together = attacked(model, ids)
    search = FlipSearch(Scorer(model, "fp32"), spec(), ALLOWED)
    alone = [search.run(row[None], [f"attack-{number}"])[0] for number, row in enumerate(ids)]
    assert torch.equal(final(ids, together), final(ids, alone))


def test_both_arms_get_the_same_budget() -> None:
    """Texts x (1 clean + flips x candidates) forwards and texts x flips x gradients backwards, whatever the model."""
    ids, spent = random_ids(3, PREFIX + SCORED, seed=2), []
    for seed in (0, 1):
        scorer = Scorer(random_model(seed), "fp32")
        attacks = run(scorer, ids, spec())
        assert not any(attack.stuck for attack in attacks)
        spent.append((scorer.forwards, scorer.backwards))
        assert sum(attack.flops for attack in attacks) == scorer.work.flops
        assert sum(attack.forwards for attack in attacks) == scorer.forwards
        assert sum(attack.backwards for attack in attacks) == scorer.backwards
    assert spent == [(3 * (1 + 3 * 6), 3 * 3 * 4)] * 2


def test_without_a_gradient_none_is_taken(model: PreTrainedModel) -> None:
    """The same number of evaluations at every flip; the candidates are those of the text and the flip, not of the model."""
    ids = random_ids(3, PREFIX + SCORED, seed=2)
    scorer = Scorer(model, "fp32")
    attacks = run(scorer, ids, spec(), gradient=False)
    assert scorer.backwards == 0
    for attack in attacks:
        assert attack.evaluations == 3 * 6 + attack.wider_rounds * 6 * WIDER
        assert (attack.backwards, attack.zero_gradient) == (0, None)
        assert "predicted" not in attack.flips[0]
    assert [attack.flips for attack in attacks] != [attack.flips for attack in run(scorer, ids, spec())]


def test_a_search_without_gradient_finds_what_brute_force_finds(model: PreTrainedModel) -> None:
    """With all substitutions as candidates, in any order."""
    ids, everything = random_ids(2, 2 + SCORED, seed=1), spec(prefix_tokens=2, flips=1, candidates=2 * VOCABULARY)
    scorer = Scorer(model, "fp32")
    by_chance, by_gradient = run(scorer, ids, everything, gradient=False), run(scorer, ids, everything)
    assert [attack.nll[-1] for attack in by_chance] == pytest.approx([attack.nll[-1] for attack in by_gradient])
    assert [attack.evaluations for attack in by_chance] == [attack.evaluations for attack in by_gradient]


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_the_gradient_foretells_is_recorded(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Predicted gain and rank correlation of the first flip, again by hand from gradient and exact scores. Of several rounds the
    correlation is that of the first, whose candidates are the best by first order."""
    monkeypatch.setattr(hotflip, "ROUNDS", rounds)
    ids, scorer = random_ids(1, PREFIX + SCORED, seed=5), Scorer(model, "fp32")
    (attack,) = run(scorer, ids, spec(candidates=12 * rounds, gradients=1))
    slope = scorer.gradient(ids, SCORED, slice(1, 1 + PREFIX))[0]
    edits = first_order_candidates(scorer, slope, ids[0, 1 : 1 + PREFIX], ALLOWED, 12).tolist()
    table = scorer.embeddings
    predicted = [float(slope[place] @ (table[token] - table[ids[0, 1 + place]])) for place, token in edits]
    true = [slow_nll(model, [*ids[0, : 1 + place].tolist(), token, *ids[0, 2 + place :].tolist()], SCORED) for place, token in edits]
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, true)]
    flip = attack.flips[0]
    assert flip["rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    if rounds == 1:
        assert flip["predicted"] == pytest.approx(predicted[int(np.argmax(true))], rel=1e-4)
    assert attack.zero_gradient == 0.0


def test_gradients_are_averaged_over_random_contexts(model: PreTrainedModel) -> None:
    """Drawn for the text and the flip: the first flip's candidates by hand. Places that are not replaced keep their tokens."""
    ids, scorer = random_ids(1, PREFIX + SCORED, seed=5), Scorer(model, "fp32")
    written = random_contexts(0, ("context", "attack-0", 0), 3, PREFIX, REPLACED, np.arange(1, VOCABULARY))
    copies = ids.repeat(4, 1)
    for copy_, row in zip(copies[1:], written.tolist(), strict=True):
        for place, token in enumerate(row):
            copy_[1 + place] = token if token >= 0 else ids[0, 1 + place]
    slope = scorer.gradient(copies, SCORED, slice(1, 1 + PREFIX)).mean(dim=0)
    edits = first_order_candidates(scorer, slope, ids[0, 1 : 1 + PREFIX], ALLOWED, 6)
    scores = scorer.edited_nll(ids, torch.zeros(6, dtype=torch.long), 1 + edits[:, :1], edits[:, 1:], SCORED)
    (attack,) = run(scorer, ids, spec(flips=1))
    assert [attack.flips[0]["position"], attack.flips[0]["new"]] == edits[int(scores.argmax())].tolist()
    assert 0.3 < float((written >= 0).mean()) < 0.9


def test_rank_correlation_of_nothing_is_unknown() -> None:
    assert rank_correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) is None
    assert rank_correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert rank_correlation(np.array([1.0, 5.0, 2.0]), np.array([0.1, 0.9, 0.3])) == pytest.approx(1.0)


@pytest.mark.parametrize("gradient", [True, False])
def test_goes_on_from_any_flip(model: PreTrainedModel, gradient: bool) -> None:
    """What is stored after a flip is enough to end where the straight search ends."""
    ids, names = random_ids(3, PREFIX + SCORED, seed=2), ["a", "b", "c"]
    stored: list[list[Attack]] = []
    search = FlipSearch(Scorer(model, "fp32"), spec(), ALLOWED, gradient=gradient)
    straight = search.run(ids, names, after_flip=lambda attacks: stored.append(copy.deepcopy(attacks)))
    assert [max(len(attack.flips) for attack in attacks) for attacks in stored] == [1, 2, 3]
    for attacks in stored:
        assert search.run(ids, names, attacks) == straight


@pytest.mark.parametrize("gradient", [True, False])
def test_a_search_that_is_over_holds_no_model(gradient: bool) -> None:
    """Without the garbage collector's help: models of several gigabytes cannot wait for it."""
    gc.disable()
    try:
        scorer = Scorer(random_model(), "fp32")
        alive = weakref.ref(scorer)
        run(scorer, random_ids(2, PREFIX + SCORED), spec(), gradient)
        del scorer
        assert alive() is None
    finally:
        gc.enable()
