"""How many sequences go into a pass, and what happens when memory runs out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utils.attacks import budget
from utils.attacks.budget import Budget


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Budget:
    monkeypatch.setattr(budget, "ROWS", 100)
    monkeypatch.setattr(budget, "PATIENCE", 3)
    return Budget()


@pytest.mark.parametrize(("count", "rows", "expected"), [(10, 10, 10), (11, 10, 6), (25, 10, 9), (3, 60, 1), (3, 1000, 1), (1, 1, 1)])
def test_parts_are_equal_and_fit(small: Budget, count: int, rows: int, expected: int) -> None:
    assert small.sequences(count, rows) == expected


def test_results_come_in_order(small: Budget) -> None:
    values = torch.arange(25)
    assert torch.equal(small.spread(lambda part: values[part], 25, 10), values)


def test_it_halves_until_it_fits_remembers_and_grows_again(small: Budget) -> None:
    sizes: list[int] = []

    def run(part: slice, most: int) -> Tensor:
        size = part.stop - part.start
        sizes.append(size)
        if size > most:
            raise torch.OutOfMemoryError
        return torch.arange(part.start, part.stop)

    assert torch.equal(small.spread(lambda part: run(part, 3), 10, 10), torch.arange(10))
    assert sizes == [10, 5, 2, 2, 2, 4, 2, 2]  # three passes without an error: doubled, which was too much
    assert small.rows == 20
    sizes.clear()
    small.spread(lambda part: run(part, 10), 80, 10)
    assert sizes[0] == 2
    assert max(sizes) > 8
    assert small.rows == 100


def test_what_cannot_be_cut_is_an_error(small: Budget) -> None:
    def run(part: slice) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        small.spread(run, 4, 10)
    assert small.rows == 10
