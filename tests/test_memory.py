"""What fits: the search on made-up cards against brute force, the rule of the CPU, and what is said when memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import Monotone, Training
from tests.tiny_models import random_model, write_tokens
from utils.data.tokens import PackedBatches
from utils.models.constraints import Constraint
from utils.run.errors import WorkFailed
from utils.run.preemption import Stop
from utils.training import memory
from utils.training.distributed import World
from utils.training.memory import choose, measured
from utils.training.run import Run
from utils.training.step import Stepper


def training(**settings: Any) -> Training:
    return Training(**{"steps": 1, "batch_size": 24, "validate_every": 1} | settings)


@pytest.mark.parametrize("limit", [20.0, 29.9, 30.1, 33.0, 41.0, 80.0, 1e6])
@pytest.mark.parametrize("micro_batch", ["auto", 4])
def test_the_largest_that_fits_with_the_least_recomputation(limit: float, micro_batch: Any) -> None:
    """A card on which a step holds 25 GiB and each sequence 5 GiB, 1 GiB if all blocks are recomputed."""
    asked = []

    def needs(size: int, share: float) -> float:
        return 25 + size * (5 - 4 * share)

    def peak(size: int, share: float) -> float | None:
        asked.append(size)
        return needs(size, share) if needs(size, share) <= limit / memory.MARGIN else None

    sizes = [micro_batch] if micro_batch != "auto" else [1, 2, 3, 4, 6, 8, 12, 24]
    fitting = [(size, share) for share in memory.RECOMPUTE for size in sizes if needs(size, share) <= limit]
    if not fitting:
        with pytest.raises(WorkFailed, match=f"micro-batch of {sizes[0]} does not fit into the {limit:.1f} GiB.*training.recompute to 1.0"):
            measured(training(micro_batch=micro_batch), sizes, peak, limit)
        return
    share = min(share for _, share in fitting)
    assert measured(training(micro_batch=micro_batch), sizes, peak, limit) == (
        max(size for size, other in fitting if other == share),
        share,
    )
    assert max(asked) <= 4


def test_a_given_share_is_kept() -> None:
    assert measured(training(recompute=1.0), [1, 2, 4, 8, 24], lambda size, share: 25 + size * (5 - 4 * share), 33.0) == (8, 1.0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    text = PackedBatches(write_tokens(tmp_path / "tokens", 600), 8, seed=5)
    return Run(
        model=random_model(),
        spec=training(),
        peak_rate=1e-2,
        train=text,
        validation=text,
        precision="fp32",
        state_folder=tmp_path / "checkpoints",
        metrics=tmp_path / "metrics.jsonl",
        stop=Stop(),
        label="train",
    )


@pytest.mark.parametrize(("tokens", "expected"), [(2048, 24), (8 * 13, 12), (8 * 12, 12), (8, 1), (1, 1)])
def test_the_rule_of_the_cpu(run: Run, tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CPU_TOKENS", tokens)
    assert choose(run, Stepper(run)) == (expected, 0.0)


def test_what_is_configured_is_taken(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.spec = training(micro_batch=6, recompute=0.5)
    assert choose(run, Stepper(run)) == (6, 0.5)
    assert "micro-batches of 6 sequences, 50% of the blocks recomputed" in capsys.readouterr().out


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended GPU that has held `used` bytes at its peak."""
    state = SimpleNamespace(used=0, free=70 * 2**30, reserved=10 * 2**30, fraction=1.0, resets=0)

    def reset() -> None:
        state.resets += 1

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state.used)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, 100 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: state.fraction)
    return state


def test_a_real_pass_is_measured(run: Run, card: SimpleNamespace) -> None:
    """The moments of AdamW are not there before the first step, but will be; nothing stays behind."""
    stepper = Stepper(run)
    before = [parameter.clone() for parameter in stepper.parameters]
    card.used = 3 * 2**30
    ids = torch.from_numpy(run.train.batch(0, 4))
    count = sum(parameter.numel() for parameter in stepper.parameters)
    assert memory._peak(stepper, ids, 0.5) == pytest.approx(3 + 8 * count / 2**30)
    assert (stepper.micro_batch, stepper.recompute, card.resets) == (4, 0.5, 1)
    assert all(parameter.grad is None for parameter in stepper.parameters)
    assert all(map(torch.equal, before, stepper.parameters))


def test_a_copy_under_way_is_awaited_before_the_guard_judges(run: Run) -> None:
    """What it remembers belongs to the checkpoint, like the weights."""
    seen: list[int] = []
    stepper = Stepper(run, lambda: seen.append(int(stepper.guard.count)))
    stepper(torch.from_numpy(run.train.batch(0, 12)), 1e-3, 0)
    assert seen == [0]


def test_a_layer_wise_step_is_measured_too(run: Run, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = replace(run, constraint=Constraint(run.model, Monotone(layerwise_share=1.0)), teacher=random_model(seed=1))
    stepper, kinds = Stepper(converted), []
    real = stepper.gradients
    monkeypatch.setattr(stepper, "gradients", lambda ids: (kinds.append(stepper.layerwise), real(ids))[1])
    assert memory._peak(stepper, torch.from_numpy(run.train.batch(0, 4)), 0.0) is not None
    assert kinds == [False, False, True]
    assert not stepper.layerwise


def test_a_pass_without_room_is_no_error(run: Run, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(run)

    def full(ids: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(stepper, "gradients", full)
    assert memory._peak(stepper, torch.zeros(1, 9, dtype=torch.long), 0.0) is None


def test_of_several_none_goes_on_after_a_pass_without_room(run: Run, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are in the middle of an exchange with it."""
    stepper = Stepper(run)

    def full(ids: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(stepper, "gradients", full)
    run.world = World(0, 2, "ddp")
    with pytest.raises(torch.OutOfMemoryError):
        memory._peak(stepper, torch.zeros(1, 9, dtype=torch.long), 0.0)


def test_both_kinds_of_micro_batches_are_measured(run: Run, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ddp a gradient that waits for the last micro-batch lies beside the buffers of the exchange."""
    kinds: list[bool] = []
    monkeypatch.setattr(memory, "last_micro_batch", lambda module, last: kinds.append(last))
    memory._peak(Stepper(run), torch.from_numpy(run.train.batch(0, 2)), 0.0)
    assert kinds == [False, True]


def test_usable_memory_is_what_is_free_and_what_is_ours(card: SimpleNamespace) -> None:
    assert memory._usable(torch.device("cuda")) == 80 * 2**30
    card.fraction = 0.4
    assert memory._usable(torch.device("cuda")) == 40 * 2**30


@pytest.mark.usefixtures("card")
def test_on_a_gpu_auto_measures(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The device is pretended; sizes and shares that were tried, and the result, are not."""
    tried = []

    def peak(stepper: Stepper, ids: torch.Tensor, share: float) -> float:
        tried.append((len(ids), share))
        return 60.0 + len(ids) * 3

    monkeypatch.setattr(memory, "_peak", peak)
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(Run, "device", property(lambda self: device))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given, **more: self)
    assert choose(run, SimpleNamespace()) == (4, 0.0)  # 0.92 of 80 GiB are 73.6: four sequences, not six
    assert tried == [(1, 0.0), (2, 0.0)]
    assert "micro-batches of 4 sequences, 0% of the blocks recomputed" in capsys.readouterr().out
    monkeypatch.setattr(World, "largest", lambda self, value: value + 2)  # another process needs 2 GiB more, and has 2 GiB less
    assert choose(run, SimpleNamespace()) == (3, 0.0)
