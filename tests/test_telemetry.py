"""What a run tells of its time and its machine, and the boards that show it; none of it may touch the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from configs.presets import ConfigError, load
from configs.schema import Telemetry as Spec
from configs.schema import Training
from tests.fake_stages import TINY
from tests.test_loop import Each, Killed
from tests.tiny_models import random_model, write_tokens
from utils.data.tokens import PackedBatches
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop
from utils.run.records import read_rows
from utils.training import loop, telemetry, throughput
from utils.training.boards import opened
from utils.training.loop import train
from utils.training.run import Run
from utils.training.throughput import flops_per_token, peak_flops

LENGTH = 8
Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Runs of seven steps of 4 x 8 tokens that share one folder; validations after 3, 6 and 7."""
    tokens = [write_tokens(tmp_path / name, size, seed) for seed, (name, size) in enumerate((("train", 200), ("validation", 60)))]

    def run(stop: Stop | None = None, log_to: str = "none") -> Run:
        return Run(
            model=random_model(),
            spec=Training(steps=7, batch_size=4, micro_batch=2, validate_every=3, distillation=0.0),
            peak_rate=1e-2,
            train=PackedBatches(tokens[0], LENGTH, 5),
            validation=PackedBatches(tokens[1], LENGTH, 5),
            precision="fp32",
            state_folder=tmp_path / "run" / "state" / "checkpoints",
            metrics=tmp_path / "run" / "metrics.jsonl",
            stop=stop or Stop(),
            label="train",
            log_to=log_to,
        )

    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, moved by hand."""
    hand = [100.0]
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: hand[0]))
    return hand


def rows(run: Run) -> list[dict[str, Any]]:
    return read_rows(run.metrics.with_name("telemetry.jsonl"))


def test_rows_at_flushes_and_validations(make: Make, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds a step, five a validation, three a checkpoint: what each row says is counted by hand."""

    def longer(owner: Any, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def act(*given: Any) -> Any:
            clock[0] += seconds
            return real(*given)

        monkeypatch.setattr(owner, name, act)

    longer(loop.Stepper, "__call__", 2.0)
    longer(loop.Stepper, "mean_nll", 5.0)
    longer(loop.Checkpoints, "save", 3.0)
    monkeypatch.setattr(loop, "FLUSH_EVERY", 2)
    run = make()
    train(run)
    found = rows(run)
    assert [row["step"] for row in found] == [2, 3, 3, 5, 6, 6, 7, 7]
    assert [row["tokens"] for row in found] == [32 * row["step"] for row in found]
    assert [row["seconds"] for row in found] == [4, 6, 11, 18, 20, 25, 30, 35]
    steps = [row for row in found if "validation_nll" not in row]
    assert [row["tokens_per_second"] for row in steps] == pytest.approx([16, 16, 64 / 7, 16, 32 / 5])
    assert [row.get("checkpoint_stall_seconds") for row in steps] == [None, None, 3, None, 3]
    assert [row["validation_seconds"] for row in found if "validation_nll" in row] == [5, 5, 5]
    each = flops_per_token(run.model, LENGTH)
    assert [row["tflops_per_second"] for row in steps] == pytest.approx([row["tokens_per_second"] * each / 1e12 for row in steps])
    assert {row["start"] for row in found} == {1}
    assert all(row["host"] for row in found)
    assert "model_flop_utilisation" not in found[0]  # nobody knows a CPU's peak
    validations = [row["validation_nll"] for row in read_rows(run.metrics) if "validation_nll" in row]
    assert [row["validation_nll"] for row in found if "validation_nll" in row] == validations


def test_restarts_append_and_metrics_stay_as_of_a_straight_run(make: Make, tmp_path: Path) -> None:
    """Killed after step 5, with a line torn; then stopped; then to the end."""
    straight = make()
    train(straight)
    expected = straight.metrics.read_bytes()
    straight.metrics.parent.rename(tmp_path / "straight")

    def die(count: int) -> None:
        if count == 5:
            raise Killed

    with pytest.raises(Killed):
        train(make(Each(die)))
    path = straight.metrics.with_name("telemetry.jsonl")
    kept = path.read_bytes()
    with path.open("ab") as handle:
        handle.write(b'{"step": 5, "tok')
    asked = Stop()
    asked.reason = "signal SIGUSR1"
    with pytest.raises(StoppedInTime):
        train(make(asked))
    last = make()
    train(last)
    assert path.read_bytes().startswith(kept)
    assert [(row["start"], row["step"]) for row in rows(last)] == [(1, 3), (1, 3), (2, 4), (3, 6), (3, 6), (3, 7), (3, 7)]
    seconds = [row["seconds"] for row in rows(last)]
    assert seconds == sorted(seconds)
    assert last.metrics.read_bytes() == expected
    assert b"second" not in expected


def test_seconds_count_all_starts(make: Make, clock: list[float]) -> None:
    def tick(count: int) -> None:
        clock[0] += 10

    asked = Each(tick)
    asked.reason = "signal SIGUSR1"
    for _ in range(6):
        with pytest.raises(StoppedInTime):
            train(make(asked))
        clock[0] += 1000
    run = make(asked)
    train(run)
    assert [row["seconds"] for row in rows(run) if "validation_nll" not in row] == [10, 20, 30, 40, 50, 60, 70]
    assert [row["start"] for row in rows(run) if "validation_nll" not in row] == list(range(1, 8))


def test_what_a_card_tells(make: Make, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card of known peak, and a driver that answers, then one that does not."""
    run = make()
    each = flops_per_token(run.model, LENGTH)
    card = SimpleNamespace(device=torch.device("cuda", 0), model=run.model, train=run.train, tokens_per_step=32, precision="bf16")
    card.world = SimpleNamespace(size=2)
    for name, size in {"memory_allocated": 16, "memory_reserved": 15, "max_memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 391_500)
    log = telemetry.Telemetry(card, run.metrics.with_name("telemetry.jsonl"), 0, 0.0, print)  # type: ignore[arg-type]
    clock[0] += 4.0
    log.steps(10)
    monkeypatch.undo()
    (row,) = rows(run)
    assert row["model_flop_utilisation"] == pytest.approx(80 * each / (2 * 312e12))
    assert (row["gpu_utilisation_percent"], row["gpu_power_watts"]) == (97, 391.5)
    assert (row["memory_allocated_gib"], row["memory_reserved_gib"], row["memory_peak_gib"]) == (16, 15, 20)
    log.close()


def test_a_driver_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert telemetry._card_readings(torch.device("cuda"))() == {}


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", None),
        ("Another", "bf16", None),
    ],
)
def test_peaks(name: str, precision: str, rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == rate
    assert peak_flops(torch.device("cpu"), precision) is None


SHAPE = {"vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("config", "block"),
    [
        (GPTNeoXConfig(intermediate_size=40, **SHAPE), 4 * 24 * 24 + 2 * 24 * 40),
        (LlamaConfig(intermediate_size=40, num_key_value_heads=2, **SHAPE), 3 * 24 * 24 + 3 * 24 * 40),
    ],
)
def test_operations_against_torchs_own_count(config: PretrainedConfig, block: int, tied: bool) -> None:
    """The matrices by hand, and all products of a forward pass, attention's whole square included, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    matrices, attention, length = 3 * block + 24 * 70, 3 * 24, 16
    assert flops_per_token(model, length) == 6 * matrices + 6 * attention * length
    assert flops_per_token(model, length, whole_square=True) == 6 * matrices + 12 * attention * length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.int64), use_cache=False)
    counted = counter.get_total_flops() / (2 * length)  # forward alone: a third
    assert counted == pytest.approx(flops_per_token(model, length, whole_square=True) / 3, rel=0.01)


