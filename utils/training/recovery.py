"""Recovery training of one arm. Both arms call this function; they differ in their start and in the constraint alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.schema import Experiment, Monotone
from utils.data.tokens import PackedBatches, Tokens
from utils.models.certificate import certify
from utils.models.constraints import Constraint
from utils.models.falsify import falsify
from utils.models.loading import compute_dtype, device_of, load_model, save_model
from utils.models.orders import Order, all_plus
from utils.run.artifacts import write_json
from utils.run.errors import WorkFailed
from utils.run.preemption import Stop
from utils.training.checkpoint import TrainState
from utils.training.loop import Run, read_metrics, train


@dataclass(frozen=True)
class Files:
    """Inputs and outputs of a recovery run."""

    start: Path
    base: Path
    train_tokens: Path
    validation_tokens: Path
    state: Path
    best: Path
    last: Path
    metrics: Path
    history: Path
    certificate: Path | None = None
    order: Path | None = None


def recover(config: Experiment, seed: int, learning_rate: float, constraint: Monotone | None, files: Files, stop: Stop, label: str) -> None:
    """Train from `files.start`, distilling from `files.base` if configured; write best and last model, metrics and history."""
    device, spec = device_of(config.compute), config.training
    model = load_model(files.start, device)
    run = Run(
        model=model,
        spec=spec,
        peak_rate=learning_rate,
        train=PackedBatches(Tokens(files.train_tokens), config.data.sequence_length, seed),
        validation=PackedBatches(Tokens(files.validation_tokens), config.data.sequence_length, seed),
        precision=config.compute.precision,
        state_folder=files.state / "checkpoints",
        metrics=files.metrics,
        stop=stop,
        label=label,
        constraint=Constraint(model, constraint, Order.load(files.order) if files.order else None) if constraint else None,
        teacher=load_model(files.base, device).requires_grad_(False) if spec.distillation else None,
    )
    state, checkpoints = train(run)
    save_model(model, files.last)
    if state.best_step != spec.steps:
        model.load_state_dict(checkpoints.model_tensors(state.best_step))
    save_model(model, files.best)
    write_json(files.history, history(config, seed, learning_rate, constraint, run, state))
    if constraint and files.certificate:
        _certify(config, constraint, files, files.certificate)


def _certify(config: Experiment, constraint: Monotone, files: Files, path: Path) -> None:
    """Certify the stored model, as it will be loaded, and try to falsify it; a broken constraint is a failure."""
    device, order = device_of(config.compute), Order.load(files.order) if files.order else None
    model, base = load_model(files.best, device), load_model(files.base, device)
    certificate = certify(model, constraint.scope, compute_dtype(config.compute), order, base)
    if not certificate["constraint_holds"]:
        cure = (
            f"raise monotone.margin (now {constraint.margin:g})"
            if constraint.margin
            else "this is a fault of the program, please report it"
        )
        raise WorkFailed(
            f"{files.best}: {certificate['negative_entries']} constrained entries are negative (minimum {certificate['minimum']:.3g}), "
            f"expected none after training; {cure}"
        )
    write_json(path, certificate | {"falsifiers": falsify(model, order or all_plus(model))})


def history(
    config: Experiment, seed: int, learning_rate: float, constraint: Monotone | None, run: Run, state: TrainState
) -> dict[str, Any]:
    """The reference's training history and what it lacks: absolute nats, all starts' time, tokens."""
    steps, validations = read_metrics(run.metrics)
    bounds = [0, *(row["step"] for row in validations)]
    means = [sum(row["loss"] for row in steps[low:high]) / (high - low) for low, high in pairwise(bounds)]
    best = next(row for row in validations if row["step"] == state.best_step)
    spec = config.training
    written: dict[str, Any] = {
        "train_losses": means,
        "val_perplexities": [row["validation_perplexity"] for row in validations],
        "val_nll": [row["validation_nll"] for row in validations],
        "validation_steps": bounds[1:],
        "best_val_perplexity": best["validation_perplexity"],
        "best_val_nll": best["validation_nll"],
        "best_step": state.best_step,
        "training_time_seconds": state.seconds,
        "training_time_hours": state.seconds / 3600,
        "resumed_at_steps": state.resumed_at,
        "num_epochs": spec.steps * spec.batch_size / run.train.count,
        "training_samples": spec.steps * spec.batch_size,
        "training_tokens": spec.steps * run.tokens_per_step,
        "tokens_per_second": spec.steps * run.tokens_per_step / state.seconds,
        "hyperparameters": {"learning_rate": learning_rate, "warmup_ratio": spec.warmup_share, "max_grad_norm": spec.max_gradient_norm}
        | spec.model_dump(mode="json"),
        "seed": seed,
    }
    if constraint:
        formula = Constraint.formulas[constraint.parametrisation]
        written["constraint_info"] = {"type": constraint.parametrisation, "formula": formula, "scope": constraint.scope} | {
            "order": constraint.order,
            "activation": constraint.activation,
            "globally_monotonic": False,
        }
    return written
