"""Which substitutions of a text to score next: first-order gains, corrected by the gains of those that were scored already.

What a gradient foretells of a whole substitution is poor, but what one did says much of others at its place, of tokens that lie near its
token, and most of near tokens at its place: a Gaussian process around the first-order gains (Rasmussen and Williams 2006, eq. 2.25 and
2.26; for attacks on text without gradients Lee et al. 2022, ICML, "Query-efficient and scalable black-box adversarial attacks on
discrete sequential data via Bayesian optimization").

n substitutions, k of them scored, V vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.attacks.round_trip import first_kept

PLACE, TOKEN, BOTH = 1.0, 0.3, 3.0  # covariance of what two substitutions share, in units of each other
NOISE = 0.05  # of a gain's variance, which no likeness explains
BONUS = 0.5  # standard deviations that not knowing is worth


@dataclass
class Ranking:
    """Substitutions of one text, the most promising first; the first `tried` were looked at, those in `rows` scored."""

    edits: Tensor  # (n, 2) of (place, token), on the CPU
    predicted: Tensor  # (n,) first-order gains, nats per untouched token, on the CPU; zeros without a gradient
    tried: int = 0
    rows: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)  # of the scored ones

    def next(self, count: int, kept: Callable[[Tensor], list[bool]] | None) -> list[int]:
        """Rows of the next `count`, by `kept` of the next that pass it."""
        rest = range(self.tried, len(self.edits))
        rows = first_kept(rest, count, lambda some: kept(self.edits[some])) if kept else list(rest[:count])
        self.tried = rows[-1] + 1 if rows else len(self.edits)
        return rows

    def learn(self, rows: Sequence[int], nll: Tensor, now: float, directions: Tensor) -> None:
        """Take the losses of the substitutions at `rows`, and sort those that were not looked at by what is to be hoped of them.

        now: nats per token of the text as it is; directions (V, d): of the tokens' embeddings, of length one.
        """
        self.rows += rows
        self.nll += nll.tolist()
        if not self.rows or self.tried == len(self.edits):
            return
        gains = torch.tensor(self.nll, dtype=torch.float64) - now
        rest = slice(self.tried, None)
        hoped = hoped_gains(self.edits[self.rows], self.predicted[self.rows], gains, self.edits[rest], self.predicted[rest], directions)
        order = hoped.argsort(descending=True, stable=True).cpu()
        self.edits[rest], self.predicted[rest] = self.edits[rest][order], self.predicted[rest][order]


def hoped_gains(known: Tensor, foretold: Tensor, gains: Tensor, edits: Tensor, predicted: Tensor, directions: Tensor) -> Tensor:
    """Expected gains with `BONUS` standard deviations on top: (n,) fp64, nats per token, on the device of `directions`.

    known (k, 2), foretold (k,) and gains (k,): substitutions that were scored, their first-order gains and true gains; edits (n, 2) and
    predicted (n,): the others. The mean is a line through first-order and true gains that does not fall.
    """
    known, foretold, gains, edits, predicted = (
        each.to(directions.device) for each in (known, foretold.double(), gains, edits, predicted.double())
    )
    spread = foretold - foretold.mean()
    rise = ((spread @ gains) / (spread @ spread).clamp(min=1e-300)).clamp(min=0)
    residual = gains - gains.mean() - rise * spread
    own = PLACE + TOKEN + BOTH
    among = _likeness(known, known, directions)
    factor = torch.linalg.cholesky(among + NOISE * own * torch.eye(len(known), dtype=among.dtype, device=among.device))
    across = torch.linalg.solve_triangular(factor, _likeness(known, edits, directions), upper=False)  # (k, n)
    unknown = (1 - across.square().sum(dim=0) / own).clamp(min=0)
    explained = across.T @ torch.linalg.solve_triangular(factor, residual[:, None], upper=False)[:, 0]
    line = gains.mean() + rise * (predicted - foretold.mean())
    return line + explained + BONUS * (residual.square().mean() * unknown).sqrt()


def _likeness(one: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Covariances of substitutions (k, 2) and (m, 2): (k, m) fp64."""
    place = (one[:, :1] == other[:, 0]).double()
    near = (directions[one[:, 1]] @ directions.T)[:, other[:, 1]].double()
    return PLACE * place + near * (TOKEN + BOTH * place)
