"""Every adapter on a random model of its architecture, the matrices of each scope, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.activations import ACT2FN

from configs.schema import Monotone
from tests.architectures import GATED, PLAIN, VOCABULARY, architecture
from tests.builders import small_model
from utils.models.ffn import activation_name, check_finite, check_fits, constrained_weights, feed_forward, ffn_parameters, set_activation
from utils.models.loading import load_model, save_model
from utils.run.errors import InputError

IN, OUT, ATTENTION = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"
IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("kind", PLAIN + GATED)
def test_the_sublayer_by_hand_is_what_the_block_adds_to_the_residual_stream(kind: str) -> None:
    """From the stored weights as matrices, nothing else: norm's output in, difference of the block with and without the FFN out."""
    model = architecture(kind)
    for ffn in feed_forward(model):
        normed: list[torch.Tensor] = []
        added: list[torch.Tensor] = []
        handles = [
            ffn.norm.register_forward_hook(lambda module, inputs, output, normed=normed: normed.append(output)),
            ffn.out.module.register_forward_hook(lambda module, inputs, output, added=added: added.append(output)),
        ]
        with torch.no_grad():
            model(IDS)
        for handle in handles:
            handle.remove()
        assert len(normed) == len(added) == 1
        x = normed[0]
        act = ACT2FN[activation_name(model)]
        first, out = ffn.into[0], ffn.out
        units = act(x @ first.by_unit.T + (0 if first.bias is None else first.bias))
        if kind in GATED:
            units = units * (x @ ffn.into[1].by_unit.T)
        by_hand = units @ out.by_unit + (0 if out.bias is None else out.bias)
        assert torch.allclose(by_hand, added[0], atol=1e-5)
        assert torch.allclose(ffn(x), added[0], atol=1e-6)
        assert by_hand.abs().max() > 0.1
        assert first.by_unit.shape == out.by_unit.shape == (24, 16) and ffn.width == 16
        names = dict(model.named_modules())
        assert all(chosen.module is names[chosen.name] for chosen in (*ffn.maps, ffn.attention_out))


@pytest.mark.parametrize("kind", PLAIN + GATED)
def test_the_gain_is_what_the_norm_multiplies_with(kind: str) -> None:
    for ffn in feed_forward(architecture(kind)):
        h = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        centred = h - h.mean(dim=-1, keepdim=True) if isinstance(ffn.norm, nn.LayerNorm) else h
        normalised = centred / centred.square().mean(dim=-1, keepdim=True).sqrt()
        shift = ffn.shift_parameter if ffn.shift_parameter is not None else 0.0
        assert torch.allclose(ffn.norm(h), normalised * ffn.gain() + shift, atol=1e-4)


@pytest.mark.parametrize("kind", PLAIN + GATED)
def test_views_write_through_and_activations_are_saved(kind: str, tmp_path: Path) -> None:
    model = architecture(kind)
    first = feed_forward(model)[0]
    with torch.no_grad():
        first.out.by_unit[3, 5] = 7.0
    set_activation(model, "relu")
    save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = feed_forward(loaded)[0]
    assert float(again.out.by_unit[3, 5].detach()) == 7.0
    assert isinstance(again.activation, nn.ReLU) and activation_name(loaded) == "relu"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 8)


@pytest.mark.parametrize(("scope", "members"), [("mlp_in", {IN}), ("mlp_both", {IN, OUT}), ("mlp_in_attn_out", {IN, ATTENTION})])
def test_scopes(scope: str, members: set[str]) -> None:
    model = small_model()
    chosen = constrained_weights(model, scope)
    assert set(chosen) == {f"gpt_neox.layers.{layer}.{member}" for layer in range(2) for member in members}
    modules = dict(model.named_modules())
    assert all(linear.module is modules[name] for name, linear in chosen.items())


@pytest.mark.parametrize(
    ("scope", "members"), [("gated_updown", ("up_proj", "down_proj")), ("gated_all", ("gate_proj", "up_proj", "down_proj"))]
)
def test_gated_scopes(scope: str, members: tuple[str, ...]) -> None:
    chosen = constrained_weights(architecture("qwen3"), scope)
    assert list(chosen) == [f"model.layers.{layer}.mlp.{member}" for layer in range(2) for member in members]


