"""The training loop, one for both arms and for the base model's pretraining: equal code, equal data, equal budget."""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Training
from utils.data.tokens import PackedBatches
from utils.models.constraints import Constraint
from utils.models.likelihood import cross_entropy_sum, mean_nll
from utils.models.loading import autocast
from utils.run.errors import InputError, StoppedInTime, WorkFailed
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Row, json_line, read_rows
from utils.training import optim
from utils.training.checkpoint import Checkpoints, TrainState
from utils.training.losses import divergence_sum, mixed
from utils.training.schedule import learning_rate

FLUSH_EVERY = 25  # steps whose losses wait on the device, so that no step waits for the host


@dataclass
class Run:
    """One training run: what is trained, on what, how, and where its files are."""

    model: PreTrainedModel
    spec: Training
    peak_rate: float
    train: PackedBatches
    validation: PackedBatches
    precision: str
    state_folder: Path
    metrics: Path
    stop: Stop
    label: str
    constraint: Constraint | None = None
    teacher: PreTrainedModel | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokens_per_step(self) -> int:
        return self.spec.batch_size * self.train.length


def train(run: Run) -> tuple[TrainState, Checkpoints]:
    """Train to `run.spec.steps`, from the newest intact checkpoint if there is one.

    Returns the final state and the checkpoints, among them the last and the best (lowest validation loss in nats per token).
    Raises StoppedInTime after saving if asked to stop, WorkFailed if the loss is no longer finite. On a CPU a run that was
    interrupted any number of times equals an uninterrupted one bit for bit: weights, optimiser state and metrics.
    """
    run.model.eval()  # no dropout: the step must be a function of its tokens alone
    optimizer = optim.build(run.model, run.constraint.parameters if run.constraint else [], run.spec)
    checkpoints = Checkpoints(run.state_folder, run.spec.keep_last)
    state = _resume(run, optimizer, checkpoints)
    with closing(MetricsLog(run.metrics, state.metrics_bytes)) as log:
        _train_on(run, optimizer, checkpoints, state, log)
    return state, checkpoints


def _train_on(run: Run, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints, state: TrainState, log: MetricsLog) -> None:
    """Steps from `state.step` to the last one. Each validation is followed by a checkpoint, and so is a request to stop."""
    progress = Progress(run.label, run.spec.steps, state.step, tokens_per_unit=run.tokens_per_step)
    began, earlier = time.monotonic(), state.seconds
    while state.step < run.spec.steps:
        rate = learning_rate(
            state.step,
            steps=run.spec.steps,
            peak=run.peak_rate,
            warmup_share=run.spec.warmup_share,
            final_share=run.spec.final_share,
        )
        note = ""
        log.add(state.step, rate, _step(run, optimizer, state.step, rate))
        state.step += 1
        last = state.step == run.spec.steps
        validating = last or state.step % run.spec.validate_every == 0
        stopping = run.stop.requested()  # asked once a step: the flag may rise between two looks at it
        if validating or stopping or len(log.waiting) >= FLUSH_EVERY:
            note = log.flush(run.tokens_per_step)
        if validating:
            note = _validated(run, state, log)
        if validating or stopping:
            state.seconds = earlier + time.monotonic() - began
            state.metrics_bytes = log.sync()
            checkpoints.save(state, run.model.state_dict(), optim.state_tensors(optimizer, run.model))
        progress.advance(1, note)
        if stopping and not last:
            raise StoppedInTime(f"{run.stop.reason}, step {state.step} of {run.spec.steps}")
    progress.close()


def _resume(run: Run, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints) -> TrainState:
    state = checkpoints.newest()
    if state is None:
        return TrainState()
    run.model.load_state_dict(checkpoints.model_tensors(state.step))
    if run.constraint:
        run.constraint.resume(state.step, run.spec.steps)
    optim.restore(optimizer, run.model, checkpoints.optimizer_tensors(state.step), state.step)
    state.resumed_at.append(state.step)
    print(f"  going on from step {state.step} of {run.spec.steps}")
    return state


