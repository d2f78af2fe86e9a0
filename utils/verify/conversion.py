"""A small model is converted, and its certificate says what is true."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from configs.schema import Monotone
from utils.models.certificate import certify
from utils.models.constraints import Constraint
from utils.models.convert import convert
from utils.models.ffn import constrained_weights, feed_forward
from utils.models.loading import load_model, save_model
from utils.run.checks import Finding
from utils.verify.sample import VOCABULARY, sample_model

ROUNDING = 1e-5  # of sums of about 100 products of numbers near 1 in fp32


def conversion(folder: Path) -> Finding:
    """The default conversion holds its certificate, outputs really rise with inputs, and one negative weight is found and projected."""
    spec = Monotone.model_validate({})
    calibration = torch.randint(1, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    converted, _, _ = convert(sample_model(seed=0), spec, calibration)
    save_model(converted, folder)
    model = load_model(folder)
    certificate = certify(model, spec.scope, torch.float32)
    if not (certificate["constraint_holds"] and certificate["ffn_monotone"]):
        return "no", f"a converted model is not monotone: {'; '.join(certificate['reasons']) or 'its constraint does not hold'}"
    if (fall := deepest_fall(model)) > ROUNDING:
        return "no", f"a model is certified whose output falls by {fall:.3g} where its input rises"
    first = next(iter(constrained_weights(model, spec.scope).values()))
    first.weight.data[0, 0] = -0.01
    planted = certify(model, spec.scope, torch.float32)
    if planted["constraint_holds"] or planted["ffn_monotone"] or planted["negative_entries"] != 1:
        said = "denies it" if not planted["constraint_holds"] else "says that all is well"
        return "no", f"one planted negative weight: the certificate counts {planted['negative_entries']} and {said}"
    Constraint(model, spec).project()
    if not certify(model, spec.scope, torch.float32)["constraint_holds"]:
        return "no", "the projection leaves a negative weight negative"
    return "ok", f"certificate over {certificate['entries']} weights holds; a planted negative one is found and projected"


@torch.no_grad()
def deepest_fall(model: PreTrainedModel) -> float:
    """Largest fall of a coordinate of a feed-forward sublayer's output over 256 random pairs x <= x'."""
    random = torch.Generator().manual_seed(1)
    falls = []
    for ffn in feed_forward(model):
        low = torch.randn(256, ffn.width, generator=random)
        high = low + torch.rand(low.shape, generator=random)
        falls.append(float((ffn(low) - ffn(high)).max()))
    return max(falls)
