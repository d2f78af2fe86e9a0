"""nanoGCG in a process of its own, for it needs transformers <= 4.47.1: python nanogcg_process.py FOLDER, with its packages on PYTHONPATH.

FOLDER holds shape.json, weights.safetensors, tokenizer.json and task.json (prefix, start, target: texts). A line of JSON on standard
input asks for a run, a line that starts with ANSWER on standard output gives it. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, set_seed

try:
    import scipy.stats  # noqa: F401
except ImportError:  # nanoGCG names it, and uses it for probe sampling alone, which is off here
    sys.modules["scipy"], sys.modules["scipy.stats"] = types.ModuleType("scipy"), types.ModuleType("scipy.stats")
    sys.modules["scipy.stats"].spearmanr = None  # type: ignore[attr-defined]

import nanogcg
from nanogcg import gcg


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Side:
    """The model in the weights' format, and what was seen in the steps of a run."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.task = json.loads((folder / "task.json").read_text())
        weights = load_file(folder / "weights.safetensors", device=device)
        with torch.device(device):
            self.model = GPTNeoXForCausalLM(GPTNeoXConfig(**json.loads((folder / "shape.json").read_text()))).eval()
        for parameter in self.model.parameters():  # not the angles of rotary positions: from_pretrained leaves them in fp32 too
            parameter.data = parameter.data.to(weights["lm_head.weight"].dtype)
        weights["embed_out.weight"] = weights.pop("lm_head.weight")
        found = self.model.load_state_dict(weights, strict=False)
        left = [name for name in found.missing_keys if not name.endswith(("inv_freq", "masked_bias", "attention.bias"))]
        if left or found.unexpected_keys:
            raise SystemExit(f"weights do not fit: missing {left}, unexpected {found.unexpected_keys}")
        end = "<|endoftext|>"
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end)
        self.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        self.marks: list[float] = []
        self.kept: list[torch.Tensor] = []
        gcg.tqdm = self._steps  # type: ignore[attr-defined]
        real = gcg.filter_ids
        gcg.filter_ids = lambda ids, tokenizer: self._keep(real(ids, tokenizer))  # type: ignore[attr-defined]

    def _steps(self, numbers: range) -> Iterator[int]:
        """In place of the progress bar: notes when each step begins, with the device idle."""
        for number in numbers:
            sync()
            self.marks.append(time.perf_counter())
            yield number
        sync()
        self.marks.append(time.perf_counter())

    def _keep(self, ids: torch.Tensor) -> torch.Tensor:
        self.kept.append(ids)
        return ids

    def run(self, steps: int, batch_size: int, seed: int, **settings: Any) -> dict[str, Any]:
        """Seconds, distinct candidates that pass the filter, loss and string of every step."""
        self.marks, self.kept = [], []
        set_seed(seed)  # GCGConfig.seed would also switch to deterministic, slower kernels
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        config = nanogcg.GCGConfig(
            num_steps=steps,
            search_width=self.task["width"],
            topk=self.task["topk"],
            batch_size=batch_size,
            optim_str_init=self.task["start"],
            verbosity="ERROR",
            **settings,
        )
        found = nanogcg.run(self.model, self.tokenizer, self.task["prefix"], self.task["target"], config)
        return {
            "seconds": [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)],
            "scored": [len(ids) for ids in self.kept],
            "distinct": [len(torch.unique(ids, dim=0)) for ids in self.kept],
            "losses": found.losses,
            "strings": found.strings,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        }

    @torch.no_grad()
    def losses(self, ids: list[list[int]], scored: int) -> list[float]:
        """Mean fp32 loss of the last tokens by this side's model and library, to see that both sides have the same model."""
        texts = torch.tensor(ids, device=self.model.device)
        logits = torch.cat([self.model(part).logits[:, -scored - 1 : -1] for part in texts.split(8)]).float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, -scored:], reduction="none").mean(dim=1).tolist()


def main() -> None:
    side = Side(Path(sys.argv[1]))
    print("ANSWER", json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print("ANSWER", json.dumps(getattr(side, asked.pop("call"))(**asked)), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other side measures next


if __name__ == "__main__":
    main()
