"""The base model: fetched, or pretrained here on the training split, once for all runs that want the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.schema import Experiment, Model, Scratch, Training
from utils.data.published import published_identity
from utils.data.tokens import PackedBatches, Tokens
from utils.models.blocks import compiles
from utils.models.loading import device_of, fetch_pretrained, save_model, scratch_model
from utils.run.artifacts import link_or_copy, read_json, remove, value_digest, write_json
from utils.run.cache import cached
from utils.run.errors import InputError
from utils.run.preemption import Stop
from utils.training.loop import milestone_fault, train
from utils.training.run import Run

VERSION = 3  # raise it when a change of the training code changes the base model
READ = ("tokenizer/", "tokens/train/", "tokens/validation/")  # the part of the token cache that pretraining sees


def base_cache(config: Experiment, root: Path, tokens: Path, stop: Stop) -> Path:
    """Folder with the base model in fp32 (model/), its earlier checkpoints (earlier/) and where it is from (origin.json), built if it
    is not there."""
    shape = config.model.scratch
    description: dict[str, Any] = {"version": VERSION}
    if shape:
        text = {name: facts for name, facts in read_json(tokens.parent / "manifest.json")["files"].items() if name.startswith(READ)}
        description |= {"shape": shape.model_dump(mode="json"), "training": _spec(shape).model_dump(mode="json")}
        description |= {"text": value_digest(text), "precision": config.compute.precision}
    else:
        description |= published_identity(config.model)
        description |= {"earlier": [published_identity(earlier) for earlier in _earlier(config.model)]}

    def build(target: Path, state: Path) -> None:
        if shape:
            pretrain(config, shape, tokens, target, state, stop)
        else:
            model, commit = fetch_pretrained(config.model, root, stop)
            _refuse_unknown_ids(config.model, model.config.vocab_size, tokens / "tokens")
            save_model(model, target / "model")
            commits = {}
            for number, earlier in enumerate(_earlier(config.model)):
                model, commits[earlier.revision] = fetch_pretrained(earlier, root, stop)
                save_model(model, target / "earlier" / f"{number:03d}_{earlier.revision.replace('/', '_')}")
            write_json(target / "origin.json", {"name": config.model.name, "commit": commit, "earlier_commits": commits})
        kept = sorted(path.parent.name for path in target.glob("earlier/*/config.json"))
        write_json(target / "earlier" / "index.json", {"oldest_first": kept})

    return cached(root, "base", description, build, stop)


def _refuse_unknown_ids(model: Model, rows: int, tokens: Path) -> None:
    """A tokenizer may have got entries, an end-of-text say, that the model has no embedding for."""
    splits = [Tokens(folder) for folder in sorted(tokens.iterdir())]
    largest = max(max(int(split.ids.max()), split.end_of_text) for split in splits)
    if largest >= rows:
        raise InputError(
            f"model.name={model.name!r}: its tokenizer gives the id {largest}, expected ids below {rows}, the model's number of "
            "embeddings; name a model with its own tokenizer"
        )


def _earlier(model: Model) -> list[Model]:
    """The published model at each of its earlier revisions."""
    if model.earlier_revisions and Path(model.name).is_dir():
        raise InputError(f"model.earlier_revisions: model.name={model.name!r} is a folder, which has no revisions; expected none")
    return [model.model_copy(update={"revision": revision}) for revision in model.earlier_revisions]


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
        milestones={step: state / "earlier" / f"step_{step:08d}" for step in shape.earlier},
    )
    final, _ = train(run)
    if fault := next(filter(None, map(milestone_fault, run.milestones.values())), None):
        print(f"  {fault}; the base model is pretrained again")
        remove(state)
        pretrain(config, shape, tokens, target, state, stop)
        return
    save_model(model, target / "model")
    for folder in run.milestones.values():
        link_or_copy(folder / "model", target / "earlier" / folder.name)
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
