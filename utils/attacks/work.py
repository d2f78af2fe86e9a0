"""What an attack costs: sequences, token rows and floating-point operations, as a value that can be subtracted and summed.

    FLOP = 2 N (rows of the body) + 2 d V (scored rows), and three times that where a gradient is taken
with N parameters of the body without any embedding, width d and V rows of the unembedding: Kaplan et al. 2020 (arXiv 2001.08361),
eq. 2.2 without the attention's quadratic term, and a backward pass twice as dear as a forward pass. Only what is computed is charged:
rows whose keys and values are read from a prefix are counted in `cached_rows`, without operations.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Work:
    """A sum over calls of a scorer. A sequence whose gradient is taken is no `forward`; its rows are in `forward_rows` too."""

    forwards: int = 0  # sequences scored
    backwards: int = 0  # sequences differentiated
    forward_rows: int = 0  # token rows of the body
    backward_rows: int = 0  # token rows that a gradient went back through
    scored_rows: int = 0  # token rows that went through the unembedding
    cached_rows: int = 0  # token rows read from a prefix instead of being computed
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, vars(self).values(), vars(other).values()))

    def __sub__(self, other: Work) -> Work:
        return Work(*map(operator.sub, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class Prices:
    """FLOP of one token row."""

    body: int  # forward, 2 N
    unembedding: int  # forward, 2 d V

    @classmethod
    def of(cls, model: PreTrainedModel) -> Prices:
        tables = {parameter for part in model.modules() if isinstance(part, nn.Embedding) for parameter in part.parameters()}
        body = sum(parameter.numel() for parameter in model.base_model.parameters() if parameter not in tables)
        return cls(2 * body, 2 * model.get_output_embeddings().weight.numel())

    def scoring(self, sequences: int, rows: int, scored: int, cached: int = 0) -> Work:
        """Work of scoring: all numbers are totals over the sequences."""
        flops = self.body * rows + self.unembedding * scored
        return Work(forwards=sequences, forward_rows=rows, scored_rows=scored, cached_rows=cached, flops=flops)

    def gradient(self, sequences: int, rows: int, scored: int) -> Work:
        """Work of scoring and going back."""
        flops = 3 * (self.body * rows + self.unembedding * scored)
        return Work(backwards=sequences, forward_rows=rows, backward_rows=rows, scored_rows=scored, flops=flops)
