"""What the models write by themselves: greedy continuations of test documents. Likelihood alone can hide a model that only repeats.

The set-up of Welleck et al. 2019 (arXiv 1908.04319): 50 tokens of a document, 100 tokens of continuation, the share of repeated 4-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel

from configs.schema import Evaluate, Experiment
from utils.data.tokenizer import load_tokenizer
from utils.data.tokens import Tokens
from utils.models.loading import autocast, device_of, load_model
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Row, write_rows

PROMPT, NEW = 50, 100  # tokens, where the context has room for them
TEXT = "text"  # in place of a model: how the document itself goes on
GRAMS = (2, 4)


def prompts(tokens: Tokens, spec: Evaluate) -> tuple[list[int], NDArray[np.int64], int]:
    """(n documents, their ids (n, 1 + prompt + new) behind end-of-text, new), evenly spaced among those that are long enough."""
    prompt = min(PROMPT, (spec.context - 1) // 3)
    new = min(NEW, spec.context - 1 - prompt)
    documents = tokens.documents()
    long = [number for number, ids in enumerate(documents) if len(ids) >= prompt + new]
    places = np.unique(np.linspace(0, len(long) - 1, min(spec.generation_prompts, len(long))).round().astype(int))
    chosen = [long[place] for place in places.tolist()]
    rows = [np.append(tokens.end_of_text, documents[number][: prompt + new]) for number in chosen]
    return chosen, np.stack(rows) if rows else np.empty((0, 1 + prompt + new), dtype=np.int64), new


@torch.no_grad()
def continuations(model: PreTrainedModel, ids: NDArray[np.int64], new: int, precision: str, batch_size: int, stop: Stop) -> list[list[int]]:
    """ids (n, T) -> n lists of `new` ids, the likeliest token each time; end-of-text is passed over, so that all have one length."""
    end = model.config.eos_token_id
    how = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,  # what is not said here is taken from the model's own settings
        no_repeat_ngram_size=0,
        min_new_tokens=new,
        max_new_tokens=new,
        eos_token_id=end,
        pad_token_id=0,
        use_cache=True,
    )
    written: list[list[int]] = []
    for start in range(0, len(ids), batch_size):
        stop.check()
        given = torch.from_numpy(ids[start : start + batch_size]).to(model.device)
        with autocast(model.device, precision):
            made = model.generate(given, attention_mask=torch.ones_like(given), generation_config=how)
        written += made[:, given.shape[1] :].tolist()
    return written


def repetition(ids: Sequence[int], size: int) -> float:
    """1 - (different n-grams) / (n-grams), seq-rep-n of Welleck et al. 2019; 0 if there is none."""
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def agreement(ids: Sequence[int], other: Sequence[int]) -> float:
    """Share of the tokens before the first that differs. (Behind it the two read different texts.)"""
    return next((place for place, (one, two) in enumerate(zip(ids, other, strict=True)) if one != two), len(ids)) / len(ids)


def generate_stored(
    config: Experiment, *, models: dict[str, Path], tokenizer: Path, test_tokens: Path, records: Path, stop: Stop
) -> dict[str, Any]:
    """Let every stored model go on with the same documents; a row each goes to `records`, means stand under `generation` in the results.

    `rep_2`, `rep_4`: shares of repeated n-grams. `agreement`: with the base model's continuation. `text`: how the documents go on.
    """
    spec, device, words = config.evaluate, device_of(config.compute), load_tokenizer(tokenizer)
    documents, ids, new = prompts(Tokens(test_tokens), spec)
    written = {TEXT: ids[:, -new:].tolist()}
    if not documents:
        models = {}
    progress = Progress("write on", len(models))
    for name, folder in models.items():
        model = load_model(folder, device)
        written[name] = continuations(model, ids[:, :-new], new, config.compute.precision, spec.batch_size, stop)
        progress.advance(note=name)
    progress.close()
    rows = [
        _row(name, document, made, base, words.decode(made, skip_special_tokens=False))
        for name, lines in written.items()
        for document, made, base in zip(documents, lines, written.get("base", lines), strict=True)
    ]
    write_rows(records, rows)
    return {
        "prompts": len(documents),
        "prompt_tokens": ids.shape[1] - 1 - new,
        "new_tokens": new,
        "models": {name: _summary([row for row in rows if row["model"] == name]) for name in written if documents},
    }


def _row(name: str, document: int, made: list[int], base: list[int], text: str) -> Row:
    repeated = {f"rep_{size}": repetition(made, size) for size in GRAMS}
    return {"model": name, "document": document, **repeated, "agreement": agreement(made, base), "ids": made, "text": text}


def _summary(rows: Sequence[Row]) -> dict[str, float]:
    """Means over documents, each with its standard error (_se)."""
    found: dict[str, float] = {}
    for key in (*(f"rep_{size}" for size in GRAMS), "agreement"):
        values = [row[key] for row in rows]
        found |= {key: fmean(values), f"{key}_se": stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0}
    return found
