"""From a pretrained model to a monotone start: order, weights, activation, re-centred biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from configs.schema import Experiment, Monotone
from utils.data.tokens import PackedBatches, Tokens
from utils.models.certificate import certify, outside
from utils.models.falsify import falsify
from utils.models.ffn import check_finite, check_fits, constrained_weights, feed_forward, ffn_parameters, set_activation
from utils.models.gated import Rectified
from utils.models.lift import fold_gain
from utils.models.likelihood import mean_nll
from utils.models.loading import compute_dtype, device_of, load_model, save_model
from utils.models.orders import Order, choose_order
from utils.models.starts import input_covariance, start_within
from utils.run.errors import WorkFailed
from utils.run.progress import Progress


def convert(base: PreTrainedModel, spec: Monotone, calibration: Tensor) -> tuple[PreTrainedModel, Order, dict[str, Any]]:
    """Return a converted copy of `base`, the order that it is monotone in, and a log of what was changed.

    calibration: (B, T) token ids that means, least squares and directions are taken over. With start=base the copy has the base's
    function; its constraint arrives in training. Raises InputError if the configuration does not fit the model.
    """
    check_fits(base, spec)
    check_finite(base)
    model = copy.deepcopy(base)
    prepare_gains(model, spec)
    covariance = input_covariance(model, calibration) if spec.order == "directions" else None
    order, kept = choose_order(model, spec, covariance)
    named = {"drelu": "relu", "keep": None}.get(spec.activation, spec.activation)
    outside = start_within(model, spec, order, calibration, ACT2FN[named] if named else None)
    log: dict[str, Any] = {"negative_share_before": outside, "kept_energy": kept}
    if spec.start != "base":
        if spec.activation != "keep":
            set_activation(model, spec.activation)
        if spec.recentre:
            log["bias_shift"] = recentre(model, base, calibration)
    return model, order, log


@torch.no_grad()
def prepare_gains(model: PreTrainedModel, spec: Monotone) -> None:
    """Fold the norms' gains into the maps behind them, or make them non-negative (a coordinate with a negative gain is turned round)."""
    for ffn in feed_forward(model):
        if spec.norm_gain == "fold":
            fold_gain(ffn)
        elif spec.norm_gain == "positive":
            turn = torch.where(ffn.gain() < 0, -1.0, 1.0).to(ffn.out.weight.dtype)
            for chosen in ffn.into:
                chosen.weight.mul_(turn)
            if ffn.gain_parameter is not None:
                ffn.gain_parameter.copy_(turn * ffn.gain() - ffn.gain_offset)
            if ffn.shift_parameter is not None:
                ffn.shift_parameter.mul_(turn)


@torch.no_grad()
def recentre(model: PreTrainedModel, base: PreTrainedModel, calibration: Tensor) -> dict[str, float]:
    """Shift the biases of every feed-forward map so that its mean output equals the base's on the calibration tokens; of a rectified map
    the mean in front of the relu.

    One pass over each model: a layer is corrected while the pass goes through it, so later layers see corrected inputs.
    Non-negative weights have a mean, and the shared shift it causes is what ruins a converted model first
    (Hoedt and Klambauer 2023). Returns the root mean square shift by map.
    """
    targets: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            targets[name] = _mean(_before_relu(module, inputs, output))

        return hook

    def correct(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            before = _before_relu(module, inputs, output)
            shift = (targets[name] - _mean(before)).to(output.dtype)
            module.bias.add_(shift)  # type: ignore[operator]
            shifts[name] = float(shift.double().square().mean().sqrt())
            return (before + shift).relu() if isinstance(module, Rectified) else before + shift

        return hook

    for network, action in ((base, remember), (model, correct)):
        handles = [chosen.module.register_forward_hook(action(chosen.name)) for ffn in feed_forward(network) for chosen in ffn.maps]
        try:
            network.base_model(calibration)
        finally:
            for handle in handles:
                handle.remove()
    return shifts


def _before_relu(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """(..., n) what a map gives, if it is rectified in front of its relu."""
    return nn.Linear.forward(module, *inputs) if isinstance(module, Rectified) else output


def _mean(output: Tensor) -> Tensor:
    """(..., n) -> (n,) mean over tokens, accumulated in fp64."""
    return output.double().flatten(0, -2).mean(dim=0)


def convert_stored(
    config: Experiment, seed: int, *, base: Path, train_tokens: Path, validation_tokens: Path, target: Path, order_file: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the model in `base` to `target` and `order_file`; return the application log (the reference's fields and ours) and the
    certificate, with the falsifiers' counts under `falsifiers`."""
    device, spec, length = device_of(config.compute), config.monotone, config.data.sequence_length
    progress = Progress("make monotone", 4)
    original = load_model(base, device)
    calibration = PackedBatches(Tokens(train_tokens), length, seed).batch(0, spec.calibration_sequences)[:, :-1]
    model, order, changes = convert(original, spec, torch.from_numpy(calibration).to(device))
    save_model(model, target)
    order.save(order_file)
    progress.advance(note="weights converted")
    stored = load_model(target, device)
    certificate = certify(stored, spec.scope, compute_dtype(config.compute), order, original)
    if not certificate["constraint_holds"] and spec.start != "base":
        raise WorkFailed(f"{target}: {outside(certificate, spec)}")
    progress.advance(note="certificate made")
    certificate["falsifiers"] = falsify(stored, order)
    progress.advance(note="falsifiers tried")
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
        "min_weight": min(float(chosen.weight.detach().min()) for chosen in constrained_weights(model, spec.scope).values()),
        "max_weight": max(float(chosen.weight.detach().max()) for chosen in constrained_weights(model, spec.scope).values()),
        "all_weights_non_negative": spec.order == "all_plus" and certificate["constraint_holds"],
        "constraint_holds": certificate["constraint_holds"],
        "ffn_monotone": certificate["ffn_monotone"],
        "validation_nll_before": mean_nll(original, held_out, config.evaluate.batch_size, config.compute.precision),
        "validation_nll_after": mean_nll(model, held_out, config.evaluate.batch_size, config.compute.precision),
    }
    progress.advance(note="losses measured")
    progress.close()
    return log | changes, certificate
