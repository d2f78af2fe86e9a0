"""Converted models write text in plain transformers: in memory, and in a fresh process from their folders alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from configs.schema import Monotone
from tests.architectures import GATED, PLAIN, VOCABULARY, architecture
from tests.fake_stages import ROOT
from utils.models.convert import convert
from utils.models.loading import save_model

IDS = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
NEW = 12
NEEDED = {"relu": "", "clamped_gelu": "utils.models.activations", "drelu": "utils.models.gated"}
CASES = [(kind, "mlp_both", activation) for kind in PLAIN for activation in ("relu", "clamped_gelu")]
CASES += [(kind, "gated_all", activation) for kind in GATED for activation in ("relu", "drelu")]
FRESH = """
import importlib, json, os, sys
import torch, transformers.generation
from transformers import AutoModelForCausalLM
ids, asked, new = json.loads(sys.argv[1])
AutoModelForCausalLM.from_pretrained(asked[0][1][0])  # plain transformers know it: what loading needs is imported once, not in every fork
for needed, folders in asked:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    if needed:
        importlib.import_module(needed)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        made = model.generate(torch.tensor(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        print(json.dumps(made.tolist()), flush=True)
    break
"""


def converted(kind: str, scope: str, activation: str) -> PreTrainedModel:
    spec = {"scope": scope, "activation": activation, "recentre": scope == "mlp_both"}
    return convert(architecture(kind, seed=(*PLAIN, *GATED).index(kind)), Monotone.model_validate(spec), IDS)[0]


@torch.no_grad()
def greedy(model: PreTrainedModel) -> list[list[int]]:
    """The likeliest token again and again, the whole text read anew each time; end-of-text (0) is not allowed."""
    ids = IDS
    for _ in range(NEW):
        ids = torch.cat([ids, 1 + model(ids, use_cache=False).logits[:, -1, 1:].argmax(dim=-1, keepdim=True)], dim=1)
    return ids.tolist()


def test_a_stored_model_goes_on_as_the_one_in_memory(tmp_path: Path) -> None:
    """For every architecture that has an adapter; with the one import that the manual names for the activation, and none for ReLU.

    The fresh process forks for each activation, so that none of them sees the import of another.
    """
    expected: list[list[list[int]]] = []
    asked = []
    for activation, needed in NEEDED.items():
        models = {kind: converted(kind, scope, named) for kind, scope, named in CASES if named == activation}
        rows = [greedy(model) for model in models.values()]
        assert len({str(each) for each in rows}) == len(models)  # none of them says the same
        for (kind, model), said in zip(models.items(), rows, strict=True):
            made = model.generate(IDS, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0, use_cache=True)
            assert made.tolist() == said, (activation, kind)
            save_model(model, tmp_path / activation / kind)
        expected += rows
        asked.append([needed, [str(tmp_path / activation / kind) for kind in models]])
    assert sum(len(folders) for _, folders in asked) == len(CASES)
    command = [sys.executable, "-c", FRESH, json.dumps([IDS.tolist(), asked, NEW])]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    assert [json.loads(line) for line in printed] == expected
