"""What can be said for certain about monotonicity, computed from the weights that run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.models.activations import decreases
from utils.models.ffn import FFN, constrained_weights, feed_forward


@torch.no_grad()
def certify(model: PreTrainedModel, scope: str, dtype: torch.dtype) -> dict[str, Any]:
    """Certificate of a model whose matrix products run in `dtype`.

    `constraint_holds`: every matrix in the scope has no negative (or NaN) entry after the cast to `dtype`.
    `ffn_monotone`: every feed-forward sublayer N(x) = W2 s(W1 x + b1) + b2 is non-decreasing in the product order on all of
    R^d. Sufficient and checked exactly: W1 >= 0, W2 >= 0, and s non-decreasing in the implementation that runs.
    `vacuous`: the input comes from a mean-subtracting LayerNorm with positive gains. No two different outputs of it are
    comparable in the product order, and a shift along the all-ones direction makes the matrices of an unconstrained model
    non-negative without changing its function. A certificate in this order then restricts nothing that can occur
    (docs/METHOD.md).
    """
    scoped = {name: _facts(linear, dtype) for name, linear in constrained_weights(model, scope).items()}
    layers = [_layer(ffn, dtype) for ffn in feed_forward(model)]
    return {
        "constraint_holds": all(facts["negative"] == 0 for facts in scoped.values()),
        "ffn_monotone": all(layer["monotone"] for layer in layers),
        "vacuous": all(layer["mean_subtracting_norm"] and layer["smallest_norm_gain"] > 0 for layer in layers),
        "order": "product order on the input of the feed-forward sublayer",
        "covers": "the feed-forward sublayers only; LayerNorm and attention are not monotone",
        "scope": scope,
        "dtype": str(dtype).removeprefix("torch."),
        "minimum": min(facts["minimum"] for facts in scoped.values()),
        "negative_entries": sum(facts["negative"] for facts in scoped.values()),
        "entries": sum(facts["entries"] for facts in scoped.values()),
        "reasons": sorted({reason for layer in layers for reason in layer["reasons"]}),
        "matrices": scoped,
        "layers": layers,
    }


def _facts(linear: nn.Linear, dtype: torch.dtype) -> dict[str, Any]:
    weight = linear.weight.to(dtype)
    negative = weight.numel() - int((weight >= 0).sum())  # counts NaN too
    return {"entries": weight.numel(), "negative": negative, "minimum": float(torch.nan_to_num(weight, nan=float("-3e38")).min())}


def _layer(ffn: FFN, dtype: torch.dtype) -> dict[str, Any]:
    falls, deepest = decreases(ffn.activation, dtype, ffn.linear_in.weight.device)
    reasons = []
    if falls:
        reasons.append(f"the activation {type(ffn.activation).__name__} decreases ({falls} places, by up to {deepest:.3g})")
    for place, linear in (("into", ffn.linear_in), ("out of", ffn.linear_out)):
        if _facts(linear, dtype)["negative"]:
            reasons.append(f"the map {place} the hidden layer has negative entries")
    return {
        "name": ffn.name,
        "monotone": not reasons,
        "reasons": reasons,
        "activation_decreases": falls,
        "mean_subtracting_norm": isinstance(ffn.norm, nn.LayerNorm),
        "smallest_norm_gain": float(ffn.norm.weight.min()) if isinstance(ffn.norm, nn.LayerNorm) else None,
    }
