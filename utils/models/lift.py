"""The gauge lift: rewrite an unconstrained model so that W1, W2 >= 0 without changing its function. The control of every certificate.

The output of a mean-subtracting LayerNorm, before its gain, sums to zero, and each LayerNorm removes a shift along all-ones. So, with
the gain folded into W1, W1 + c 1^T and W2 + 1 d^T give the same log-probabilities for any c (m,) and d (m,), and large ones make every
entry non-negative. Where this passes the test that a constrained model passes, the test restricts nothing (docs/METHOD.md).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.models.ffn import FFN, constrained_weights, feed_forward, set_activation
from utils.models.orders import Order
from utils.run.errors import InputError

PROBES = (2, 24)  # sequences and tokens on which log-probabilities are compared
EXACT_UP_TO = 2_000_000_000  # parameters: two copies in fp64 of a larger model would not fit
SAME = {torch.float64: 1e-4, torch.float32: 1e-2}  # nats: the largest change that counts as rounding (RMSNorms compute in fp32)


@torch.no_grad()
def fold_gain(ffn: FFN) -> None:
    """Move the norm's gain and shift into the maps behind it, exactly: W (g x + b) = (W g) x + W b."""
    weight, shift = ffn.gain_parameter, ffn.shift_parameter
    if weight is None:
        return
    gain = ffn.gain().clone()
    for chosen in ffn.into:
        if shift is not None and chosen.bias is not None:
            chosen.bias.add_(chosen.weight @ shift)
        elif shift is not None and bool(shift.any()):
            raise InputError(f"monotone.norm_gain: {chosen.name} has no bias to fold its norm's shift into, expected 'free' or 'positive'")
        chosen.weight.mul_(gain)
    weight.fill_(1.0 - ffn.gain_offset)
    if shift is not None:
        shift.zero_()


@torch.no_grad()
def lift(model: PreTrainedModel, scope: str, order: Order) -> None:
    """Rewrite the matrices of a scope in place; entries with the order's sign are reached where a shift can reach them."""
    for ffn in feed_forward(model):
        fold_gain(ffn)
    if order.rotated:
        return  # directions have mean zero: a shift along all-ones is invisible to them, and changes no entry
    for chosen in constrained_weights(model, scope).values():
        by_unit, signs = chosen.by_unit, order.sign(chosen) * order.axes.to(chosen.by_unit)
        by_unit.add_(_shift(by_unit, signs))


def _shift(by_unit: Tensor, signs: Tensor) -> Tensor:
    """(m, 1): for each row the smallest shift that gives every entry its sign; where none does, one for the entries with plus.

    Exact in floating point: W - min W is rounded to a number that is not negative.
    """
    signs = signs.expand_as(by_unit)
    low = torch.where(signs > 0, -by_unit, -torch.inf).amax(dim=1, keepdim=True)
    high = torch.where(signs < 0, -by_unit, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(low.isinf(), high.clamp(max=0.0), torch.minimum(low.clamp(min=0.0), torch.maximum(high, low)))


def _add_missing_biases(model: PreTrainedModel) -> None:
    for ffn in feed_forward(model):
        for chosen in ffn.into:
            if ffn.shift_parameter is not None and chosen.bias is None:
                chosen.module.bias = nn.Parameter(chosen.weight.new_zeros(len(chosen.weight)))


@torch.no_grad()
def lifted_control(base: PreTrainedModel, activation: str, scope: str, order: Order) -> tuple[PreTrainedModel, dict[str, float | str]]:
    """A lifted copy of the unconstrained model, given `activation`, and by how much lifting changed its log-probabilities at most. Where
    a norm has a shift and a map behind it no bias, the copy's map gets one that takes it.

    Computed in fp64 (models above EXACT_UP_TO parameters: fp32) on random tokens.
    """
    dtype = torch.float64 if base.num_parameters() <= EXACT_UP_TO else torch.float32
    control = copy.deepcopy(base)
    if activation != "keep":
        set_activation(control, activation)
    control.to(dtype)
    ids = torch.randint(control.config.vocab_size, PROBES, generator=torch.Generator().manual_seed(0)).to(control.device)
    _add_missing_biases(control)
    before = control(ids, use_cache=False).logits.log_softmax(dim=-1)
    lift(control, scope, order)
    change = float((control(ids, use_cache=False).logits.log_softmax(dim=-1) - before).abs().max())
    same = change <= SAME[dtype]
    return control, {"largest_change_nats": change, "format": str(dtype).removeprefix("torch."), "same_function": same}
