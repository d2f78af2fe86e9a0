"""Where the feed-forward sublayers are: one adapter for an architecture.

d is the width of the residual stream, m the number of hidden units of a sublayer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from configs.schema import Monotone
from utils.models.gated import Rectified, rectify
from utils.run.errors import InputError


@dataclass(frozen=True)
class Map:
    """One linear map. Its stored weight may be transposed (GPT-2). `weight` and `by_unit` are views: writing to them changes the model."""

    name: str
    module: nn.Module
    sublayer: str  # name of the FFN; "" for attention's output map
    reads: bool  # from the residual stream (into the hidden layer), or writes to it

    @property
    def weight(self) -> Tensor:
        """(out, in)"""
        return self.module.weight.T if isinstance(self.module, Conv1D) else self.module.weight  # type: ignore[return-value]

    @property
    def by_unit(self) -> Tensor:
        """(units, d): a row for each hidden unit, a column for each residual coordinate, whichever way the map goes."""
        return self.weight if self.reads else self.weight.T

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]


@dataclass(frozen=True)
class FFN:
    """One feed-forward sublayer behind `norm`: out(s(into x)), or with a gate out(s(gate x) * up x) where into = (gate, up)."""

    name: str
    block: nn.Module
    norm: nn.Module
    gain_offset: float  # Gemma's norms multiply by 1 + weight
    into: tuple[Map, ...]
    out: Map
    attention_out: Map
    holder: nn.Module
    field: str  # of `holder` that holds the activation

    @property
    def activation(self) -> nn.Module:
        return getattr(self.holder, self.field)

    @property
    def gated(self) -> bool:
        return len(self.into) == 2

    @property
    def maps(self) -> tuple[Map, ...]:
        return (*self.into, self.out)

    @property
    def gain_parameter(self) -> nn.Parameter | None:
        """The norm's own weight, which `gain_offset` is added to."""
        return getattr(self.norm, "weight", None)

    @property
    def shift_parameter(self) -> nn.Parameter | None:
        """The norm's bias."""
        return getattr(self.norm, "bias", None)

    @property
    def width(self) -> int:
        return self.out.by_unit.shape[1]

    def gain(self) -> Tensor:
        """(d,) what the norm multiplies with, after normalising; ones if it has no gain."""
        weight = self.gain_parameter
        return weight + self.gain_offset if weight is not None else self.out.weight.new_ones(self.width)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., d) behind the norm -> (..., d)"""
        return self.out.module(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., m) what the output map reads."""
        units = self.activation(self.into[0].module(x))
        return units * self.into[1].module(x) if self.gated else units


def _sublayer(
    layer: nn.Module, prefix: str, norm: str, into: tuple[str, ...], out: str, attention: str, act: str, offset: float = 0.0
) -> FFN:
    """An FFN from the names of its parts inside a block."""
    holder, field = act.rpartition(".")[::2]
    name = f"{prefix}.{into[0].rpartition('.')[0]}".rstrip(".")

    def part(path: str, sublayer: str, reads: bool) -> Map:
        return Map(f"{prefix}.{path}", layer.get_submodule(path), sublayer, reads)

    return FFN(
        name=name,
        block=layer,
        norm=layer.get_submodule(norm),
        gain_offset=offset,
        into=tuple(part(path, name, True) for path in into),
        out=part(out, name, False),
        attention_out=part(attention, "", False),
        holder=layer.get_submodule(holder),
        field=field,
    )


def _gpt_neox(layer: nn.Module, prefix: str) -> FFN:
    parts = (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "attention.dense", "mlp.act")
    return _sublayer(layer, prefix, "post_attention_layernorm", *parts)


def _gpt2(layer: nn.Module, prefix: str) -> FFN:
    return _sublayer(layer, prefix, "ln_2", ("mlp.c_fc",), "mlp.c_proj", "attn.c_proj", "mlp.act")


def _opt(layer: nn.Module, prefix: str) -> FFN:
    if not layer.do_layer_norm_before:
        raise InputError("model: found an OPT whose LayerNorms stand behind the sublayers (opt-350m), expected them in front; name another")
    return _sublayer(layer, prefix, "final_layer_norm", ("fc1",), "fc2", "self_attn.out_proj", "activation_fn")


def _llama(layer: nn.Module, prefix: str) -> FFN:
    parts = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "self_attn.o_proj", "mlp.act_fn")
    return _sublayer(layer, prefix, "post_attention_layernorm", *parts)


def _gemma(layer: nn.Module, prefix: str) -> FFN:
    parts = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "self_attn.o_proj", "mlp.act_fn")
    return _sublayer(layer, prefix, "post_attention_layernorm", *parts, offset=1.0)