def _step(run: Run, optimizer: torch.optim.Optimizer, step: int, rate: float) -> Tensor:
    """One optimiser step; returns (4,) on the device: loss, cross-entropy, divergence (nats per token), gradient norm."""
    ids = torch.from_numpy(run.train.batch(step, run.spec.batch_size)).to(run.device, non_blocking=True)
    tokens = run.tokens_per_step
    sums = torch.zeros(3, device=run.device)
    for part in ids.split(run.spec.micro_batch):
        loss, cross_entropy, divergence = _losses(run, part)
        (loss / tokens).backward()
        sums += torch.stack([loss, cross_entropy, divergence]).detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.spec.max_gradient_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if run.constraint:
        run.constraint.project(step, run.spec.steps)
    return torch.cat([sums / tokens, norm.reshape(1)])


def _losses(run: Run, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids (b, T + 1) -> mixed loss, cross-entropy and divergence, each in nats summed over b*T tokens."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with autocast(run.device, run.precision):
        logits = run.model(inputs, use_cache=False).logits
    cross_entropy = cross_entropy_sum(logits, targets)
    if run.teacher is None or not run.spec.distillation:
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
    with torch.no_grad(), autocast(run.device, run.precision):
        teacher_logits = run.teacher(inputs, use_cache=False).logits
    divergence = divergence_sum(logits, teacher_logits)
    return mixed(cross_entropy, divergence, run.spec.distillation), cross_entropy, divergence


def _validated(run: Run, state: TrainState, log: MetricsLog) -> str:
    nll = mean_nll(run.model, run.validation.all_sequences(), run.spec.micro_batch, run.precision)
    if not math.isfinite(nll):
        raise WorkFailed(
            f"step {state.step}: the validation loss is {nll}; lower the learning rate (now {run.peak_rate:g}) and run with --discard"
        )
    arrived = run.constraint is None or run.constraint.complete  # an annealed bound on its way is no constraint yet
    if arrived and (state.best_nll is None or nll < state.best_nll):
        state.best_nll, state.best_step = nll, state.step
    log.write({"step": state.step, "validation_nll": nll, "validation_perplexity": math.exp(min(nll, 700.0))})
    return f"validation {nll:.4f} nats/token"


class MetricsLog:
    """metrics.jsonl: one row a step and one a validation, without clock times, so that resumed and straight runs agree."""

    def __init__(self, path: Path, size: int) -> None:
        self.waiting: list[tuple[int, float, Tensor]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise InputError(f"{path}: found {found} bytes, expected at least {size}; it was cut, start the stage again with --discard")
        self.handle = path.open("ab")
        self.handle.truncate(size)

    def add(self, step: int, rate: float, values: Tensor) -> None:
        self.waiting.append((step, rate, values))

    def flush(self, tokens_per_step: int) -> str:
        """Write the waiting steps. Raises WorkFailed at the first loss that is not finite."""
        if not self.waiting:
            return ""
        table = torch.stack([values for _, _, values in self.waiting]).tolist()
        for (step, rate, _), (loss, cross_entropy, divergence, norm) in zip(self.waiting, table, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise WorkFailed(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}; lower the learning rate (now {rate:g}) and run with --discard"
                )
            self.write(
                {
                    "step": step + 1,
                    "tokens": (step + 1) * tokens_per_step,
                    "loss": loss,
                    "cross_entropy": cross_entropy,
                    "divergence": divergence,
                    "learning_rate": rate,
                    "gradient_norm": norm,
                }
            )
        self.waiting.clear()
        return f"loss {loss:.4f}"

    def write(self, row: Row) -> None:
        self.handle.write(json_line(row).encode())

    def close(self) -> None:
        self.handle.close()

    def sync(self) -> int:
        """Bring the file to the disk; returns its size in bytes."""
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return os.fstat(self.handle.fileno()).st_size


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """(rows of steps, rows of validations)."""
    rows = read_rows(path)
    return [row for row in rows if "validation_nll" not in row], [row for row in rows if "validation_nll" in row]
