"""Conversion: what is changed, what is not, and means that equal the base's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Experiment, Monotone
from tests.architectures import architecture
from tests.builders import VOCABULARY, small_model, token_folder
from utils.data.tokens import Tokens
from utils.models import convert as convert_module
from utils.models.certificate import certify
from utils.models.convert import convert, convert_stored
from utils.models.falsify import falsify
from utils.models.ffn import feed_forward
from utils.models.loading import load_model, save_model
from utils.models.orders import Order, all_plus
from utils.run.errors import InputError, WorkFailed

CALIBRATION = torch.randint(0, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(0))
MAPS = [f"gpt_neox.layers.{layer}.mlp.{part}" for layer in range(2) for part in ("dense_h_to_4h", "dense_4h_to_h")]


def means(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Mean output of every feed-forward map over the tokens, each sequence run alone and summed in fp64."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in MAPS}

    def add(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            for row in output.reshape(-1, output.shape[-1]):
                sums[name] = sums[name] + row.double()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(add(name)) for name in MAPS]
    with torch.no_grad():
        for sequence in ids:
            model(sequence[None])
    for handle in handles:
        handle.remove()
    return {name: total / ids.numel() for name, total in sums.items()}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in MAPS)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "clamped_gelu", "start": "abs"}, {"scope": "mlp_in", "parametrisation": "softplus"}]
)
def test_recentred_means_equal_the_base_ones(options: dict) -> None:
    base = small_model()
    model, _, log = convert(base, Monotone.model_validate(options), CALIBRATION)
    assert difference(means(model, CALIBRATION), means(base, CALIBRATION)) < 1e-5
    plain, _, plain_log = convert(base, Monotone.model_validate({**options, "recentre": False}), CALIBRATION)
    assert difference(means(plain, CALIBRATION), means(base, CALIBRATION)) > 0.1
    assert set(log) == {"negative_share_before", "kept_energy", "bias_shift"} and set(plain_log) == set(log) - {"bias_shift"}
    biases = {name: (model.get_submodule(name).bias - plain.get_submodule(name).bias).detach() for name in MAPS}
    assert log["bias_shift"] == pytest.approx(
        {name: float(bias.double().square().mean().sqrt()) for name, bias in biases.items()}, rel=1e-4
    )


@pytest.mark.parametrize("start", ["clamp", "least_squares"])
def test_recentred_means_of_a_rectified_model_are_those_in_front_of_its_relus(start: str) -> None:
    """Every map's x W^T + b, computed by hand from what the finished model feeds it; `again` starts from a rectified model."""
    ids = torch.randint(0, 53, (6, 32), generator=torch.Generator().manual_seed(0))
    spec = Monotone.model_validate({"scope": "gated_all", "activation": "drelu", "start": start})

    def linear_means(model: PreTrainedModel) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def see(name: str, weight: Tensor, bias: Tensor) -> object:
            return lambda module, inputs: found.update({name: (inputs[0] @ weight.T + bias).double().mean(dim=(0, 1))})

        maps = [chosen for ffn in feed_forward(model) for chosen in ffn.maps]
        handles = [chosen.module.register_forward_pre_hook(see(chosen.name, chosen.weight, chosen.bias)) for chosen in maps]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return found

    base = architecture("llama", mlp_bias=True)
    model, _, log = convert(base, spec, ids)
    again, _, _ = convert(model, spec, ids)
    goal = linear_means(base)
    assert len(goal) == len(log["bias_shift"]) == 6
    for network in (model, again):
        assert max(float((mean - goal[name]).abs().max()) for name, mean in linear_means(network).items()) < 1e-5


def test_means_are_recentred_exactly_in_fp64() -> None:
    base = small_model().double()
    model, _, _ = convert(base, Monotone.model_validate({}), CALIBRATION)
    assert difference(means(model, CALIBRATION), means(base, CALIBRATION)) < 1e-12


def test_the_base_is_left_alone_and_so_is_what_is_out_of_scope() -> None:
    base = small_model()
    model, _, _ = convert(base, Monotone.model_validate({"scope": "mlp_in", "recentre": False}), CALIBRATION)
    original = small_model().state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.state_dict().items())
    assert base.config.hidden_act == "gelu" and model.config.hidden_act == "relu"
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, original[name])}
    assert changed == {f"gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight" for layer in range(2)}


def test_a_model_within_the_constraint_is_not_changed() -> None:
    spec = Monotone.model_validate({"activation": "keep"})
    model, _, _ = convert(small_model(), spec, CALIBRATION)
    again, _, log = convert(model, spec, CALIBRATION)
    assert set(log["negative_share_before"].values()) == {0.0}
    assert max(log["bias_shift"].values()) < 1e-6
    state = model.state_dict()
    assert all(torch.allclose(tensor, state[name], atol=1e-5) for name, tensor in again.state_dict().items())


