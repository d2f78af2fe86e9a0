"""The adapter to GPT-NeoX and the matrices of each scope."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from tests.builders import small_model
from utils.models.ffn import constrained_weights, feed_forward, ffn_parameters, set_activation
from utils.run.errors import InputError

IN, OUT, ATTENTION = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"


@pytest.mark.parametrize(("scope", "members"), [("mlp_in", {IN}), ("mlp_both", {IN, OUT}), ("mlp_in_attn_out", {IN, ATTENTION})])
def test_scopes(scope: str, members: set[str]) -> None:
    model = small_model()
    chosen = constrained_weights(model, scope)
    assert set(chosen) == {f"gpt_neox.layers.{layer}.{member}" for layer in range(2) for member in members}
    modules = dict(model.named_modules())
    assert all(linear is modules[name] for name, linear in chosen.items())


def test_the_parts_compose_to_the_sublayer() -> None:
    model, x = small_model(), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    for ffn, layer in zip(feed_forward(model), model.gpt_neox.layers, strict=True):
        assert torch.equal(ffn.linear_out(ffn.activation(ffn.linear_in(x))), layer.mlp(x))
        seen: list[torch.Tensor] = []
        handle = ffn.module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        normed: list[torch.Tensor] = []
        other = ffn.norm.register_forward_hook(lambda module, inputs, output, normed=normed: normed.append(output))
        model(torch.arange(6)[None])
        handle.remove()
        other.remove()
        assert torch.equal(seen[0], normed[0])  # the norm feeds the sublayer


def test_ffn_parameters_are_matrices_and_biases_of_each_layer() -> None:
    assert ffn_parameters(small_model()) == 2 * (2 * 16 * 24 + 16 + 24)


def test_ffn_parameters_of_pythia_are_the_published_number() -> None:
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50304}
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, max_position_embeddings=2048))
    assert ffn_parameters(model) == 805_552_128  # also the figure of the public reference
    assert model.num_parameters() == 1_414_647_808


def test_an_activation_is_set_in_layers_and_configuration() -> None:
    model = small_model()
    set_activation(model, "relu")
    assert [type(ffn.activation) for ffn in feed_forward(model)] == [nn.ReLU, nn.ReLU]
    assert model.config.hidden_act == "relu"


def test_an_unknown_architecture_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, n_positions=8))
    with pytest.raises(InputError, match=r"model: found architecture 'gpt2', expected one of .*gpt_neox.*; add an adapter"):
        feed_forward(model)
