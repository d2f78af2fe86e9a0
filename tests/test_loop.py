"""The training loop: any interruption leads to the same bits, every step is what its formula says, divergence is named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from configs.schema import Monotone, Training
from tests.tiny_models import random_model, slow_nll, write_tokens
from utils.data.tokens import PackedBatches, Tokens
from utils.models import head
from utils.models.blocks import blocks
from utils.models.constraints import Constraint
from utils.run.errors import InputError, StoppedInTime, WorkFailed
from utils.run.preemption import Stop
from utils.training import checkpoint, guard, loop, memory, step
from utils.training.checkpoint import Checkpoints, TrainState
from utils.training.loop import train
from utils.training.metrics import MetricsLog, read_metrics
from utils.training.run import Run

LENGTH = 8
ARMS = ("baseline", "projected", "softplus")


class Killed(Exception):
    """Stands for a process that dies: nothing after it is run."""


class Each(Stop):
    """Calls `act(n)` after the n-th optimiser step of this start (from 1), before anything of that step is written."""

    def __init__(self, act: Callable[[int], None]) -> None:
        super().__init__()
        self.act, self.count = act, 0

    def requested(self) -> bool:
        self.count += 1
        self.act(self.count)
        return super().requested()


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokens, Tokens]:
    folder = tmp_path_factory.mktemp("tokens")
    return write_tokens(folder / "train", 200), write_tokens(folder / "validation", 60, seed=1)


@dataclass
class Bench:
    """Makes runs that share one folder, hence resume one another."""

    splits: tuple[Tokens, Tokens]
    folder: Path
    arm: str = "projected"

    def run(self, stop: Stop | None = None, rate: float = 3e-2, precision: str = "fp32", **settings: Any) -> Run:
        spec = Training(**{"steps": 7, "batch_size": 4, "micro_batch": 2, "validate_every": 3, "keep_last": 2} | settings)
        model = random_model()
        limit = Constraint(model, Monotone(parametrisation=self.arm)) if self.arm != "baseline" else None
        packed = [PackedBatches(tokens, LENGTH, seed=5) for tokens in self.splits]
        files = {"state_folder": self.folder / "checkpoints", "metrics": self.folder / "metrics.jsonl"}
        teacher = random_model(seed=1) if spec.distillation else None
        return Run(
            model=model,
            spec=spec,
            peak_rate=rate,
            train=packed[0],
            validation=packed[1],
            precision=precision,
            stop=stop or Stop(),
            label="train",
            constraint=limit,
            teacher=teacher,
            **files,
        )

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return read_metrics(self.folder / "metrics.jsonl")


@pytest.fixture
def bench(splits: tuple[Tokens, Tokens], tmp_path: Path) -> Bench:
    return Bench(splits, tmp_path / "run")


Outcome = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], bytes, int]


def outcome(state: TrainState, checkpoints: Checkpoints, bench: Bench) -> Outcome:
    """Last and best weights, moments, log, best step."""
    tensors = (checkpoints.model_tensors(7), checkpoints.optimizer_tensors(7), checkpoints.model_tensors(state.best_step))
    return (*tensors, (bench.folder / "metrics.jsonl").read_bytes(), state.best_step)


def assert_same(one: Outcome, other: Outcome) -> None:
    for mine, theirs in zip(one[:3], other[:3], strict=True):
        assert set(mine) == set(theirs)
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert one[3:] == other[3:]


@pytest.fixture(scope="module")
def straight(splits: tuple[Tokens, Tokens], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What an uninterrupted run of each arm gives."""
    benches = {arm: Bench(splits, tmp_path_factory.mktemp(arm), arm) for arm in ARMS}
    return {arm: outcome(*train(bench.run()), bench) for arm, bench in benches.items()}