Adapter = Callable[[nn.Module, str], FFN]
ADAPTERS: dict[str, tuple[str, Adapter]] = {  # architecture: (where its blocks are, how one is read)
    "gpt_neox": ("gpt_neox.layers", _gpt_neox),
    "gpt2": ("transformer.h", _gpt2),
    "opt": ("model.decoder.layers", _opt),
    "llama": ("model.layers", _llama),
    "mistral": ("model.layers", _llama),
    "qwen2": ("model.layers", _llama),
    "qwen3": ("model.layers", _llama),
    "gemma": ("model.layers", _gemma),
}


def feed_forward(model: PreTrainedModel) -> list[FFN]:
    """All feed-forward sublayers, bottom to top. Raises InputError if the architecture is unknown or has none."""
    kind = model.config.model_type.removeprefix("rectified_")
    if kind not in ADAPTERS:
        raise InputError(f"model: found architecture {kind!r}, expected one of {', '.join(sorted(ADAPTERS))}; add an adapter to ffn.py")
    place, adapter = ADAPTERS[kind]
    try:
        found = [adapter(layer, f"{place}.{number}") for number, layer in enumerate(model.get_submodule(place))]
    except AttributeError as error:
        raise InputError(f"model: architecture {kind!r}, but a part of its feed-forward sublayers is missing: {error}") from None
    if not found:
        raise InputError(f"model: found no feed-forward sublayer below {place}, expected at least one; is num_hidden_layers 0?")
    return found


def set_activation(model: PreTrainedModel, name: str) -> None:
    """Put the named activation into every sublayer and into the configuration, so that it is saved; `drelu` also rectifies `up`."""
    if name == "drelu":
        rectify(model, [ffn.into[1].module for ffn in feed_forward(model)])
        name = "relu"
    for ffn in feed_forward(model):
        setattr(ffn.holder, ffn.field, ACT2FN[name])
    setattr(model.config, activation_key(model), name)


def activation_key(model: PreTrainedModel) -> str:
    """Where the configuration of this architecture names the activation."""
    return "activation_function" if hasattr(model.config, "activation_function") else "hidden_act"


def activation_name(model: PreTrainedModel) -> str:
    """What `set_activation` would be given."""
    rectified = all(isinstance(ffn.into[-1].module, Rectified) for ffn in feed_forward(model))
    return "drelu" if rectified else getattr(model.config, activation_key(model))


SCOPES = {
    "mlp_in": lambda ffn: ffn.into,
    "mlp_both": lambda ffn: ffn.maps,
    "mlp_in_attn_out": lambda ffn: (*ffn.into, ffn.attention_out),
    "gated_updown": lambda ffn: ffn.maps[1:],
    "gated_all": lambda ffn: ffn.maps,
}


def constrained_weights(model: PreTrainedModel, scope: str) -> dict[str, Map]:
    """{name: map} of the matrices that a scope constrains. Raises InputError if the scope is for another kind of sublayer."""
    sublayers = feed_forward(model)
    gated = sublayers[0].gated
    if scope.startswith("gated") != gated:
        fitting = [name for name in SCOPES if name.startswith("gated") == gated]
        kind = "a gate" if gated else "no gate"
        raise InputError(
            f"monotone.scope: found {scope!r}, but the sublayers of {model.config.model_type!r} have {kind}; expected {', '.join(fitting)}"
        )
    return {chosen.name: chosen for ffn in sublayers for chosen in SCOPES[scope](ffn)}


def check_fits(model: PreTrainedModel, spec: Monotone) -> None:
    """Raise InputError if the configured constraint cannot be put on this model, which may be without weights (on device `meta`)."""
    sublayers = feed_forward(model)
    constrained_weights(model, spec.scope)
    width = sublayers[0].width
    if spec.order == "balanced" and width % 2:
        raise InputError(f"monotone.order: found 'balanced' for a width of {width}, expected an even width (half of the signs are minus)")
    if spec.directions >= width:
        raise InputError(f"monotone.directions: found {spec.directions}, expected at most {width - 1}: the model's width less the mean")
    if spec.recentre and spec.start != "base" and any(chosen.bias is None for ffn in sublayers for chosen in ffn.maps):
        raise InputError(f"monotone.recentre: the sublayers of {model.config.model_type!r} have no biases to correct; expected false")
    if spec.start == "lift" and not all(isinstance(ffn.norm, nn.LayerNorm) for ffn in sublayers):
        raise InputError(f"monotone.start: 'lift' needs a LayerNorm that subtracts the mean; found {type(sublayers[0].norm).__name__}")


@torch.no_grad()
def check_finite(model: PreTrainedModel) -> None:
    """Raise InputError if the weights are not all finite."""
    for name, parameter in model.named_parameters():
        if broken := int((~torch.isfinite(parameter)).sum()):
            raise InputError(f"model: {name} has {broken} entries that are NaN or infinite, expected none; check the base model's files")


def ffn_parameters(model: PreTrainedModel) -> int:
    """Number of entries of all feed-forward matrices and biases."""
    return sum(parameter.numel() for ffn in feed_forward(model) for chosen in ffn.maps for parameter in chosen.module.parameters())
