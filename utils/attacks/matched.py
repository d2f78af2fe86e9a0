"""The baseline made as bad as the monotone model: what a worse model's robustness looks like without a constraint.

Two controls, matched on validation text to the monotone model's loss: Gaussian noise on the feed-forward weights, and an earlier point
of the training. They err in different directions, and the choice between them can decide a verdict, so both are attacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Experiment
from utils.data.tokens import PackedBatches, Tokens
from utils.models.ffn import feed_forward
from utils.models.likelihood import mean_nll
from utils.models.loading import device_of, load_model, save_model
from utils.run.artifacts import damage, inventory, left_behind, read_json, write_sealed
from utils.run.lock import locked
from utils.run.preemption import Stop

TOKENS = 131_072  # of the validation text, on which losses are matched
TOLERANCE = 1e-3  # nats per token
HALVINGS = 24
KINDS = ("noise", "earlier")
LARGEST_NOISE = 4.0  # root mean squares of a matrix

Loss = Callable[[PreTrainedModel], float]
Facts = dict[str, Any]


def with_noise(model: PreTrainedModel, loss: Loss, target: float, seed: int) -> Facts:
    """Add noise to every feed-forward matrix until `loss(model)` is `target` (nats per token), in place.

    W + s * rms(W) * e with standard normal e from `seed`, the same for every s. Returns {share_of_rms: s, nll}.
    """
    weights: list[Tensor] = [chosen.module.weight for ffn in feed_forward(model) for chosen in ffn.maps]  # type: ignore[misc]
    clean = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def at(share: float) -> float:
        random = torch.Generator(model.device).manual_seed(seed)
        for weight, before in zip(weights, clean, strict=True):
            noise = torch.randn(weight.shape, generator=random, device=weight.device)
            weight.copy_(before + share * before.square().mean().sqrt() * noise)
        return loss(model)

    share, nll = _crossing(at, target, LARGEST_NOISE)
    return {"share_of_rms": share, "nll": nll}


def before(history: Sequence[Path], loss: Loss, target: float, device: torch.device) -> tuple[PreTrainedModel, Facts] | None:
    """The latest point of a training with the loss `target`, on the straight line between two neighbours of `history` (oldest first).

    None if no two neighbours lie on both sides of it. Else the model and {between: their names, way_back: share of the older, nll}.
    """
    newer = load_model(history[-1], device)
    after = loss(newer)
    for newer_folder, older_folder in pairwise(reversed(history)):
        older = load_model(older_folder, device)
        earlier = loss(older)
        if after <= target <= earlier:
            model = load_model(newer_folder, device)
            way, nll = _crossing(lambda share, m=model, a=newer, b=older: loss(_blend(m, a, b, share)), target, 1.0)  # type: ignore[misc]
            return model, {"between": [older_folder.name, newer_folder.name], "way_back": way, "nll": nll}
        newer, after = older, earlier
    return None


@torch.no_grad()
def _blend(model: PreTrainedModel, newer: PreTrainedModel, older: PreTrainedModel, share: float) -> PreTrainedModel:
    for weight, new, old in zip(model.parameters(), newer.parameters(), older.parameters(), strict=True):
        weight.copy_(torch.lerp(new, old, share))
    return model


def _crossing(loss_at: Callable[[float], float], target: float, high: float) -> tuple[float, float]:
    """Halve [0, high] until the loss, below the target at 0 and above it at `high`, is the target; returns the place and its loss."""
    low, middle, nll = 0.0, high, float("inf")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        nll = loss_at(middle)
        if abs(nll - target) <= TOLERANCE:
            break
        low, high = (middle, high) if nll < target else (low, middle)
    return middle, nll


def matched_controls(
    config: Experiment, *, models: dict[str, Path], earlier_models: Path, validation_tokens: Path, folder: Path
) -> tuple[dict[str, Path], Facts]:
    """Make the controls `noise` and `earlier` of `models` (base, baseline, monotonic) in `folder`, unless they are there.

    Returns their folders, and {target_nll, baseline_nll, noise, earlier}: what was done for each, or why there is none.
    """
    stored = folder / "matched.json"
    with locked(folder, queue=Stop()):  # several processes may find them damaged at once
        facts = _made_before(stored)
        if facts is None:
            facts = _make(config, models, earlier_models, validation_tokens, folder)
            files = {kind: inventory(folder / kind) for kind in KINDS if isinstance(facts[kind], dict)}
            write_sealed(stored, {"facts": facts, "files": files})
    return {kind: folder / kind for kind in KINDS if isinstance(facts[kind], dict)}, facts


def _made_before(stored: Path) -> Facts | None:
    """What was done for the controls, if they are there as they were written."""
    found = left_behind(stored)
    for kind, files in (found or {}).get("files", {}).items():
        if fault := damage(stored.parent / kind, files):
            print(f"  {fault}; the controls are made again")
            return None
    return found and found.get("facts")


def _make(config: Experiment, models: dict[str, Path], earlier_models: Path, validation_tokens: Path, folder: Path) -> Facts:
    device, length = device_of(config.compute), config.data.sequence_length
    sequences = PackedBatches(Tokens(validation_tokens), length, seed=0).all_sequences()[: max(1, TOKENS // length)]

    def loss(model: PreTrainedModel) -> float:
        return mean_nll(model, sequences, config.evaluate.batch_size, config.compute.precision)

    baseline = load_model(models["baseline"], device)
    facts: Facts = {"target_nll": loss(load_model(models["monotonic"], device)), "baseline_nll": loss(baseline)}
    target = facts["target_nll"]
    if target <= facts["baseline_nll"] + TOLERANCE:
        why = "not needed: the monotone model is as good as the baseline"
        return facts | {"noise": why, "earlier": why}
    facts["noise"] = with_noise(baseline, loss, target, config.hotflip.seed)
    if abs(facts["noise"]["nll"] - target) <= TOLERANCE:
        save_model(baseline, folder / "noise")
    else:
        facts["noise"] = f"not reached: noise brings the baseline to {facts['noise']['nll']:.3f} nats/token"
    del baseline
    older = [earlier_models / name for name in read_json(earlier_models / "index.json")["oldest_first"]]
    found = before([*older, models["base"], models["baseline"]], loss, target, device)
    if found is None:
        return facts | {
            "earlier": "not reached: no earlier checkpoint is so bad; keep more (model.scratch.earlier, model.earlier_revisions)"
        }
    save_model(found[0], folder / "earlier")
    return facts | {"earlier": found[1]}