class FakeWandB(ModuleType):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.told: list[Any] = []

    def init(self, **given: Any) -> FakeWandB:
        self.told.append(given)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.told.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.told.append(row)

    def finish(self) -> None:
        self.told.append("finished")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize(("offline", "mode"), [("", None), ("1", "offline")])
def test_wandb_gets_every_row_and_the_same_run_after_a_restart(
    make: Make, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch, offline: str, mode: str | None
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    asked = Stop()
    asked.reason = "signal SIGUSR1"
    with pytest.raises(StoppedInTime):
        train(make(asked, "wandb"))
    run = make(log_to="wandb")
    train(run)
    first, second = (told for told in wandb.told if isinstance(told, dict) and "project" in told)
    assert first == second
    assert (first["mode"], first["resume"], first["dir"]) == (mode, "allow", str(run.metrics.parent))
    assert first["name"].endswith("/run")
    assert wandb.told.count("finished") == 2
    assert ("*", "step") in wandb.told
    logged = [told for told in wandb.told if isinstance(told, dict) and "step" in told]
    assert {row["step"] for row in logged if "loss" in row} == set(range(1, 8))
    assert {row["step"] for row in logged if "tokens_per_second" in row} == {1, 3, 6, 7}
    assert not any(isinstance(value, (str, bool)) or value is None for row in logged for value in row.values())


def test_wandb_is_finished_when_the_run_fails(make: Make, wandb: FakeWandB) -> None:
    def die(count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(make(Each(die), "wandb"))
    assert wandb.told[-1] == "finished"


def test_only_the_first_process_shows_anything(make: Make, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.training.distributed.World.first", property(lambda self: False))
    run = make(log_to="wandb")
    train(run)
    assert wandb.told == []
    assert not run.metrics.parent.joinpath("telemetry.jsonl").exists()


def test_the_real_tensorboard(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: the curves that it reads back are those of the files, also after a restart from an earlier step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def die(count: int) -> None:
        if count == 5:
            raise Killed

    monkeypatch.setattr(loop, "FLUSH_EVERY", 1)
    with pytest.raises(Killed):
        train(make(Each(die), "tensorboard"))
    run = make(log_to="tensorboard")
    train(run)
    shown = accumulator.EventAccumulator(str(run.metrics.parent / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    losses = {row["step"]: row["loss"] for row in read_rows(run.metrics) if "loss" in row}
    found = {event.step: event.value for event in shown.Scalars("loss")}
    assert found == pytest.approx(losses)
    assert [event.step for event in shown.Scalars("loss")] == list(
        range(1, 8)
    )  # what the killed start had shown beyond its checkpoint is gone
    assert [event.step for event in shown.Scalars("validation_nll")][-1] == 7
    assert "tokens_per_second" in shown.Tags()["scalars"]


def test_no_board_is_opened_by_default(tmp_path: Path) -> None:
    with opened("none", tmp_path / "new", 0) as show:
        show({"step": 1, "loss": 2.0})
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.schema.find_spec", lambda name: None)
    message = "log_to='wandb' needs a package that is not installed: pip install wandb; or log_to='none'"
    with pytest.raises(ValidationError, match=message):
        Spec(log_to="wandb")
    with pytest.raises(ConfigError, match=message):
        load(TINY, ["telemetry.log_to=wandb"])
    with pytest.raises(ConfigError, match=r"telemetry\.log_to"):
        load(TINY, ["telemetry.log_to=tensorbord"])
    assert Spec(log_to="none") == Spec()


def test_the_board_may_change_between_two_starts() -> None:
    """No stage's identity holds it."""
    from stages.pipeline import stages

    assert not any(key.startswith("telemetry") for stage in stages() for key in stage.config_keys)
    assert json.loads(load(TINY).model_dump_json())["telemetry"] == {"log_to": "none"}
