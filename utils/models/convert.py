"""From a pretrained model to a monotone start: weights, activation, re-centred biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Experiment, Monotone
from utils.data.tokens import PackedBatches, Tokens
from utils.models.certificate import certify
from utils.models.constraints import non_negative_start
from utils.models.ffn import constrained_weights, feed_forward, ffn_parameters, set_activation
from utils.models.likelihood import mean_nll
from utils.models.loading import compute_dtype, device_of, load_model, save_model
from utils.run.errors import WorkFailed


def convert(base: PreTrainedModel, spec: Monotone, calibration: Tensor) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a converted copy of `base` and a log of what was changed.

    calibration: (B, T) token ids that the means for re-centring are taken over.
    """
    model = copy.deepcopy(base)
    negative = non_negative_start(model, spec)
    if spec.activation != "keep":
        set_activation(model, spec.activation)
    log: dict[str, Any] = {"negative_share_before": negative}
    if spec.recentre:
        log["bias_shift"] = recentre(model, base, calibration)
    return model, log


@torch.no_grad()
def recentre(model: PreTrainedModel, base: PreTrainedModel, calibration: Tensor) -> dict[str, float]:
    """Shift the biases of every feed-forward map so that its mean output equals the base's on the calibration tokens.

    One pass over each model: a layer is corrected while the pass goes through it, so later layers see corrected inputs.
    Non-negative weights have a mean, and the shared shift it causes is what ruins a converted model first
    (Hoedt and Klambauer 2023). Returns the root mean square shift by map.
    """
    targets: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(linear: nn.Module, inputs: Any, output: Tensor) -> None:
            targets[name] = _mean(output)

        return hook

    def correct(name: str) -> Callable[..., Tensor]:
        def hook(linear: nn.Linear, inputs: Any, output: Tensor) -> Tensor:
            shift = (targets[name] - _mean(output)).to(output.dtype)
            linear.bias.add_(shift)
            shifts[name] = float(shift.double().square().mean().sqrt())
            return output + shift

        return hook

    for network, action in ((base, remember), (model, correct)):
        handles = [
            linear.register_forward_hook(action(f"{ffn.name}.{part}"))
            for ffn in feed_forward(network)
            for part, linear in (("in", ffn.linear_in), ("out", ffn.linear_out))
        ]
        try:
            network.base_model(calibration)
        finally:
            for handle in handles:
                handle.remove()
    return shifts


def _mean(output: Tensor) -> Tensor:
    """(B, T, n) -> (n,) mean over tokens, accumulated in fp64."""
    return output.double().mean(dim=(0, 1))


def convert_stored(
    config: Experiment, seed: int, *, base: Path, train_tokens: Path, validation_tokens: Path, target: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the model in `base` to `target`; return the application log (the reference's fields and ours) and the certificate."""
    device, spec, length = device_of(config.compute), config.monotone, config.data.sequence_length
    original = load_model(base, device)
    calibration = PackedBatches(Tokens(train_tokens), length, seed).batch(0, spec.calibration_sequences)[:, :-1]
    model, changes = convert(original, spec, torch.from_numpy(calibration).to(device))
    save_model(model, target)
    certificate = certify(load_model(target, device), spec.scope, compute_dtype(config.compute))
    if not certificate["constraint_holds"]:
        raise WorkFailed(f"{target}: the converted model has negative constrained entries; check the base model {base} for NaN")
    held_out = PackedBatches(Tokens(validation_tokens), length, seed).all_sequences()
    total, ffn = original.num_parameters(), ffn_parameters(original)
    log = {
        "model_name": config.model.name,
        "seed": seed,
        "num_parameters_before": total,
        "num_parameters_after": model.num_parameters(),
        "ffn_parameters": ffn,
        "ffn_percentage": 100 * ffn / total,
        "num_ffn_modules": len(certificate["matrices"]),
        "ffn_modules": sorted(certificate["matrices"]),
        "min_weight": certificate["minimum"],
        "max_weight": max(float(linear.weight.detach().max()) for linear in constrained_weights(model, spec.scope).values()),
        "all_weights_non_negative": certificate["constraint_holds"],
        "ffn_monotone": certificate["ffn_monotone"],
        "validation_nll_before": mean_nll(original, held_out, config.evaluate.batch_size, config.compute.precision),
        "validation_nll_after": mean_nll(model, held_out, config.evaluate.batch_size, config.compute.precision),
    }
    return log | changes, certificate
