"""Layer-wise warm-up: the loss against a slow computation, and what it does to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from configs.presets import ConfigError, load
from configs.schema import Monotone, Training
from tests.fake_stages import TINY
from tests.tiny_models import random_ids, random_model, write_tokens
from utils.data.tokens import PackedBatches, Tokens
from utils.models.constraints import Constraint
from utils.models.convert import convert
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop
from utils.training.layerwise import layer_scales, layerwise_loss
from utils.training.loop import train
from utils.training.metrics import read_metrics
from utils.training.run import Run

IDS = random_ids(3, 11)


def converted(base: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    return convert(base, Monotone.model_validate(settings), IDS)[0]


def loss_of(model: PreTrainedModel, base: PreTrainedModel) -> float:
    return float(layerwise_loss(model, base, IDS, "fp32", layer_scales(base, IDS, "fp32")).detach())


def test_loss_against_a_slow_computation() -> None:
    base = random_model()
    model = converted(base, recentre=False)
    expected = []
    for number in range(2):
        streams: list[torch.Tensor] = []
        layer, mine = base.gpt_neox.layers[number], model.gpt_neox.layers[number]
        handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, given, into=streams: into.append(given[0]))
        with torch.no_grad():
            base(IDS)
        handle.remove()
        wanted = layer.mlp(layer.post_attention_layernorm(streams[0])).flatten(0, 1)
        made = mine.mlp(mine.post_attention_layernorm(streams[0])).flatten(0, 1)
        centred = torch.eye(16) - 1 / 16
        error, spread = (made - wanted) @ centred, (wanted - wanted.mean(dim=0)) @ centred
        expected.append(float((error.square().sum() / spread.square().sum(dim=1).mean()).detach()))
    assert loss_of(model, base) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    base = random_model()
    model = converted(base)
    scales = layer_scales(base, IDS, "fp32")
    parts = [float(layerwise_loss(model, base, row[None], "fp32", scales).detach()) for row in IDS]
    assert loss_of(model, base) == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize("gain", ["free", "positive", "fold"])
def test_the_base_imitates_itself_and_a_common_shift_costs_nothing(gain: str) -> None:
    base = random_model()
    model = converted(base, parametrisation="annealed", norm_gain=gain)
    assert loss_of(model, base) == pytest.approx(0.0, abs=1e-6)
    model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.data += 3.0
    assert loss_of(model, base) == pytest.approx(0.0, abs=1e-4)
    model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.data[0] += 3.0
    assert loss_of(model, base) > 1.0


def test_behind_rmsnorm_the_mean_counts() -> None:
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(base.state_dict())
    model.model.layers[1].mlp.down_proj.weight.data += 0.05
    assert loss_of(model, base) > 0.01


def run_in(folder: Path, stop: Stop, **settings: Any) -> Run:
    for name, count, seed in (("train", 700, 1), ("validation", 120, 2)):
        if not (folder / name).exists():
            write_tokens(folder / name, count, seed=seed)
    base, monotone = random_model(), Monotone(layerwise_share=0.5)
    model = converted(base)
    model.requires_grad_(True)
    return Run(
        model=model,
        spec=Training(**{"steps": 40, "batch_size": 4, "micro_batch": 2, "validate_every": 10, "max_bad_steps": 3} | settings),
        peak_rate=1e-2,
        train=PackedBatches(Tokens(folder / "train"), 8, 5),
        validation=PackedBatches(Tokens(folder / "validation"), 8, 5),
        precision="fp32",
        state_folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        stop=stop,
        label="train",
        constraint=Constraint(model, monotone),
        teacher=base.requires_grad_(False),
    )


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_first_half_is_layerwise_and_the_change_of_loss_is_no_spike(tmp_path: Path, distillation: float) -> None:
    state, _ = train(run_in(tmp_path, Stop(), distillation=distillation, max_loss_rise=0.5))
    steps, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert state.skipped == 0
    first, second = steps[:20], steps[20:]
    assert all(row["loss"] is None and row["cross_entropy"] is None and row["layerwise_loss"] > 0 for row in first)
    assert first[-1]["layerwise_loss"] < 0.9 * first[0]["layerwise_loss"]
    assert all("layerwise_loss" not in row and row["loss"] > 1.0 for row in second)


def test_stopped_after_every_step(tmp_path: Path) -> None:
    settings = {"steps": 8, "validate_every": 3}
    straight, checkpoints = train(run_in(tmp_path / "one", Stop(), **settings))
    weights = checkpoints.model_tensors(8)
    stop = Stop()
    stop.reason = "signal SIGTERM"
    for step in range(1, 8):
        with pytest.raises(StoppedInTime, match=f"step {step} of 8"):
            train(run_in(tmp_path / "two", stop, **settings))
    resumed, checkpoints = train(run_in(tmp_path / "two", stop, **settings))
    assert resumed.resumed_at == list(range(1, 8))
    assert all(torch.equal(weights[name], tensor) for name, tensor in checkpoints.model_tensors(8).items())
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (tmp_path / "two" / "metrics.jsonl").read_bytes()
    assert straight.best_step == resumed.best_step


def test_several_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer-wise warm-up runs in one process"):
        load(TINY, ["monotone.layerwise_share=0.1", "compute.parallel=ddp"])
