"""Which substitutions of a text to score next: first-order gains, corrected by the gains of those that were scored already.

What a gradient foretells of a whole substitution is poor, but what one did says much of others at its place, of tokens that lie near its
token, and most of near tokens at its place: a Gaussian process around the first-order gains (Rasmussen and Williams 2006, eq. 2.25;
for attacks on text without gradients Lee et al. 2022, ICML, "Query-efficient and scalable black-box adversarial attacks on
discrete sequential data via Bayesian optimization").

n substitutions, k of them scored, V vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.attacks.round_trip import first_kept

OWN = 3.0  # variance of a gain: its place's, its token's, and what is its own, one each
NOISE = 0.05  # of it that no likeness explains


@dataclass
class Ranking:
    """Substitutions of one text, the most promising first; the first `tried` were looked at, those in `rows` scored."""

    edits: Tensor  # (n, 2) of (place, token), on the CPU
    predicted: Tensor  # (n,) first-order gains, nats per untouched token, on the CPU; zeros without a gradient
    tried: int = 0
    rows: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)  # of the scored ones
    first: int = 0  # how many of them were scored before anything was learnt

    def next(self, count: int, now: float, directions: Tensor, kept: Callable[[Tensor], list[bool]] | None) -> list[int]:
        """Rows of the next `count` to score, by `kept` of the next that pass it; what is left is sorted by what is to be hoped of it first.

        now: nats per token of the text as it is; directions (V, d): of the tokens' embeddings, of length one.
        """
        if self.rows and self.tried < len(self.edits):
            self._sort(now, directions)
        rest = range(self.tried, len(self.edits))
        rows = first_kept(rest, count, lambda some: kept(self.edits[some])) if kept else list(rest[:count])
        self.tried = rows[-1] + 1 if len(rows) == count else len(self.edits)
        return rows

    def scored(self, rows: Sequence[int], nll: Tensor) -> None:
        """Take the losses (k,) of the substitutions at `rows`."""
        self.first = self.first or len(rows)
        self.rows += rows
        self.nll += nll.tolist()

    def _sort(self, now: float, directions: Tensor) -> None:
        gains = torch.tensor(self.nll, dtype=torch.float64) - now
        rest = slice(self.tried, None)
        hoped = hoped_gains(self.edits[self.rows], self.predicted[self.rows], gains, self.edits[rest], self.predicted[rest], directions)
        order = hoped.argsort(descending=True, stable=True).cpu()
        self.edits[rest], self.predicted[rest] = self.edits[rest][order], self.predicted[rest][order]


def hoped_gains(known: Tensor, foretold: Tensor, gains: Tensor, edits: Tensor, predicted: Tensor, directions: Tensor) -> Tensor:
    """Expected gains: (n,) fp64, nats per token, on the device of `directions`.

    known (k, 2), foretold (k,) and gains (k,): substitutions that were scored, their first-order gains and true gains; edits (n, 2) and
    predicted (n,): the others. The mean is a line through first-order and true gains that does not fall.
    """
    device = directions.device
    known, edits, gains = known.to(device), edits.to(device), gains.to(device)
    foretold, predicted = foretold.to(device).double(), predicted.to(device).double()
    spread = foretold - foretold.mean()
    rise = ((spread @ gains) / (spread @ spread).clamp(min=1e-300)).clamp(min=0)
    residual = gains - gains.mean() - rise * spread
    among = _likeness(known, known, directions)
    noise = NOISE * OWN * torch.eye(len(known), dtype=among.dtype, device=device)
    weights = torch.cholesky_solve(residual[:, None], torch.linalg.cholesky(among + noise))[:, 0]
    return gains.mean() + rise * (predicted - foretold.mean()) + weights @ _likeness(known, edits, directions)


def _likeness(one: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Covariances of substitutions (k, 2) and (m, 2): (k, m) fp64."""
    place = (one[:, :1] == other[:, 0]).double()
    near = (directions[one[:, 1]] @ directions.T)[:, other[:, 1]].double()
    return place + near + place * near
