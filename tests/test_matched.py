"""The baseline brought to a worse loss: by noise, by going back in its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import Experiment
from tests.tiny_models import random_model, write_tokens
from utils.attacks.matched import HALVINGS, TOLERANCE, before, matched_controls, with_noise
from utils.data.tokens import PackedBatches, Tokens
from utils.models.likelihood import mean_nll
from utils.models.loading import load_model, save_model

CPU = torch.device("cpu")


def trained(model: PreTrainedModel, steps: int, folder: Path) -> PreTrainedModel:
    """A few steps on the text, so that noise and going back make it worse."""
    ids = torch.from_numpy(PackedBatches(Tokens(folder), 8, 0).all_sequences())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """earlier/step_1, step_2; base; baseline; and text. Each model is better than the one before it."""
    folder = tmp_path_factory.mktemp("history")
    write_tokens(folder / "validation", 400)
    model = random_model()
    for name, steps in {"earlier/step_1": 0, "earlier/step_2": 4, "base": 10, "baseline": 20}.items():
        save_model(trained(model, steps, folder / "validation"), folder / name)
    (folder / "earlier" / "index.json").write_text('{"oldest_first": ["step_1", "step_2"]}')
    return folder


@pytest.fixture(scope="module")
def loss(history: Path) -> Callable[[PreTrainedModel], float]:
    sequences = PackedBatches(Tokens(history / "validation"), 8, 0).all_sequences()
    return lambda model: mean_nll(model, sequences, 16, "fp32")


def test_noise_brings_the_loss_to_the_target_and_touches_the_sublayers_alone(
    history: Path, loss: Callable[[PreTrainedModel], float]
) -> None:
    model, clean = load_model(history / "baseline"), load_model(history / "baseline")
    target = loss(model) + 0.3
    facts = with_noise(model, loss, target, seed=1)
    assert loss(model) == pytest.approx(target, abs=TOLERANCE)
    assert facts["nll"] == pytest.approx(loss(model), abs=1e-6)
    changed = {name for (name, a), b in zip(model.named_parameters(), clean.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == {f"gpt_neox.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("dense_h_to_4h", "dense_4h_to_h")}
    weight, old = (m.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.detach() for m in (model, clean))
    assert float((weight - old).std() / old.square().mean().sqrt()) == pytest.approx(facts["share_of_rms"], rel=0.1)


def test_noise_is_the_seeds(history: Path, loss: Callable[[PreTrainedModel], float]) -> None:
    models = [load_model(history / "baseline") for _ in range(3)]
    target = loss(models[0]) + 0.2
    for model, seed in zip(models, (1, 1, 2), strict=True):
        with_noise(model, loss, target, seed)
    weights = [model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("older", "newer"), [("earlier/step_1", "earlier/step_2"), ("earlier/step_2", "base"), ("base", "baseline")])
def test_going_back_stops_between_the_right_neighbours(
    history: Path, loss: Callable[[PreTrainedModel], float], older: str, newer: str
) -> None:
    ends = [load_model(history / name) for name in (older, newer)]
    target = (loss(ends[0]) + loss(ends[1])) / 2
    found = before([history / name for name in ("earlier/step_1", "earlier/step_2", "base", "baseline")], loss, target, CPU)
    assert found is not None
    model, facts = found
    assert loss(model) == pytest.approx(target, abs=TOLERANCE)
    assert facts["between"] == [Path(older).name, Path(newer).name]
    mixed = [torch.lerp(b, a, facts["way_back"]) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True)]
    assert all(torch.allclose(weight, expected) for weight, expected in zip(model.parameters(), mixed, strict=True))


def test_nothing_is_so_bad(history: Path, loss: Callable[[PreTrainedModel], float]) -> None:
    assert before([history / "base", history / "baseline"], loss, 50.0, CPU) is None


def controls(tiny: Experiment, history: Path, monotonic: str, folder: Path) -> tuple[dict[str, Path], dict[str, object]]:
    config = tiny.model_copy(update={"data": tiny.data.model_copy(update={"sequence_length": 8})})
    models = {"base": history / "base", "baseline": history / "baseline", "monotonic": history / monotonic}
    return matched_controls(
        config, models=models, earlier_models=history / "earlier", validation_tokens=history / "validation", folder=folder
    )


def test_both_controls_have_the_monotone_models_loss(
    tiny: Experiment, history: Path, loss: Callable[[PreTrainedModel], float], tmp_path: Path
) -> None:
    folders, facts = controls(tiny, history, "base", tmp_path)
    assert facts["target_nll"] == pytest.approx(loss(load_model(history / "base")), abs=1e-5)
    assert list(folders) == ["noise", "earlier"]
    for folder in folders.values():
        assert loss(load_model(folder)) == pytest.approx(facts["target_nll"], abs=2 * TOLERANCE)
    made = (tmp_path / "noise" / "model.safetensors").stat().st_mtime_ns
    assert controls(tiny, history, "base", tmp_path) == (folders, facts)
    assert (tmp_path / "noise" / "model.safetensors").stat().st_mtime_ns == made


def test_a_control_that_cannot_be_had_is_named(tiny: Experiment, history: Path, tmp_path: Path) -> None:
    folders, facts = controls(tiny, history, "baseline", tmp_path / "as_good")
    assert folders == {}
    assert "not needed" in str(facts["noise"])
    assert json.loads((tmp_path / "as_good" / "matched.json").read_text())["facts"] == facts
    broken = load_model(history / "base")
    broken.get_output_embeddings().weight.data.mul_(30.0)
    save_model(broken, history / "broken")
    folders, facts = controls(tiny, history, "broken", tmp_path / "too_bad")
    assert "not reached" in str(facts["earlier"])
    assert "earlier" not in folders
    assert HALVINGS > 10
