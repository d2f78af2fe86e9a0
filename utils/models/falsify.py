"""Attempts to refute monotonicity by sampling: counts, not proofs. What the certificate promises must give none; what it does not, may.

The cone of the order is sampled by non-negative combinations of its axes. A rise that falls short by more than rounding, along any axis
of the order, refutes. In fp64 (models above EXACT_UP_TO parameters: fp32), so that rounding is not taken for a violation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.models.ffn import FFN, feed_forward
from utils.models.lift import EXACT_UP_TO
from utils.models.orders import Order

SCALES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the push, as a share of the standard deviation of the input's coordinates
Push = Callable[[Tensor], Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]
PAIRS = 256  # for each sublayer and scale
SEQUENCES = (4, 16)  # sequences and random tokens for blocks and depth
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest change of the output


@torch.no_grad()
def falsify(model: PreTrainedModel, order: Order, seed: int = 0) -> dict[str, Any]:
    """Violations over attempts, for each kind: {tried, violated, deepest (largest fall over the largest rise of that pair)}.

    `derivative`: of each sublayer at random points, along the cone, by forward-mode differentiation. `pairs_anywhere`: x <= y in R^d at
    SCALES. `pairs_behind_norm`: x <= y that both are outputs of the norm before its gain; `tried` is 0 where no such pair exists.
    `block`: a push on the residual stream of all positions, read behind the block, attention live. `depth`: the same from the first
    block to behind the last.
    """
    dtype = torch.float64 if model.num_parameters() <= EXACT_UP_TO else torch.float32
    model = copy.deepcopy(model).to(dtype)
    draw = Draw(order, model.device, dtype, seed)
    sublayers = feed_forward(model)
    counts = {name: _Count(order, ROUNDING[dtype]) for name in ("derivative", "pairs_anywhere", "pairs_behind_norm", "block", "depth")}
    for ffn in sublayers:
        _try_sublayer(ffn, order, draw, counts)
    ids = torch.randint(model.config.vocab_size, SEQUENCES, generator=torch.Generator().manual_seed(seed)).to(model.device)
    calls = block_calls(model, ids)
    outputs = [_hidden(ffn.block(*inputs, **named)) for ffn, (inputs, named) in zip(sublayers, calls, strict=True)]
    for scale in SCALES:
        push = draw.push(scale)
        for ffn, (inputs, named), output in zip(sublayers, calls, outputs, strict=True):
            pushed_inputs, pushed_named = _replaced(inputs, named, push)
            counts["block"].add(_hidden(ffn.block(*pushed_inputs, **pushed_named)) - output)
        counts["depth"].add(pushed(model, ids, sublayers[0].block, sublayers[-1].block, push))
    return {"format": str(dtype).removeprefix("torch."), "scales": list(SCALES)} | {name: count.result() for name, count in counts.items()}


class _Count:
    def __init__(self, order: Order, rounding: float) -> None:
        self.order, self.rounding = order, rounding
        self.tried, self.violated, self.deepest = 0, 0, 0.0

    def add(self, change: Tensor, chosen: Tensor | None = None) -> None:
        """change (..., d) of the output after a push along the cone; chosen (...) restricts to some."""
        along = self.order.readout(change)
        fall = -along.amin(dim=-1) / along.abs().amax(dim=-1).clamp(min=1e-30)
        fall = fall if chosen is None else fall[chosen]
        refuted = fall[~(fall <= self.rounding)]  # NaN too
        self.tried += fall.numel()
        self.violated += refuted.numel()
        self.deepest = max([self.deepest, *refuted.nan_to_num(nan=1.0).tolist()])

    def result(self) -> dict[str, float]:
        return {"tried": self.tried, "violated": self.violated, "deepest": self.deepest}


class Draw:
    """Random vectors, the same on every device."""

    def __init__(self, order: Order, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.order, self.device, self.dtype = order, device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def cone(self, *shape: int) -> Tensor:
        """(..., d) in the cone, of unit root mean square; one axis in ten pairs, a random share of them in the others."""
        weights = torch.rand((*shape, self.order.size), generator=self.generator, dtype=torch.float64)
        single = torch.nn.functional.one_hot(weights.argmax(dim=-1), self.order.size).double()
        dense = weights * (torch.rand(weights.shape, generator=self.generator) < torch.rand((*shape, 1), generator=self.generator))
        alone = (torch.rand((*shape, 1), generator=self.generator) < 0.1) | ~dense.any(dim=-1, keepdim=True)
        push = self.order.cone(torch.where(alone, single, dense).to(self.device, self.dtype))
        return push / push.square().mean(dim=-1, keepdim=True).sqrt()

    def push(self, scale: float) -> Push:
        """A push of hidden states (..., d) by `scale` standard deviations of their coordinates."""
        return lambda hidden: hidden + scale * hidden.std(dim=-1, keepdim=True) * self.cone(*hidden.shape[:-1])


def _try_sublayer(ffn: FFN, order: Order, draw: Draw, counts: dict[str, _Count]) -> None:
    width, gain = ffn.width, ffn.gain()
    shift = ffn.shift_parameter
    size = float(gain.abs().mean())
    x = draw.normal(PAIRS, width) * size
    counts["derivative"].add(torch.func.jvp(ffn, (x,), (draw.cone(PAIRS),))[1])
    for scale in SCALES:
        base = draw.normal(PAIRS, width) * size
        counts["pairs_anywhere"].add(ffn(base + scale * size * draw.cone(PAIRS)) - ffn(base))
    low, high, comparable = norm_pairs(ffn, order, draw)
    through = [side * gain + (0.0 if shift is None else shift) for side in (low, high)]
    counts["pairs_behind_norm"].add(ffn(through[1]) - ffn(through[0]), comparable)


def norm_pairs(ffn: FFN, order: Order, draw: Draw, count: int = PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    """(low, high, comparable): two (n, d) of normalised vectors, both of length sqrt(d) and, behind a LayerNorm, of mean zero, with
    high - low in the cone where `comparable` (n,) says so.

    A step v from x keeps the length if it is the reflection -2 (x.v / v.v) v, which goes along v where x.v < 0.
    """
    subtracts = isinstance(ffn.norm, nn.LayerNorm)
    low = draw.normal(count, ffn.width)
    low = low - low.mean(dim=-1, keepdim=True) if subtracts else low
    low = low / low.square().mean(dim=-1, keepdim=True).sqrt()
    step = _mean_free(draw.cone(count), order) if subtracts else draw.cone(count)
    along = (low * step).sum(dim=-1, keepdim=True)
    low = torch.where(along > 0, -low, low)
    square = step.square().sum(dim=-1, keepdim=True)
    high = low + 2 * along.abs() / square.clamp(min=1e-30) * step
    return low, high, (square[:, 0] > 1e-20) & (along[:, 0] != 0)


def _mean_free(step: Tensor, order: Order) -> Tensor:
    """The part of the cone that LayerNorm can see: rises and falls of coordinates are scaled to cancel; zero where there is no such."""
    if order.rotated:
        return step
    rise, fall = step.clamp(min=0.0), step.clamp(max=0.0)
    ups, downs = rise.sum(dim=-1, keepdim=True), -fall.sum(dim=-1, keepdim=True)
    return (rise * downs + fall * ups) / (ups + downs)


def pushed(model: PreTrainedModel, ids: Tensor, first: nn.Module, last: nn.Module, push: Push) -> Tensor:
    """Change (B, T, d) of the hidden states behind the block `last` when those that enter the block `first` are pushed."""
    seen: list[Tensor] = []
    with watching(last, seen.append):
        model.base_model(ids, use_cache=False)
        with pushing(first, push):
            model.base_model(ids, use_cache=False)
    return seen[1] - seen[0]


def block_calls(model: PreTrainedModel, ids: Tensor) -> list[Call]:
    """What each block is called with, bottom to top, when the model reads ids (B, T)."""
    calls: list[Call] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((inputs, named))

    handles = [ffn.block.register_forward_pre_hook(hook, with_kwargs=True) for ffn in feed_forward(model)]
    try:
        model.base_model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def pushing(block: nn.Module, push: Push) -> Iterator[None]:
    """Inside, the hidden states (B, T, d) that enter a block are replaced by push(hidden)."""
    handle = block.register_forward_pre_hook(lambda module, inputs, named: _replaced(inputs, named, push), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _replaced(inputs: tuple[Any, ...], named: dict[str, Any], push: Push) -> Call:
    """A block's arguments with its hidden states pushed, however they are given."""
    if inputs:
        return (push(inputs[0]), *inputs[1:]), named
    return inputs, named | {"hidden_states": push(named["hidden_states"])}


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watching(block: nn.Module, see: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside, `see` gets the hidden states (B, T, d) that leave a block."""
    handle = block.register_forward_hook(lambda module, inputs, output: see(_hidden(output)) and None)
    try:
        yield
    finally:
        handle.remove()
