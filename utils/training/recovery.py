"""Recovery training of one arm. Both arms call this function; they differ in their start and in the constraint alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from configs.schema import Compute, Experiment, Monotone
from utils.data.tokens import PackedBatches, Tokens
from utils.models.blocks import compiles
from utils.models.certificate import certify, outside
from utils.models.constraints import Constraint
from utils.models.falsify import falsify
from utils.models.loading import as_teacher, compute_dtype, device_of, load_model, save_model
from utils.models.orders import Order, all_plus
from utils.run.artifacts import write_json
from utils.run.environment import number
from utils.run.errors import InputError, WorkFailed
from utils.run.launch import launch
from utils.run.preemption import Stop
from utils.training.checkpoint import Checkpoints, TrainState
from utils.training.distributed import ALONE, World
from utils.training.loop import train
from utils.training.metrics import read_metrics
from utils.training.run import Run

ON_CPU = Compute(device="cpu")  # for the process that keeps the books after others have trained


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
    if config.compute.parallel == "none":
        run = prepared(config, seed, learning_rate, constraint, files, stop, label)
        state, checkpoints = train(run)
    else:
        _train_together(config, seed, learning_rate, constraint, files, stop, label)
        alone = config.model_copy(update={"compute": ON_CPU, "training": config.training.model_copy(update={"distillation": 0.0})})
        run = prepared(alone, seed, learning_rate, constraint, files, stop, label)
        state, checkpoints = _result(run)
    save_model(run.model, files.last)
    if state.best_step != run.spec.steps:
        run.model.load_state_dict(checkpoints.model_tensors(state.best_step))
    save_model(run.model, files.best)
    write_json(files.history, history(config, seed, learning_rate, constraint, run, state))
    if constraint and files.certificate:
        _certify(config, constraint, files, files.certificate)


def prepared(
    config: Experiment,
    seed: int,
    learning_rate: float,
    constraint: Monotone | None,
    files: Files,
    stop: Stop,
    label: str,
    world: World = ALONE,
) -> Run:
    """The run of this process, its models loaded."""
    device, spec = device_of(config.compute), config.training
    model = load_model(files.start, "cpu" if world.parallel == "fsdp2" else device)  # cut before it is put on the device
    return Run(
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
        teacher=as_teacher(load_model(files.base, device), config.compute.precision)
        if spec.distillation or (constraint and constraint.layerwise_share)
        else None,
        compiled=compiles(config.compute, device),
        world=world,
        log_to=config.telemetry.log_to,
    )


def _train_together(
    config: Experiment, seed: int, learning_rate: float, constraint: Monotone | None, files: Files, stop: Stop, label: str
) -> None:
    """Train in a process for each GPU; what they leave are the checkpoints and the metrics."""
    compute, cards = config.compute, torch.cuda.device_count()
    count = compute.processes or cards
    if count < 1:
        raise InputError(f"compute.parallel={compute.parallel}: found no GPU, expected some; ask for them, or set compute.processes")
    if cards and (compute.device == "cpu" or count > cards):
        raise InputError(
            f"compute.parallel={compute.parallel}, compute.device={compute.device}: found {count} processes and {cards} GPUs, expected a "
            "GPU for each process; choose compute.processes, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPUs"
        )
    if fault := config.training.unshared(count * number("SLURM_JOB_NUM_NODES", 1)):
        raise InputError(fault)
    spec = {
        "config": config.model_dump_json(),
        "seed": seed,
        "learning_rate": learning_rate,
        "constraint": constraint.model_dump(mode="json") if constraint else None,
        "files": {name: None if path is None else str(path.absolute()) for name, path in asdict(files).items()},
        "label": label,
    }
    path = (files.state / "processes.json").absolute()
    write_json(path, spec)
    launch("utils.training.worker", [str(path)], count, files.state, stop)


def _result(run: Run) -> tuple[TrainState, Checkpoints]:
    """What the processes have left, the last weights put into the run's model."""
    checkpoints = Checkpoints(run.state_folder, run.spec.keep_last)
    state = checkpoints.newest()
    if state is None or state.step != run.spec.steps:
        raise WorkFailed(f"{run.state_folder}: found no intact checkpoint of step {run.spec.steps} after training; run the stage again")
    run.model.load_state_dict(checkpoints.model_tensors(state.step))
    if run.constraint:
        run.constraint.resume(state.step, run.spec.steps)
    return state, checkpoints


def _certify(config: Experiment, constraint: Monotone, files: Files, path: Path) -> None:
    """Certify the stored model, as it will be loaded, and try to falsify it; a broken constraint is a failure."""
    device, order = device_of(config.compute), Order.load(files.order) if files.order else None
    model, base = load_model(files.best, device), load_model(files.base, device)
    certificate = certify(model, constraint.scope, compute_dtype(config.compute), order, base)
    if not certificate["constraint_holds"]:
        raise WorkFailed(f"{files.best}: {outside(certificate, constraint)}")
    write_json(path, certificate | {"falsifiers": falsify(model, order or all_plus(model))})


def history(
    config: Experiment, seed: int, learning_rate: float, constraint: Monotone | None, run: Run, state: TrainState
) -> dict[str, Any]:
    """The reference's training history and what it lacks: absolute nats, all starts' time, tokens."""
    steps, validations = read_metrics(run.metrics)
    bounds = [0, *(row["step"] for row in validations)]
    means = [_mean_loss(steps[low:high]) for low, high in pairwise(bounds)]
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
        "skipped_steps": state.skipped,
        "micro_batch": state.micro_batch,
        "recomputed_share_of_blocks": state.recompute,
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


def _mean_loss(rows: list[dict[str, Any]]) -> float | None:
    """Mean over the steps that were not skipped; None if all were."""
    losses = [row["loss"] for row in rows if "skipped" not in row and "layerwise_loss" not in row]
    return sum(losses) / len(losses) if losses else None
