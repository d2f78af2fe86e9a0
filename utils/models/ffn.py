"""Where the feed-forward sublayers are: one adapter for an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from utils.run.errors import InputError


@dataclass(frozen=True)
class FFN:
    """One feed-forward sublayer: out = linear_out(activation(linear_in(x))), x (..., d) after `norm`."""

    name: str
    norm: nn.Module
    module: nn.Module
    linear_in: nn.Linear
    linear_out: nn.Linear
    attention_out: nn.Linear

    @property
    def activation(self) -> nn.Module:
        return self.module.act  # type: ignore[return-value]


def _gpt_neox(model: PreTrainedModel) -> list[FFN]:
    return [
        FFN(
            f"gpt_neox.layers.{number}.mlp",
            layer.post_attention_layernorm,
            layer.mlp,
            layer.mlp.dense_h_to_4h,
            layer.mlp.dense_4h_to_h,
            layer.attention.dense,
        )
        for number, layer in enumerate(model.gpt_neox.layers)
    ]


ADAPTERS: dict[str, Callable[[PreTrainedModel], list[FFN]]] = {"gpt_neox": _gpt_neox}


def feed_forward(model: PreTrainedModel) -> list[FFN]:
    """All feed-forward sublayers, bottom to top."""
    kind = model.config.model_type
    if kind not in ADAPTERS:
        raise InputError(f"model: found architecture {kind!r}, expected one of {', '.join(sorted(ADAPTERS))}; add an adapter to ffn.py")
    return ADAPTERS[kind](model)


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Put the named activation into every feed-forward sublayer and into the configuration, so that it is saved."""
    for ffn in feed_forward(model):
        ffn.module.act = ACT2FN[name]
    model.config.hidden_act = name


def constrained_weights(model: PreTrainedModel, scope: str) -> dict[str, nn.Linear]:
    """{name: linear map} of the matrices that a scope constrains."""
    chosen: dict[str, nn.Linear] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for ffn in feed_forward(model):
        members = {
            "mlp_in": [ffn.linear_in],
            "mlp_both": [ffn.linear_in, ffn.linear_out],
            "mlp_in_attn_out": [ffn.linear_in, ffn.attention_out],
        }[scope]
        chosen.update({names[id(linear)]: linear for linear in members})
    return chosen


def ffn_parameters(model: PreTrainedModel) -> int:
    """Number of entries of all feed-forward matrices and biases."""
    return sum(parameter.numel() for ffn in feed_forward(model) for parameter in ffn.module.parameters())
