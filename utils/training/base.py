"""The base model: fetched, or pretrained here on the training split, once for all runs that want the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.schema import Experiment, Scratch, Training
from utils.data.tokenizer import published_identity
from utils.data.tokens import PackedBatches, Tokens
from utils.models.blocks import compiles
from utils.models.loading import device_of, fetch_pretrained, save_model, scratch_model
from utils.run.artifacts import read_json, value_digest, write_json
from utils.run.cache import cached
from utils.run.preemption import Stop
from utils.training.loop import train
from utils.training.run import Run

VERSION = 2  # raise it when a change of the training code changes the base model
READ = ("tokenizer/", "tokens/train/", "tokens/validation/")  # the part of the token cache that pretraining sees


def base_cache(config: Experiment, root: Path, tokens: Path, stop: Stop) -> Path:
    """Folder with the base model in fp32 (model/) and where it is from (origin.json), built if it is not there."""
    shape = config.model.scratch
    description: dict[str, Any] = {"version": VERSION}
    if shape:
        text = {name: facts for name, facts in read_json(tokens.parent / "manifest.json")["files"].items() if name.startswith(READ)}
        description |= {"shape": shape.model_dump(mode="json"), "training": _spec(shape).model_dump(mode="json")}
        description |= {"text": value_digest(text), "precision": config.compute.precision}
    else:
        description |= published_identity(config.model)

    def build(target: Path, state: Path) -> None:
        if shape:
            pretrain(config, shape, tokens, target, state, stop)
        else:
            model, commit = fetch_pretrained(config.model, root, stop)
            save_model(model, target / "model")
            write_json(target / "origin.json", {"name": config.model.name, "commit": commit})

    return cached(root, "base", description, build, stop)


def _spec(shape: Scratch) -> Training:
    return Training(
        steps=shape.steps,
        batch_size=shape.batch_size,
        distillation=0.0,
        validate_every=max(1, shape.steps // 5),
        keep_last=1,
    )


def pretrain(config: Experiment, shape: Scratch, tokens: Path, target: Path, state: Path, stop: Stop) -> None:
    """Train a GPT-NeoX model from random weights with the loop that both arms use."""
    spec = _spec(shape)
    train_tokens = Tokens(tokens / "tokens" / "train")
    device = device_of(config.compute)
    model = scratch_model(shape, train_tokens.end_of_text).to(device)
    run = Run(
        model=model,
        spec=spec,
        peak_rate=shape.learning_rate,
        train=PackedBatches(train_tokens, shape.sequence_length, shape.seed),
        validation=PackedBatches(Tokens(tokens / "tokens" / "validation"), shape.sequence_length, shape.seed),
        precision=config.compute.precision,
        state_folder=state / "checkpoints",
        metrics=state / "metrics.jsonl",
        stop=stop,
        label="pretrain the base model",
        compiled=compiles(config.compute, device),
    )
    final, _ = train(run)
    save_model(model, target / "model")
    write_json(
        target / "origin.json",
        {
            "name": config.model.name,
            "commit": "pretrained at setup",
            "steps": spec.steps,
            "tokens": spec.steps * run.tokens_per_step,
            "passes_over_text": spec.steps * spec.batch_size / run.train.count,
            "validation_nll": final.best_nll,
        },
    )
