"""The gated sublayer that is truly monotone, and its way through a plain folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.schema import Monotone
from tests.architectures import GATED, VOCABULARY, architecture
from tests.fake_stages import ROOT
from utils.models.certificate import certify
from utils.models.convert import convert
from utils.models.falsify import falsify
from utils.models.ffn import feed_forward, set_activation
from utils.models.gated import Rectified
from utils.models.loading import load_model, save_model

IDS = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
SPEC = {"scope": "gated_all", "activation": "drelu", "recentre": False}


@pytest.mark.parametrize("kind", GATED)
def test_a_rectified_model_computes_drelu_and_keeps_its_weights(kind: str) -> None:
    model, plain = architecture(kind), architecture(kind)
    set_activation(model, "drelu")
    assert model.config.model_type == f"rectified_{kind}"
    assert set(model.state_dict()) == set(plain.state_dict())
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    for ffn in feed_forward(model):
        gate, up, down = (chosen.weight for chosen in ffn.maps)
        assert torch.allclose(ffn(x), ((x @ gate.T).clamp(min=0) * (x @ up.T).clamp(min=0)) @ down.T, atol=1e-5)


@pytest.mark.parametrize("order", ["all_plus", "unit_signs", "balanced", "directions"])
def test_only_drelu_with_all_three_matrices_is_certified(order: str) -> None:
    settings = SPEC | {"order": order, "norm_gain": "fold"} | ({"directions": 5} if order == "directions" else {})
    base = architecture("llama")
    model, chosen, _ = convert(base, Monotone.model_validate(settings), IDS)
    certificate = certify(model, "gated_all", torch.float32, chosen, base)
    assert certificate["ffn_monotone"] and certificate["monotone_before_gain"] and certificate["vacuous"] is False
    found = falsify(model, chosen)
    for kind in ("derivative", "pairs_anywhere", "pairs_behind_norm"):
        assert found[kind]["violated"] == 0 < found[kind]["tried"]
    for change, reason in [
        ({"activation": "keep"}, "the activation SiLU"),
        ({"activation": "relu"}, "the map beside the gate may give negative numbers"),
        ({"activation": "clamped_gelu"}, "the gate ClampedGELU may be negative"),
        ({"scope": "gated_updown"}, "the map into the gate of the hidden layer has negative entries"),
    ]:
        spec = Monotone.model_validate(settings | change)
        weaker, its_order, _ = convert(base, spec, IDS)
        denied = certify(weaker, spec.scope, torch.float32, its_order)
        assert denied["constraint_holds"] and not denied["ffn_monotone"]
        assert any(found.startswith(reason) for found in denied["reasons"])
        assert falsify(weaker, its_order)["pairs_anywhere"]["violated"] > 0


def test_a_stored_model_loads_by_name_in_plain_transformers(tmp_path: Path) -> None:
    """With one documented import and no trust_remote_code; without the import it is refused, not run wrongly."""
    model, _, _ = convert(architecture("mistral"), Monotone.model_validate(SPEC), IDS)
    save_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert isinstance(feed_forward(loaded)[0].into[1].module, Rectified)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(load_model(tmp_path / "model")(IDS).logits, model(IDS).logits)
    assert loaded.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (4, 14)
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path / 'model')!r})"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1 and "rectified_mistral" in refused.stderr