def test_hooks_are_removed_even_after_an_error() -> None:
    base, model = small_model(), small_model()
    with pytest.raises(IndexError):
        convert_module.recentre(model, base, torch.full((1, 4), VOCABULARY))
    assert not any(module._forward_hooks for network in (base, model) for module in network.modules())


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Path]:
    draw = np.random.default_rng(0)
    for name, count in (("train", 40), ("validation", 4)):
        token_folder(tmp_path / name, draw.integers(1, VOCABULARY, (count, 50)).tolist())
    save_model(small_model(), tmp_path / "base")
    named = {"base": "base", "train_tokens": "train", "validation_tokens": "validation", "target": "target", "order_file": "order"}
    return {key: tmp_path / name for key, name in named.items()}


def test_a_stored_model_is_converted_certified_and_logged(
    stored: dict[str, Path], tiny: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    log, certificate = convert_stored(tiny, 42, **stored)
    assert "make monotone: 4/4" in capsys.readouterr().out
    base, model = load_model(stored["base"]), load_model(stored["target"])
    order = Order.load(stored["order_file"])
    falsifiers = certificate.pop("falsifiers")
    assert certificate == certify(model, "mlp_both", torch.float32, order, base) and certificate["ffn_monotone"]
    assert falsifiers == falsify(model, order)
    entries = [model.get_submodule(name).weight.detach() for name in MAPS]
    assert log["min_weight"] == min(float(weight.min()) for weight in entries) == 0
    assert log["max_weight"] == max(float(weight.max()) for weight in entries)
    assert log["num_parameters_before"] == log["num_parameters_after"] == sum(p.numel() for p in base.parameters())
    assert log["ffn_parameters"] == 2 * (2 * 16 * 24 + 16 + 24) and log["num_ffn_modules"] == 4 and log["ffn_modules"] == sorted(MAPS)
    assert log["ffn_percentage"] == 100 * log["ffn_parameters"] / log["num_parameters_before"]
    assert log["all_weights_non_negative"] and log["ffn_monotone"] and log["seed"] == 42
    stream = Tokens(stored["validation_tokens"]).ids.astype(np.int64)
    held_out = torch.from_numpy(np.stack([stream[start : start + 33] for start in range(0, len(stream) - 32, 32)]))
    for network, key in ((base, "validation_nll_before"), (model, "validation_nll_after")):
        with torch.no_grad():
            losses = nn.functional.cross_entropy(network(held_out[:, :-1]).logits.flatten(0, 1), held_out[:, 1:].flatten())
        assert log[key] == pytest.approx(float(losses), rel=1e-5)


def test_a_base_with_nan_is_not_passed_on(stored: dict[str, Path], tiny: Experiment) -> None:
    broken = small_model()
    with torch.no_grad():
        broken.get_submodule(MAPS[1]).weight[0, 0] = float("nan")
    save_model(broken, stored["base"])
    with pytest.raises(InputError, match=rf"model: {MAPS[1]}.weight has 1 entries that are NaN or infinite, expected none"):
        convert_stored(tiny, 42, **stored)


def test_a_weight_that_the_format_cannot_hold_is_called_not_finite(stored: dict[str, Path], tiny: Experiment) -> None:
    huge = small_model()
    with torch.no_grad():
        huge.get_submodule(MAPS[1]).weight[0, 0] = 3.4e38
    save_model(huge, stored["base"])
    config = with_settings(tiny, {"recentre": False})
    with pytest.raises(
        WorkFailed, match=r"target: 1 constrained entries are not finite in bfloat16, expected none; look for huge"
    ) as caught:
        convert_stored(config, 42, **stored)
    assert "margin" not in str(caught.value)


def test_a_margin_is_the_cure_for_directions_alone(stored: dict[str, Path], tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_settings(tiny, {"order": "directions", "directions": 5, "margin": 0.0})
    with pytest.raises(WorkFailed, match=r"target: \d+ constrained entries are outside .*; raise monotone.margin \(now 0\)"):
        convert_stored(config, 42, **stored)
    monkeypatch.setattr(convert_module, "convert", lambda base, spec, ids: (base, all_plus(base), {}))
    with pytest.raises(WorkFailed, match=r"target: \d+ constrained entries are outside .*, expected none; this is a fault of") as caught:
        convert_stored(with_settings(tiny, {}), 42, **stored)
    assert "monotone.margin" not in str(caught.value)


def with_settings(config: Experiment, monotone: dict) -> Experiment:
    """`config` with these settings of the constraint, running in bf16."""
    compute = config.compute.model_copy(update={"precision": "bf16"})
    return config.model_copy(update={"monotone": Monotone.model_validate(monotone), "compute": compute})
