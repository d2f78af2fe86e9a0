"""Recovery of an arm from files to files: history, models and certificate; and the base model and facts that precede it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import Experiment, Monotone, Training
from tests.tiny_models import random_model, slow_nll, write_tokens
from utils.data.tokens import PackedBatches, Tokens
from utils.models.convert import convert
from utils.models.facts import setup_facts
from utils.models.loading import load_model, save_model
from utils.run.artifacts import inventory
from utils.run.errors import InputError, StoppedInTime, WorkFailed
from utils.run.preemption import Stop
from utils.training import recovery, telemetry
from utils.training.base import base_cache
from utils.training.recovery import Files, recover

REFERENCE_FIELDS = {
    "train_losses",
    "val_perplexities",
    "best_val_perplexity",
    "training_time_seconds",
    "training_time_hours",
    "num_epochs",
    "training_samples",
    "hyperparameters",
    "seed",
}
SETUP_FIELDS = {
    "timestamp",
    "model_name",
    "model_revision",
    "seed",
    "num_parameters",
    "num_trainable_parameters",
    "ffn_parameters",
    "ffn_percentage",
    "vocab_size",
    "max_seq_length",
    "device",
    "cuda_available",
    "pytorch_version",
    "python_version",
    "platform",
}
LENGTH = 8
KEPT = (("model",), ("earlier", "step_00000001"), ("earlier", "step_00000003"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start/, base/ and both token splits."""
    root = tmp_path_factory.mktemp("stored")
    save_model(random_model(seed=1), root / "base")
    save_model(random_model(seed=0), root / "start")
    write_tokens(root / "train", 200)
    write_tokens(root / "validation", 60, seed=1)
    return root


@pytest.fixture
def config(tiny: Experiment) -> Experiment:
    spec = Training(steps=5, batch_size=4, micro_batch=2, validate_every=2, distillation=0.5)
    return tiny.model_copy(update={"training": spec, "data": tiny.data.model_copy(update={"sequence_length": LENGTH})})


def files(stored: Path, target: Path) -> Files:
    return Files(
        start=stored / "start",
        base=stored / "base",
        train_tokens=stored / "train",
        validation_tokens=stored / "validation",
        state=target / "state",
        best=target / "best",
        last=target / "last",
        metrics=target / "metrics.jsonl",
        history=target / "history.json",
        certificate=target / "certificate.json",
    )


def recovered(
    config: Experiment, constraint: Monotone | None, paths: Files, stop: Stop | None = None, rate: float = 2e-2
) -> dict[str, Any]:
    recover(config, 3, rate, constraint, paths, stop or Stop(), "train")
    return json.loads(paths.history.read_text())


