"""A gated sublayer that is truly monotone: down(relu(gate x) * relu(up x)), "dReLU" (Song et al. 2024, arXiv 2406.05955).

SwiGLU and GeGLU are not monotone for any signs of their matrices: `up x` may be negative where the gate opens, and SiLU and GELU dip.
A product of two non-negative non-decreasing factors is non-decreasing. transformers has no architecture with this sublayer, so each
gated one gets a sibling `rectified_<name>` with the same weights under the same names. A stored model says so in its config.json:
plain transformers loads it, without trust_remote_code, after `import utils.models.gated`, and refuses it without (it does not run
it wrongly).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)


class Rectified(nn.Linear):
    """max(z, a z) of z = x W^T + b, with a = 0 unless it is annealed; the state dict is that of nn.Linear."""

    slope: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z.relu() if self.slope is None else torch.maximum(z, self.slope * z)


def rectify(model: PreTrainedModel, linears: Iterable[nn.Module]) -> None:
    """Turn the given `up` maps of a gated model into rectified ones, and the model into its sibling architecture."""
    for linear in linears:
        if type(linear) is nn.Linear:
            linear.__class__ = Rectified
    if not model.config.model_type.startswith("rectified_"):
        sibling = SIBLINGS[model.config.model_type]
        model.__class__, model.config.__class__ = sibling, sibling.config_class


def _sibling(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def build(self: Any, config: Any) -> None:
        plain.__init__(self, config)
        for name, module in list(self.named_modules()):
            if name.endswith("mlp.up_proj"):
                module.__class__ = Rectified

    config_class: Any = type(
        f"Rectified{plain.config_class.__name__}",
        (plain.config_class,),
        {"model_type": f"rectified_{plain.config_class.model_type}", "__module__": __name__},
    )
    model_class = type(f"Rectified{plain.__name__}", (plain,), {"config_class": config_class, "__init__": build, "__module__": __name__})
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return model_class


SIBLINGS = {
    plain.config_class.model_type: _sibling(plain)
    for plain in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, GemmaForCausalLM)
}
