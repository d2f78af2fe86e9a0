"""Token-weighted negative log-likelihood of documents: every token scored once, on identical tokens for every model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from configs.schema import Evaluate, Experiment
from utils.data.tokens import Tokens
from utils.models.loading import autocast, device_of, load_model
from utils.run.errors import WorkFailed
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Records, Row, grouped, read_rows, write_rows


@dataclass(frozen=True)
class Window:
    """A piece of a document with its context: `ids` (n,), of which the last `scored` are predicted."""

    document: int
    ids: NDArray[np.int64]
    scored: int


def windows(tokens: Tokens, spec: Evaluate) -> list[Window]:
    """Cut every document, with end-of-text in front, into windows of `context` tokens that advance by `stride`.

    A document's first token is predicted from end-of-text; each of its n tokens is scored in exactly one window.
    """
    return [window for number, ids in enumerate(tokens.documents()) for window in _cut(number, np.append(tokens.end_of_text, ids), spec)]


def _cut(number: int, ids: NDArray[np.int64], spec: Evaluate) -> Iterator[Window]:
    end = min(spec.context, len(ids))
    if end > 1:
        yield Window(number, ids[:end], end - 1)
    while end < len(ids):
        scored = min(spec.stride, len(ids) - end)
        end += scored
        yield Window(number, ids[max(0, end - spec.context) : end], scored)


@torch.no_grad()
def window_nll(model: PreTrainedModel, batch: Sequence[Window], precision: str) -> list[float]:
    """Negative log-likelihood of each window's scored tokens, nats summed over them in fp64."""
    width = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    scored = torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.from_numpy(window.ids)  # padding stands behind, where causal attention cannot see it
        scored[row, len(window.ids) - 1 - window.scored : len(window.ids) - 1] = True
    ids, scored = ids.to(model.device), scored.to(model.device)
    with autocast(model.device, precision):
        logits = model(ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses.double() * scored).sum(dim=1).tolist()


def batches(cut: Sequence[Window], size: int) -> list[Sequence[Window]]:
    """Batches of windows of like length, so that little is padded; their composition depends on the windows alone."""
    return grouped(sorted(cut, key=lambda window: (len(window.ids), window.document)), size)


def by_document(tokens: Tokens, rows: Sequence[Row]) -> list[Row]:
    """Sum rows {document, nll, tokens} of one model to a row a document, with its subset and UTF-8 bytes."""
    sums: dict[int, list[float]] = {}
    for row in rows:
        total = sums.setdefault(row["document"], [0.0, 0])
        total[0] += row["nll"]
        total[1] += row["tokens"]
    names, sizes = tokens.subset_names(), tokens.column("bytes").tolist()
    return [
        {"document": number, "subset": names[number], "bytes": sizes[number], "nll": sums[number][0], "tokens": sums[number][1]}
        for number in sorted(sums)
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """{whole or subset: {loss (nats per token), perplexity, total_tokens, documents}}; token-weighted."""
    groups = {"all": list(rows)} | {
        name: [row for row in rows if row["subset"] == name] for name in sorted({row["subset"] for row in rows})
    }
    return {name: _summary(members) for name, members in groups.items() if members}


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    tokens = sum(row["tokens"] for row in rows)
    loss = math.fsum(row["nll"] for row in rows) / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "total_tokens": tokens, "documents": len(rows)}


def unigram_nll(counts: NDArray[np.int64], test: Tokens, vocabulary: int) -> float:
    """Nats per token of the test documents under training frequencies with one added to every count: what no context gives.

    `counts` (at most vocabulary,): how often each id occurs in the training text.
    """
    counts = np.pad(counts, (0, vocabulary - len(counts))) + 1
    seen = np.concatenate(test.documents())
    return float(-np.log(counts[seen] / counts.sum()).mean())


def evaluate_model(
    model: PreTrainedModel, cut: Sequence[Window], spec: Evaluate, precision: str, path: Path, stop: Stop, label: str
) -> list[Row]:
    """Score all windows of one model, with resume; returns the rows {document, nll, tokens} of the finished file."""
    records, groups = Records(path), batches(cut, spec.batch_size)
    pending = list(records.pending(groups))
    progress = Progress(f"evaluate {label}", len(groups), len(groups) - len(pending))
    for group in pending:
        stop.check()
        sums = window_nll(model, group, precision)
        if not all(map(math.isfinite, sums)):
            raise WorkFailed(f"the loss of the model {label!r} is not finite on the test text; check its training history")
        records.append({"document": window.document, "nll": nll, "tokens": window.scored} for window, nll in zip(group, sums, strict=True))
        progress.advance()
    progress.close()
    return read_rows(path)


def evaluate_stored(
    config: Experiment,
    seed: int,
    *,
    models: dict[str, Path],
    unigram_counts: Path,
    test_tokens: Path,
    state: Path,
    records: Path,
    stop: Stop,
) -> dict[str, Any]:
    """Evaluate stored models; write a row for each model and document to `records`; return evaluation_results.json."""
    device, test = device_of(config.compute), Tokens(test_tokens)
    cut = windows(test, config.evaluate)
    rows: list[Row] = []
    results = {}
    for name, folder in models.items():
        model = load_model(folder, device)
        scored = evaluate_model(model, cut, config.evaluate, config.compute.precision, state / f"{name}.jsonl", stop, name)
        documents = by_document(test, scored)
        rows += [{"model": name, **row} for row in documents]
        summary = summarise(documents)
        results[f"{name}_pythia"] = {**summary.pop("all"), "by_subset": summary}
    write_rows(records, rows)
    unigram = unigram_nll(np.load(unigram_counts), test, model.config.vocab_size)
    return {
        "pile_test": results,
        "metadata": {
            "seed": seed,
            "model_name": config.model.name,
            "context": config.evaluate.context,
            "stride": config.evaluate.stride,
            "precision": config.compute.precision,
            "unigram_loss": unigram,
            "unigram_perplexity": math.exp(unigram),
            "loss_unit": "nats per token, weighted by token; every token of a document scored once",
        },
    }