@pytest.mark.parametrize("arm", ARMS)
def test_stopped_after_every_step(bench: Bench, straight: dict[str, Outcome], arm: str) -> None:
    bench.arm = arm
    asked = Stop()
    asked.reason = "signal SIGUSR1"
    for done in range(1, 7):
        with pytest.raises(StoppedInTime, match=f"signal SIGUSR1, step {done} of 7"):
            train(bench.run(asked))
    state, checkpoints = train(bench.run(asked))
    assert state.resumed_at == [1, 2, 3, 4, 5, 6]
    assert_same(outcome(state, checkpoints, bench), straight[arm])


@pytest.mark.parametrize("killed", range(1, 8))
def test_killed_in_any_step(bench: Bench, straight: dict[str, Outcome], killed: int) -> None:
    """Steps since the last checkpoint are done again, and their rows in the log are not there twice."""

    def die(count: int) -> None:
        if count == killed:
            raise Killed

    with pytest.raises(Killed):
        train(bench.run(Each(die)))
    state, checkpoints = train(bench.run())
    assert state.resumed_at == ([] if killed <= 3 else [3 * ((killed - 1) // 3)])
    assert_same(outcome(state, checkpoints, bench), straight["projected"])


def test_killed_in_the_last_validation(bench: Bench, straight: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference then said 'complete' with a best perplexity of Infinity and no model."""
    real, calls = step.Stepper.mean_nll, []

    def die(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(step.Stepper, "mean_nll", die)
    with pytest.raises(Killed):
        train(bench.run())
    state, checkpoints = train(bench.run())
    assert math.isfinite(state.best_nll or math.nan)
    assert_same(outcome(state, checkpoints, bench), straight["projected"])


@pytest.mark.parametrize("file", [*checkpoint.FILES, "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_killed_while_the_newest_checkpoint_was_written(
    bench: Bench, straight: dict[str, Outcome], file: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(bench.run())
    victim = bench.folder / "checkpoints" / "step_00000007" / file
    if how == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-9])
    state, checkpoints = train(bench.run())
    assert "checkpoint step_00000007 is damaged and passed over" in capsys.readouterr().out
    assert state.resumed_at == [6]
    assert_same(outcome(state, checkpoints, bench), straight["projected"])


def test_a_checkpoint_that_does_not_say_for_how_many_processes(
    bench: Bench, straight: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote them. Nothing is compiled for its split, which is chosen again."""
    unsaid = ("processes", "parallel")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "asdict", lambda state: {key: value for key, value in vars(state).items() if key not in unsaid})
        with pytest.raises(StoppedInTime):
            asked = Stop()
            asked.reason = "signal SIGUSR1"
            train(bench.run(asked))
    run, no_stepper = bench.run(), SimpleNamespace()
    run.compiled = True
    assert loop._newest(run, no_stepper, Checkpoints(run.state_folder, 2)) is not None
    state, checkpoints = train(bench.run())
    assert (state.resumed_at, state.processes, state.micro_batch) == ([1], 1, 2)
    assert_same(outcome(state, checkpoints, bench), straight["projected"])


def test_without_any_intact_checkpoint_all_is_done_again(bench: Bench, straight: dict[str, Outcome]) -> None:
    train(bench.run())
    for path in (bench.folder / "checkpoints").glob("step_*/state.json"):
        path.unlink()
    state, checkpoints = train(bench.run())
    assert state.resumed_at == []
    assert_same(outcome(state, checkpoints, bench), straight["projected"])


def test_a_finished_run_is_not_trained_again(bench: Bench, straight: dict[str, Outcome]) -> None:
    train(bench.run())
    state, checkpoints = train(bench.run(Each(lambda count: pytest.fail("a step was made"))))
    assert state.step == 7
    assert_same(outcome(state, checkpoints, bench), straight["projected"])


def test_the_best_is_kept_beside_the_last(bench: Bench) -> None:
    """With a rate that ruins the model after its first validation, the best is the oldest."""
    state, checkpoints = train(bench.run(rate=0.9, steps=12, validate_every=1, keep_last=1, warmup_share=1.0, max_loss_rise=99.0))
    losses = [row["validation_nll"] for row in bench.rows()[1]]
    assert state.best_step == 1 + losses.index(min(losses)) < 12
    assert state.best_nll == min(losses)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step_{state.best_step:08d}", "step_00000012"]
    run = bench.run()
    run.model.load_state_dict(checkpoints.model_tensors(state.best_step))
    sequences = run.validation.all_sequences().tolist()
    assert state.best_nll == pytest.approx(sum(slow_nll(run.model, ids, LENGTH) for ids in sequences) / len(sequences), rel=1e-5)


def test_first_step_against_a_slow_computation(bench: Bench) -> None:
    """Loss, its two parts, the gradient's norm and the clipped gradient, by plain transformers and torch.distributions."""
    run = bench.run(steps=1, max_gradient_norm=0.05, distillation=0.3)
    train(run)
    (row,), _ = bench.rows()
    fresh = bench.run(distillation=0.3)
    ids = torch.from_numpy(fresh.train.batch(0, 4))
    entropies, divergences = [], []
    for text in ids:
        logits, target = fresh.model(text[None, :-1]).logits[0], fresh.teacher(text[None, :-1]).logits[0].detach()
        entropies.append(-logits.log_softmax(-1)[range(LENGTH), text[1:]].mean())
        divergences.append(kl_divergence(Categorical(logits=target), Categorical(logits=logits)).mean())
    entropy, divergence = torch.stack(entropies).mean(), torch.stack(divergences).mean()
    loss = 0.7 * entropy + 0.3 * divergence
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in fresh.model.parameters()]).norm()
    assert row["cross_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert row["divergence"] == pytest.approx(divergence.item(), rel=1e-5)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert (row["step"], row["tokens"]) == (1, 4 * LENGTH)
    first = Checkpoints(run.state_folder, 2).optimizer_tensors(1)
    moments = torch.cat([tensor.flatten() for name, tensor in first.items() if name.endswith("exp_avg")])
    assert float(moments.norm()) == pytest.approx(0.1 * 0.05, rel=1e-4)


def test_every_split_into_micro_batches_gives_the_same_step(bench: Bench, tmp_path: Path) -> None:
    found = {}
    for micro in (1, 2, 4, 8):
        each = Bench(bench.splits, tmp_path / str(micro))
        run = each.run(batch_size=8, micro_batch=micro, steps=3)
        train(run)
        found[micro] = [[row["loss"], row["cross_entropy"], row["divergence"], row["gradient_norm"]] for row in each.rows()[0]]
    for micro in (1, 2, 4):
        torch.testing.assert_close(torch.tensor(found[micro]), torch.tensor(found[8]), rtol=1e-4, atol=1e-5)


def test_without_distillation_the_loss_is_the_cross_entropy(bench: Bench) -> None:
    train(bench.run(distillation=0.0))
    assert all(row["loss"] == row["cross_entropy"] and row["divergence"] == 0 for row in bench.rows()[0])


def test_projected_weights_are_never_negative(bench: Bench) -> None:
    lowest, touched = [], []

    def look(count: int) -> None:
        lowest.append(min(weight.min().item() for weight in run.constraint.parameters))
        touched.append(sum(int((weight == 0).sum()) for weight in run.constraint.parameters))

    run = bench.run(Each(look))
    train(run)
    assert lowest == [0.0] * 7
    assert touched[0] != touched[-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_softplus_parameters_move_at_the_reference_learning_rate(bench: Bench, precision: str) -> None:
    """In bf16 not one of them can at lr 5e-5 (spacing at -4 is 7.8e-3); masters are fp32 also under autocast."""
    bench.arm = "softplus"
    run = bench.run(rate=5e-5, steps=3, warmup_share=0.0, precision=precision)
    before = [parameter.detach().clone() for parameter in run.constraint.parameters]
    train(run)
    moved = torch.cat([(after - old).abs().flatten() for after, old in zip(run.constraint.parameters, before, strict=True)]).detach()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert float((moved > 0).double().mean()) > 0.97
    assert 2e-5 < float(moved.median()) < 1.5e-4


def test_training_learns(bench: Bench) -> None:
    train(bench.run(steps=40, validate_every=20, distillation=0.0))
    validations = bench.rows()[1]
    assert validations[-1]["validation_nll"] < bench.rows()[0][0]["loss"] - 0.2
    assert validations[-1]["validation_perplexity"] == pytest.approx(math.exp(validations[-1]["validation_nll"]))


def test_losses_that_wait_are_written_in_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FLUSH_EVERY", 2)
    train(bench.run(validate_every=100))
    steps, validations = bench.rows()
    assert [row["step"] for row in steps] == list(range(1, 8))
    assert [row["step"] for row in validations] == [7]


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: dict[int, float]) -> None:
    """In the steps of `bad` (0-based) one gradient and the loss are raised by the given number (NaN, infinity, or a spike)."""
    real = step.Stepper.gradients

    def gradients(self: step.Stepper, ids: Tensor) -> Tensor:
        found = real(self, ids)
        for number, rise in bad.items():
            if torch.equal(ids[0], torch.from_numpy(self.run.train.batch(number, self.run.spec.batch_size))[0]):
                self.parameters[0].grad[0, 0] += rise
                found = found + rise * self.run.tokens_per_step
        return found

    monkeypatch.setattr(step.Stepper, "gradients", gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """Weights and moments are those of before, it is counted, and the run goes on."""
    poisoned(monkeypatch, {3: bad})
    state, checkpoints = train(bench.run(validate_every=1, keep_last=9))
    for read in (checkpoints.model_tensors, checkpoints.optimizer_tensors):
        before, after, later = read(3), read(4), read(5)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], later[name]) for name in after)
    assert (state.skipped, state.bad_in_a_row) == (1, 0)
    rows = bench.rows()[0]
    assert [row.get("skipped") for row in rows] == [None, None, None, "not finite", None, None, None]
    assert rows[3]["loss"] is None
    assert "NaN" not in (bench.folder / "metrics.jsonl").read_text()