def test_history_has_the_reference_fields_and_consistent_numbers(config: Experiment, stored: Path, tmp_path: Path) -> None:
    paths = files(stored, tmp_path)
    history = recovered(config, None, paths)
    assert set(history) >= REFERENCE_FIELDS
    assert set(history["hyperparameters"]) >= {"learning_rate", "weight_decay", "batch_size", "warmup_ratio", "max_grad_norm"}
    assert history["hyperparameters"]["learning_rate"] == 2e-2
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert history["validation_steps"] == [2, 4, 5]
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert history["train_losses"] == pytest.approx(expected)
    assert history["best_val_perplexity"] == min(history["val_perplexities"])
    assert history["best_step"] == history["validation_steps"][history["val_nll"].index(min(history["val_nll"]))]
    assert (history["training_samples"], history["training_tokens"]) == (20, 20 * LENGTH)
    assert history["num_epochs"] == pytest.approx(20 / (199 // LENGTH))
    assert history["seed"] == 3
    assert "constraint_info" not in history
    assert not (tmp_path / "certificate.json").exists()


def test_stored_models_are_the_best_and_the_last(config: Experiment, stored: Path, tmp_path: Path) -> None:
    """A rate that rises until it ruins the model: the best is not the last."""
    ruinous = config.model_copy(update={"training": config.training.model_copy(update={"warmup_share": 1.0, "max_loss_rise": 99.0})})
    paths = files(stored, tmp_path)
    history = recovered(ruinous, None, paths, rate=0.9)
    assert history["best_step"] < 5
    sequences = PackedBatches(Tokens(paths.validation_tokens), LENGTH, 0).all_sequences().tolist()
    for folder, expected in ((paths.best, history["best_val_nll"]), (paths.last, history["val_nll"][-1])):
        model = load_model(folder)
        assert expected == pytest.approx(sum(slow_nll(model, ids, LENGTH) for ids in sequences) / len(sequences), rel=1e-5)


@pytest.mark.parametrize("parametrisation", ["projected", "softplus"])
def test_monotone_arm_is_stored_as_plain_weights_with_its_certificate(
    config: Experiment, stored: Path, tmp_path: Path, parametrisation: str
) -> None:
    paths = files(stored, tmp_path)
    history = recovered(config, Monotone(parametrisation=parametrisation), paths)
    info = history["constraint_info"]
    assert info["type"] == parametrisation
    assert "exp" in info["formula"] or "projection" in info["formula"]
    assert info["scope"] == "mlp_both"
    assert info["globally_monotonic"] is False
    weights = load_file(paths.best / "model.safetensors")
    assert set(weights) == set(load_file(stored / "base" / "model.safetensors"))
    assert all(float(tensor.min()) >= 0 for name, tensor in weights.items() if ".mlp." in name and name.endswith("weight"))
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["constraint_holds"] is True
    assert certificate["negative_entries"] == 0


@pytest.mark.parametrize("order", ["balanced", "directions"])
def test_an_annealed_order_is_trained_certified_and_stored(config: Experiment, stored: Path, tmp_path: Path, order: str) -> None:
    """The bound arrives after two of five steps: only later checkpoints may be the best, and a stop in between changes nothing."""
    options = {"directions": 4} if order == "directions" else {}
    spec = Monotone.model_validate(
        {"order": order, "parametrisation": "annealed", "activation": "clamped_gelu", "sign_restarts": 4, **options}
    )
    base = load_model(stored / "base")
    model, chosen, _ = convert(base, spec, torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(10)[None]
    assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-4)
    results = []
    for name, stops in (("straight", 0), ("stopped", 4)):
        save_model(model, tmp_path / name / "start")
        chosen.save(tmp_path / name / "order.safetensors")
        paths = replace(files(stored, tmp_path / name), start=tmp_path / name / "start", order=tmp_path / name / "order.safetensors")
        stop = Stop()
        for _ in range(stops):
            stop.reason = "signal SIGTERM"
            with pytest.raises(StoppedInTime):
                recovered(config, spec, paths, stop)
        history = recovered(config, spec, paths, stop)
        results.append(load_file(paths.last / "model.safetensors"))
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())
    assert history["best_step"] in (4, 5) and history["constraint_info"]["order"] == order
    certificate = json.loads((tmp_path / "straight" / "certificate.json").read_text())
    assert certificate["ffn_monotone"] and certificate["vacuous"] is False and certificate["order_kind"] == order
    assert certificate["falsifiers"]["derivative"]["violated"] == 0 < certificate["falsifiers"]["derivative"]["tried"]
    assert load_model(paths.best).config.hidden_act == "clamped_gelu"


def test_a_checkpoint_before_the_bound_has_arrived_is_never_the_best(config: Experiment, stored: Path, tmp_path: Path) -> None:
    """At a low rate the loss only rises as the bound closes in; the bound arrives at the fifth of five steps."""
    options = {"parametrisation": "annealed", "order": "balanced", "activation": "clamped_gelu", "anneal_share": 0.9, "sign_restarts": 4}
    spec = Monotone.model_validate(options)
    _, chosen, _ = convert(load_model(stored / "base"), spec, torch.zeros(1, 4, dtype=torch.long))
    chosen.save(tmp_path / "order.safetensors")
    paths = replace(files(stored, tmp_path), start=stored / "base", order=tmp_path / "order.safetensors")
    history = recovered(config, spec, paths, rate=1e-6)
    assert history["validation_steps"] == [2, 4, 5]
    assert history["val_nll"][0] < history["val_nll"][2] == history["best_val_nll"]
    assert history["best_step"] == 5
    assert json.loads((tmp_path / "certificate.json").read_text())["ffn_monotone"]


def test_a_broken_constraint_is_a_failure(config: Experiment, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.models.constraints.Constraint.project", lambda self, *arguments: None)
    message = r"best: \d+ constrained entries are outside \(smallest margin -0\.\d+\), expected none"
    with pytest.raises(WorkFailed, match=message):
        recovered(config, Monotone(), files(stored, tmp_path))
    assert not (tmp_path / "certificate.json").exists()


def test_time_is_summed_over_all_starts(config: Experiment, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 50 s with every step, and by 1000 s between two starts."""
    clock = [100.0]
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(Stop):
        def requested(self) -> bool:
            clock[0] += 50
            return super().requested()

    paths = files(stored, tmp_path)
    stop = Slow()
    stop.reason = "signal SIGTERM"
    for _ in range(4):
        with pytest.raises(StoppedInTime):
            recovered(config, None, paths, stop)
        clock[0] += 1000
    history = recovered(config, None, paths, stop)
    assert history["training_time_seconds"] == 250
    assert history["training_time_hours"] == pytest.approx(250 / 3600)
    assert history["tokens_per_second"] == pytest.approx(5 * 4 * LENGTH / 250)
    assert history["resumed_at_steps"] == [1, 2, 3, 4]


@pytest.mark.parametrize("fails", ["save_model", "write_json"])
def test_killed_after_the_last_step(config: Experiment, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """What comes after the training is done again from the checkpoints, with the same result."""
    expected = recovered(config, None, files(stored, tmp_path / "straight"))
    paths = files(stored, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(recovery, fails, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recovered(config, None, paths)
    history = recovered(config, None, paths)
    assert {key: value for key, value in history.items() if "time" not in key and "second" not in key} == {
        key: [5] if key == "resumed_at_steps" else value for key, value in expected.items() if "time" not in key and "second" not in key
    }
    for name in ("best", "last"):
        other = load_file(tmp_path / "straight" / name / "model.safetensors")
        assert all(torch.equal(other[key], value) for key, value in load_file(tmp_path / "killed" / name / "model.safetensors").items())


@pytest.fixture
def scratch(tiny: Experiment, tmp_path: Path) -> tuple[Experiment, Path]:
    """An experiment that pretrains for four steps, and the content folder of its token cache."""
    assert tiny.model.scratch is not None
    shape = tiny.model.scratch.model_copy(update={"steps": 4, "batch_size": 4, "sequence_length": LENGTH, "earlier": (1, 3)})
    content = tmp_path / "token-cache" / "content"
    write_tokens(content / "tokens" / "train", 200)
    write_tokens(content / "tokens" / "validation", 60, seed=1)
    (content.parent / "manifest.json").write_text('{"files": {"tokens/train/tokens.bin": 1, "tokens/attack/tokens.bin": 1}}')
    return tiny.model_copy(update={"model": tiny.model.model_copy(update={"scratch": shape})}), content


@pytest.mark.parametrize("how", ["one bit", "missing"])
def test_a_damaged_earlier_model_is_made_again(
    how: str, scratch: tuple[Experiment, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint vouches for it, and the step at which it was taken is past."""
    config, content = scratch
    straight = base_cache(config, tmp_path / "one", content, Stop())
    stop = Stop()
    stop.reason = "signal SIGTERM"
    for _ in range(2):
        with pytest.raises(StoppedInTime):
            base_cache(config, tmp_path / "two", content, stop)
    (victim,) = (tmp_path / "two").rglob("earlier/step_00000001/model/model.safetensors")
    whole = victim.read_bytes()
    victim.unlink()
    if how == "one bit":
        victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    base = base_cache(config, tmp_path / "two", content, Stop())
    assert f"{victim} " in capsys.readouterr().out
    assert inventory(base) == inventory(straight)


def test_pretraining_goes_on_where_it_was_stopped(scratch: tuple[Experiment, Path], tmp_path: Path) -> None:
    config, content = scratch
    straight = base_cache(config, tmp_path / "one", content, Stop())
    stop = Stop()
    stop.reason = "signal SIGTERM"
    for step in (1, 2, 3):
        with pytest.raises(StoppedInTime, match=f"step {step} of 4"):
            base_cache(config, tmp_path / "two", content, stop)
    resumed = base_cache(config, tmp_path / "two", content, stop)
    weights = [folder.joinpath(*name, "model.safetensors") for name in KEPT for folder in (straight, resumed)]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(weights[::2], weights[1::2], strict=True))
    assert len({path.read_bytes() for path in weights}) == len(KEPT)
    assert json.loads((resumed / "earlier" / "index.json").read_text()) == {"oldest_first": [name for _, name in KEPT[1:]]}
    origin = json.loads((straight / "origin.json").read_text())
    assert origin == json.loads((resumed / "origin.json").read_text())
    assert (origin["steps"], origin["tokens"]) == (4, 4 * 4 * LENGTH)
    assert origin["passes_over_text"] == pytest.approx(16 / 24)


def test_the_base_is_built_once(scratch: tuple[Experiment, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, content = scratch
    first = base_cache(config, tmp_path / "one", content, Stop())
    monkeypatch.setattr("utils.training.base.pretrain", lambda *arguments: pytest.fail("built twice"))
    assert base_cache(config, tmp_path / "one", content, Stop()) == first


def test_a_published_base_is_copied(tiny: Experiment, stored: Path, tmp_path: Path) -> None:
    model = tiny.model.model_copy(update={"source": "pretrained", "name": str(stored / "base"), "scratch": None})
    write_tokens(tmp_path / "tokens" / "train", 200)
    found = base_cache(tiny.model_copy(update={"model": model}), tmp_path / "cache", tmp_path, Stop())
    origin = json.loads((found / "origin.json").read_text())
    assert origin["name"] == str(stored / "base")
    assert origin["commit"]
    before, after = (load_file(folder / "model.safetensors") for folder in (stored / "base", found / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sequences_longer_than_the_base_model_takes_are_refused(tiny: Experiment, stored: Path) -> None:
    long = tiny.model_copy(update={"data": tiny.data.model_copy(update={"sequence_length": 65})})
    with pytest.raises(InputError, match=r"data.sequence_length = 65: expected at most 64, the longest sequence of the base model"):
        setup_facts(long, 7, stored / "base")


def test_setup_facts(tiny: Experiment, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = setup_facts(tiny, 7, stored / "base")
    assert set(facts) >= SETUP_FIELDS
    assert facts["num_parameters"] == sum(tensor.numel() for tensor in load_file(stored / "base" / "model.safetensors").values())
    assert facts["ffn_parameters"] == 2 * (2 * 16 * 32 + 16 + 32)
    assert facts["ffn_percentage"] == pytest.approx(100 * facts["ffn_parameters"] / facts["num_parameters"])
    assert (facts["seed"], facts["device"], facts["max_seq_length"]) == (7, "cpu", tiny.data.sequence_length)
    card = SimpleNamespace(name="a card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr("utils.models.facts.torch.cuda.is_available", lambda: True)
    with_card = setup_facts(tiny, 7, stored / "base")
    assert (with_card["gpu_name"], with_card["gpu_memory_gb"]) == ("a card", 80)