def test_ffn_parameters_are_matrices_and_biases_of_each_layer() -> None:
    assert ffn_parameters(small_model()) == 2 * (2 * 16 * 24 + 16 + 24)
    assert ffn_parameters(architecture("opt")) == 2 * (2 * 16 * 24 + 16 + 24)
    assert ffn_parameters(architecture("llama")) == 2 * 3 * 16 * 24


def test_ffn_parameters_of_pythia_are_the_published_number() -> None:
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50304}
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, max_position_embeddings=2048))
    assert ffn_parameters(model) == 805_552_128  # also the figure of the public reference
    assert model.num_parameters() == 1_414_647_808


def test_an_unknown_architecture_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=20))
    with pytest.raises(InputError, match=r"model: found architecture 'bloom', expected one of gemma, .*qwen3; add an adapter"):
        feed_forward(model)


def test_a_model_without_sublayers_is_refused() -> None:
    model = small_model()
    model.gpt_neox.layers = nn.ModuleList()
    with pytest.raises(InputError, match=r"model: found no feed-forward sublayer below gpt_neox.layers, expected at least one"):
        feed_forward(model)
    broken = architecture("llama")
    del broken.model.layers[1].mlp.up_proj
    with pytest.raises(InputError, match=r"model: architecture 'llama', but a part of its feed-forward sublayers is missing: .*up_proj"):
        feed_forward(broken)


def test_an_opt_with_norms_behind_is_refused() -> None:
    with pytest.raises(InputError, match=r"model: found an OPT whose LayerNorms stand behind the sublayers"):
        feed_forward(architecture("opt", do_layer_norm_before=False))


def test_a_scope_for_another_kind_of_sublayer_is_refused() -> None:
    message = r"monotone.scope: found 'mlp_both', but the sublayers of 'llama' have a gate; expected gated_updown, gated_all"
    with pytest.raises(InputError, match=message):
        constrained_weights(architecture("llama"), "mlp_both")
    message = r"monotone.scope: found 'gated_all', but the sublayers of 'gpt2' have no gate; expected mlp_in, mlp_both, mlp_in_attn_out"
    with pytest.raises(InputError, match=message):
        constrained_weights(architecture("gpt2"), "gated_all")


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("gpt_neox", {"order": "directions", "directions": 16}, r"monotone.directions: found 16, expected at most 15"),
        ("llama", {"scope": "gated_all"}, r"monotone.recentre: the sublayers of 'llama' have no biases to correct; expected false"),
        ("qwen2", {"scope": "mlp_both", "start": "lift", "recentre": False}, r"monotone.scope: found 'mlp_both', but .* have a gate"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(kind: str, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_fits(architecture(kind), Monotone.model_validate(settings))


def test_balanced_signs_need_an_even_width() -> None:
    config = GPTNeoXConfig(
        hidden_size=15, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=VOCABULARY, rotary_pct=0.2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"monotone.order: found 'balanced' for a width of 15, expected an even width"):
        check_fits(model, Monotone.model_validate({"order": "balanced"}))


def test_weights_with_nan_are_refused_wherever_they_are() -> None:
    model = small_model()
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight[2, 3] = float("inf")
        model.gpt_neox.layers[1].attention.dense.weight[2, 4] = float("nan")
    with pytest.raises(InputError, match=r"model: gpt_neox.layers.1.attention.dense.weight has 2 entries that are NaN or infinite"):
        check_finite(model)


def test_an_activation_is_set_in_layers_and_configuration() -> None:
    model = small_model()
    set_activation(model, "relu")
    assert [type(ffn.activation) for ffn in feed_forward(model)] == [nn.ReLU, nn.ReLU]
    assert model.config.hidden_act == "relu"


def test_our_own_activation_survives_storing(tmp_path: Path) -> None:
    model = architecture("gpt2")
    set_activation(model, "clamped_gelu")
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(IDS).logits, model(IDS).logits)
