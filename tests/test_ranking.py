"""What to score next, from what was scored: against the textbook's formula, on planted structure, and without losing a candidate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.attacks.ranking import Ranking, hoped_gains

PLACES, TOKENS = 4, 10


def directions(seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(TOKENS, 3, generator=torch.manual_seed(seed)), dim=1)


def every_edit() -> Tensor:
    return torch.cartesian_prod(torch.arange(PLACES), torch.arange(TOKENS))


def begun(edits: Tensor, rows: list[int], gains: list[float], towards: Tensor, predicted: Tensor | None = None) -> Ranking:
    """A ranking of a text whose loss is 2 nats, sorted by the gains of its first rows."""
    found = Ranking(edits.clone(), torch.zeros(len(edits)) if predicted is None else predicted.clone())
    assert found.next(len(rows), 2.0, towards, None) == rows
    found.scored(rows, 2.0 + torch.tensor(gains))
    found.next(1, 2.0, towards, None)
    return found


def test_expected_gains_are_those_of_the_textbook() -> None:
    """Rasmussen and Williams 2006, eq. 2.25, by a dense inverse; the mean is the line of least squares."""
    towards, random = directions(), np.random.default_rng(1)
    edits = every_edit()[torch.from_numpy(random.permutation(PLACES * TOKENS))]
    predicted, gains = random.normal(size=len(edits)), random.normal(size=6) + np.arange(6)
    predicted[:6] += 2 * np.arange(6)
    rise, level = np.polyfit(predicted[:6], gains, 1)
    assert rise > 0
    unit = towards[edits[:, 1]].double().numpy()
    place = (edits[:, :1] == edits[:, 0]).double().numpy()
    likeness = place + unit @ unit.T + place * (unit @ unit.T)
    inverse = np.linalg.inv(likeness[:6, :6] + 0.15 * np.eye(6))
    residual = gains - level - rise * predicted[:6]
    expected = level + rise * predicted[6:] + likeness[6:, :6] @ inverse @ residual
    on = (torch.from_numpy(each) for each in (predicted[:6], gains))
    assert hoped_gains(edits[:6], *on, edits[6:], torch.from_numpy(predicted[6:]), towards).numpy() == pytest.approx(expected, abs=1e-5)


def test_places_and_tokens_that_did_well_come_next() -> None:
    """One token scored at each place: the near token at the best place leads, that at the worst place comes last."""
    towards = F.normalize(torch.eye(TOKENS), dim=1)
    towards[7] = F.normalize(towards[2] + 0.2 * towards[7], dim=0)
    edits = torch.tensor([(place, 2) for place in range(PLACES)] + [(place, token) for place in range(PLACES) for token in (5, 7)])
    found = begun(edits, [0, 1, 2, 3], [0.0, 0.1, 0.9, -0.5], towards)
    assert found.edits[4].tolist() == [2, 7]
    assert found.edits[-1].tolist() == [3, 7]


def test_first_order_gains_lead_as_far_as_they_foretell() -> None:
    """Where they foretell, the order is theirs; where the true gains fall as they rise, they count for nothing."""
    towards, edits = torch.eye(TOKENS), torch.stack([torch.arange(TOKENS), torch.arange(TOKENS)], dim=1)
    predicted = torch.tensor([5.0, 4.0, 3.0, 1.0, 0.0, 2.0, -1.0, 1.5, 0.5, 2.5])
    right = begun(edits, [0, 1, 2], [0.5, 0.4, 0.3], towards, predicted)
    assert right.predicted[3:].tolist() == sorted(predicted[3:].tolist(), reverse=True)
    wrong = begun(edits, [0, 1, 2], [0.3, 0.4, 0.5], towards, predicted)
    assert wrong.edits[3:].tolist() == edits[3:].tolist()


def test_nothing_learnt_changes_nothing() -> None:
    edits, towards = every_edit(), directions()
    found = begun(edits, [0, 1, 2], [0.0, 0.0, 0.0], towards, torch.arange(len(edits)).float().flip(0))
    assert found.edits.tolist() == edits.tolist()


def test_every_candidate_is_scored_once_with_its_own_gain() -> None:
    """Also where some are left out, for which nothing is learnt."""
    edits, towards, random = every_edit(), directions(), torch.manual_seed(3)
    predicted = torch.randn(len(edits), generator=random)
    own = {tuple(edit): float(gain) for edit, gain in zip(edits.tolist(), predicted, strict=True)}
    found = Ranking(edits.clone(), predicted.clone())
    while found.tried < len(edits):
        rows = found.next(7, 0.0, towards, lambda some: (some[:, 1] != 4).tolist())
        found.scored(rows, torch.randn(len(rows), generator=random))
    scored = [tuple(edit) for edit in found.edits[found.rows].tolist()]
    assert sorted(scored) == sorted(edit for edit in own if edit[1] != 4)
    assert [float(gain) for gain in found.predicted[found.rows]] == [own[edit] for edit in scored]
    assert len(found.nll) == len(scored)
