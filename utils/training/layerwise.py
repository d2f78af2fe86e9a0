"""Layer-wise warm-up: each converted sublayer imitates the base's on the base's own inputs, all of them in one pass.

As the first stages of MOHAWK (Bick et al. 2024, arXiv 2408.10189) do for mixers. What a later LayerNorm removes, the mean over the
coordinates, is not imitated: non-negative weights could only follow it at the cost of what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.models.ffn import FFN, feed_forward
from utils.models.loading import autocast


def layerwise_loss(model: PreTrainedModel, base: PreTrainedModel, ids: Tensor, precision: str, scales: Sequence[Tensor]) -> Tensor:
    """ids (b, T) -> mean over layers of |P(N(x) - N_base(x))|^2 / scale, summed over the b*T tokens: a scalar with gradient.

    x is what the base's residual stream brings to the sublayer, behind each model's own norm; P takes the mean over coordinates away
    where the norm does. With `layer_scales` a sublayer that writes its mean has the loss 1 a token.
    """
    losses = []
    with autocast(model.device, precision):
        for ffn, (stream, goal), scale in zip(feed_forward(model), _seen(base, ids, precision), scales, strict=True):
            error = _seen_later(ffn, ffn(ffn.norm(stream)).float() - goal.float())
            losses.append(error.square().sum() / scale)
    return torch.stack(losses).mean()


def layer_scales(base: PreTrainedModel, ids: Tensor, precision: str) -> list[Tensor]:
    """ids (b, T) -> for each layer the mean over tokens of |P(N_base(x) - its mean)|^2, scalars on the device."""
    scales = []
    for ffn, (_, goal) in zip(feed_forward(base), _seen(base, ids, precision), strict=True):
        outputs = goal.float().flatten(0, -2)
        scales.append(_seen_later(ffn, outputs - outputs.mean(dim=0)).square().sum(dim=1).mean().clamp(min=1e-12))
    return scales


def _seen_later(ffn: FFN, outputs: Tensor) -> Tensor:
    """(..., d) without what the next LayerNorm removes."""
    return outputs - outputs.mean(dim=-1, keepdim=True) if isinstance(ffn.norm, nn.LayerNorm) else outputs


@torch.no_grad()
def _seen(base: PreTrainedModel, ids: Tensor, precision: str) -> list[tuple[Tensor, Tensor]]:
    """(input of the norm, output of the sublayer), each (b, T, d), in the order of `feed_forward`."""
    sublayers = feed_forward(base)
    found: dict[str, Tensor] = {}

    def keep(key: str, of: str) -> Callable[..., None]:
        return lambda module, given, made: found.update({key: given[0] if of == "given" else made})

    handles = [ffn.norm.register_forward_hook(keep(f"{ffn.name} stream", "given")) for ffn in sublayers]
    handles += [ffn.out.module.register_forward_hook(keep(f"{ffn.name} goal", "made")) for ffn in sublayers]
    try:
        with autocast(base.device, precision):
            base.base_model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(found[f"{ffn.name} stream"], found[f"{ffn.name} goal"]) for ffn in sublayers]