def test_a_run_with_skipped_steps_resumes_to_the_same_bits(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW counts updates, not steps, and the guard's memory is part of the state."""
    monkeypatch.setattr(guard, "JUDGED_FROM", 2)
    poisoned(monkeypatch, {1: math.nan, 4: 50.0})
    expected = outcome(*train(bench.run()), bench)
    again, asked = Bench(bench.splits, tmp_path / "again"), Stop()
    asked.reason = "signal SIGUSR1"
    for _ in range(6):
        with pytest.raises(StoppedInTime):
            train(again.run(asked))
    state, checkpoints = train(again.run(asked))
    assert state.skipped == 2
    assert [row.get("skipped") for row in again.rows()[0]] == [None, "not finite", None, None, "spike", None, None]
    assert_same(outcome(state, checkpoints, again), expected)


def test_too_many_bad_steps_in_a_row_end_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are skipped and forgiven, three are not; the last good state is kept."""
    poisoned(monkeypatch, {0: math.nan, 1: math.nan, 4: math.nan, 5: math.nan, 6: math.nan})
    run = bench.run(max_bad_steps=3)
    message = r"^step 7: loss nan, gradient norm nan: the last of 3 skipped steps in a row \(not.*Lower the learning rate \(now 0\.0\d+\)"
    with pytest.raises(WorkFailed, match=message):
        train(run)
    state = Checkpoints(run.state_folder, 2).newest()
    assert state is not None
    assert (state.step, state.skipped, state.bad_in_a_row) == (6, 4, 2)
    kept = Checkpoints(run.state_folder, 2).model_tensors(6)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_ruined_weights_end_the_run_at_the_validation(bench: Bench) -> None:
    """The checkpoint before the damage stays, and nothing is saved after it."""

    def ruin(count: int) -> None:
        if count == 4:
            run.model.get_output_embeddings().weight.data[0, 0] = math.nan

    run = bench.run(Each(ruin))
    with pytest.raises(WorkFailed, match=r"^step 6: the validation loss is nan \(best so far: \d"):
        train(run)
    state = Checkpoints(run.state_folder, 2).newest()
    assert state is not None
    assert state.step == 3
    assert [row["loss"] for row in bench.rows()[0]][4:] == [None, None]


def test_a_diverged_validation_names_its_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 3.9, 4.1])
    monkeypatch.setattr(step.Stepper, "mean_nll", lambda *arguments: next(losses))
    message = r"^step 3: the validation loss is 4.1 \(best so far: 3.0, at step 1\); lower the learning rate \(now 0\.03\), or raise"
    with pytest.raises(WorkFailed, match=message):
        train(bench.run(validate_every=1))
    monkeypatch.setattr(step.Stepper, "mean_nll", lambda *arguments: math.inf)
    with pytest.raises(WorkFailed, match="the validation loss is inf"):
        train(bench.run(validate_every=1))


def test_out_of_memory_says_what_to_change(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: step.Stepper, ids: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(step.Stepper, "gradients", full)
    message = r"micro-batches of 2 and 0% of.*training.micro_batch=auto.*batch_size=4.*recompute=1.0.*Tried to allocate 2.00 GiB.\)$"
    with pytest.raises(WorkFailed, match=message):
        train(bench.run())


def test_an_error_of_the_checkpoint_writer_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(values: dict[str, Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        train(bench.run())
    assert not list((bench.folder / "checkpoints").iterdir())


def test_the_split_is_chosen_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run takes the split of its first start, on whatever device it finds itself: it belongs to the sums' rounding."""
    asked = Stop()
    asked.reason = "signal SIGUSR1"
    with pytest.raises(StoppedInTime):
        train(bench.run(asked, micro_batch="auto", recompute=1.0))
    monkeypatch.setattr(memory, "CPU_TOKENS", 2 * LENGTH)
    state, _ = train(bench.run(micro_batch="auto", recompute=1.0))
    assert (state.micro_batch, state.recompute) == (4, 1.0)


def test_recomputed_blocks_change_no_bit(bench: Bench, straight: dict[str, Outcome]) -> None:
    assert_same(outcome(*train(bench.run(recompute=0.5)), bench), straight["projected"])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it itself
def test_compiled_blocks_give_the_same_losses(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without code generation, which takes longer than this test may; on a GPU tests/benchmarks/train_step.py does it."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(head, "_fused", lambda: head._rows)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    train(bench.run())
    other, asked = Bench(bench.splits, tmp_path / "compiled"), Stop()
    asked.reason = "signal SIGUSR1"
    for stop in (asked, None):
        run = other.run(stop)
        run.compiled = True
        with suppress(StoppedInTime):
            train(run)
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(tmp_path / "compiled" / "compiled")
    columns = ("loss", "cross_entropy", "divergence", "gradient_norm")
    found = [torch.tensor([[row[name] for name in columns] for row in each.rows()[0]]) for each in (bench, other)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert all(block._compiled_call_impl is None for block in blocks(run.model))


def test_a_cut_metrics_file_is_refused(bench: Bench) -> None:
    train(bench.run())
    path = bench.folder / "metrics.jsonl"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"found {size - 5} bytes, expected at least {size}; it was cut.*--discard"):
        train(bench.run())
    path.unlink()
    with pytest.raises(InputError, match=f"found 0 bytes, expected at least {size}"):
        train(bench.run())


def test_a_changed_digit_of_the_metrics_is_refused(bench: Bench) -> None:
    train(bench.run())
    path = bench.folder / "metrics.jsonl"
    whole = path.read_bytes()
    place = whole.index(b'"loss": ') + len('"loss": ')
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InputError, match=r"metrics\.jsonl: differs from its checksum in the newest checkpoint; it was damaged.*--discard"):
        train(bench.run())


def test_the_log_is_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="Out of range float"):
        log.write({"validation_nll": math.inf})
    assert log.flush(8, TrainState(), 1) == ""
    log.write({"step": 1, "validation_nll": 2.0})
    assert log.sync()[0] == len(json.dumps({"step": 1, "validation_nll": 2.0})) + 1
    log.close()
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == ([], [{"step": 1, "validation_nll": 2.0}])
