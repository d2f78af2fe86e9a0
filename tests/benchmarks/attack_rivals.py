"""What the attack engine is measured against: nanoGCG behind a pipe, and ports of two published loops.

The ports are written from the descriptions of the algorithms; each does the work of the original, no more and no less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel


class NanoGCG:
    """nanoGCG 0.3 in its own process, with the packages of a folder of wheels, on the same weights in half precision."""

    def __init__(self, wheels: Path, folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, task: dict[str, Any]) -> None:
        self.format = "fp16" if model.device.type == "cuda" else "bf16"  # fp16 products are slow on CPUs
        packages = folder / "packages"
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
        config = model.config
        shape = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "hidden_act": config.hidden_act,
            "rotary_pct": config.rope_parameters["partial_rotary_factor"],
            "rotary_emb_base": config.rope_parameters["rope_theta"],
            "use_parallel_residual": config.use_parallel_residual,
            "layer_norm_eps": config.layer_norm_eps,
        }
        (folder / "shape.json").write_text(json.dumps(shape))
        (folder / "task.json").write_text(json.dumps(task))
        tokenizer.save(str(folder / "tokenizer.json"))
        weights = {
            name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items() if tensor.is_floating_point()
        }
        save_file(weights, str(folder / "weights.safetensors"))
        path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_OFFLINE": "1", "USE_TF": "0", "USE_FLAX": "0"}
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true", **quiet}
        program = Path(__file__).with_name("nanogcg_process.py")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.versions = self._answer()

    def __call__(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"nanoGCG's process ended with code {self.process.wait()}; its message is above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def one_at_a_time(model: PreTrainedModel, ids: Tensor, place: int, candidates: Tensor, scored: int) -> list[float]:
    """The GPT-2 loop of Wallace et al. 2019 at one position: a forward pass for each candidate over all texts, with all logits, the
    trigger's labels ignored and the loss read by the host to compare it with the best so far. ids (M, T), candidates (K,)."""
    labels = ids.clone()
    labels[:, : ids.shape[1] - scored] = -100
    losses: list[float] = []
    with torch.no_grad():
        for candidate in candidates:
            tried = ids.clone()
            tried[:, place] = candidate
            logits = model(tried, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
            losses.append(loss.item())
    return losses


def one_shot(model: PreTrainedModel, ids: Tensor, flips: int) -> Tensor:
    """The one-shot flips of the public monotone study on one text (1, T): one backward pass, which also fills the weights' gradients,
    the `flips` places with the longest gradient, at each the token with the largest product, then both texts scored whole."""
    embed = model.get_input_embeddings()
    embedded = embed(ids).detach().requires_grad_(True)
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    slope = embedded.grad[0]  # type: ignore[index]
    flipped = ids.clone()
    for place in slope.norm(dim=1).topk(flips).indices:
        flipped[0, place.item()] = torch.matmul(embed.weight, slope[place]).argmax().item()
    with torch.no_grad():
        for text in (ids, flipped):
            model(text, labels=text, use_cache=False).loss.item()
    return flipped
