"""Layer-wise warm-up: each converted sublayer imitates the base's on the base's own inputs, all of them in one pass.

As the first stages of MOHAWK (Bick et al. 2024, arXiv 2408.10189) do for mixers. What a later LayerNorm removes, the mean over the
coordinates, is not imitated: non-negative weights could only follow it at the cost of what counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.models.ffn import feed_forward
from utils.models.loading import autocast


def layerwise_loss(model: PreTrainedModel, base: PreTrainedModel, ids: Tensor, precision: str) -> Tensor:
    """ids (b, T) -> b*T times the mean over layers of |P(N(x) - N_base(x))|^2 / |P(N_base(x) - its mean)|^2, a scalar with gradient.

    x is what the base's residual stream brings to the sublayer, behind each model's own norm; P takes the mean over coordinates away
    where the norm does. A sublayer that writes its mean has the loss 1.
    """
    losses = []
    with autocast(model.device, precision):
        for ffn, (stream, goal) in zip(feed_forward(model), _seen(base, ids, precision), strict=True):
            wanted, made = goal.float(), ffn(ffn.norm(stream)).float()
            error, spread = made - wanted, wanted - wanted.flatten(0, -2).mean(dim=0)
            if isinstance(ffn.norm, nn.LayerNorm):
                error, spread = (part - part.mean(dim=-1, keepdim=True) for part in (error, spread))
            losses.append(error.square().sum() / spread.square().sum().clamp(min=1e-12))
    return ids.numel() * torch.stack(losses).mean()


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
