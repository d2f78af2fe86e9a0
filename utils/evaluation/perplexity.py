"""Token-weighted negative log-likelihood of documents: every token scored once, on identical tokens for every model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Experiment
from utils.data.tokens import Tokens
from utils.evaluation.windows import Window, batches, first_windows, sample, windows
from utils.models.attention import ANY_SHAPE, packed_causal
from utils.models.head import check_head, token_nll
from utils.models.loading import autocast, device_of, load_model, product_dtype
from utils.run.errors import WorkFailed
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Records, Row, write_rows

ROUNDING_LIMIT = 0.01  # nats per token that bf16 may move a loss by, before it is said


@torch.no_grad()
def window_losses(model: PreTrainedModel, batch: Sequence[Window], precision: str) -> Tensor:
    """(windows, width - 1) nats of each token in fp64, 0 where a token is not scored; of those no logits are formed."""
    width = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    scored = torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.from_numpy(window.ids)  # padding stands behind, where causal attention cannot see it
        scored[row, len(window.ids) - 1 - window.scored : len(window.ids) - 1] = True
    places = scored.flatten().nonzero().squeeze(1).to(model.device)
    ids = ids.to(model.device)
    with autocast(model.device, precision):
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    losses = token_nll(hidden[places], model.get_output_embeddings(), ids[:, 1:].flatten()[places], product_dtype(precision))
    return torch.zeros(scored.numel(), dtype=torch.float64, device=model.device).index_copy(0, places, losses.double()).view(scored.shape)


def score_windows(
    model: PreTrainedModel, cut: Sequence[Window], batch_size: int, precision: str, path: Path, stop: Stop, label: str
) -> list[Row]:
    """Score all windows of one model, with resume; returns the rows {document, nll, tokens} of the finished file."""
    records, groups = Records(path), batches(cut, batch_size)
    pending = list(records.pending(groups))
    progress = Progress(f"evaluate {label}", len(groups), len(groups) - len(pending))
    with packed_causal(model, kernels=ANY_SHAPE):
        check_head(model, precision)
        for group in pending:
            stop.check()
            sums = window_losses(model, group, precision).sum(dim=1).tolist()
            if not all(map(math.isfinite, sums)):
                raise WorkFailed(f"the loss of the model {label!r} is not finite on the test text; check its training history")
            rows = zip(group, sums, strict=True)
            records.append({"document": window.document, "nll": nll, "tokens": window.scored} for window, nll in rows)
            progress.advance()
    progress.close()
    return records.rows()


def by_document(tokens: Tokens, rows: Sequence[Row], first: Sequence[Row] = ()) -> list[Row]:
    """Sum rows {document, nll, tokens} of one model to a row a document, with its subset and UTF-8 bytes.

    `first`: the same by the reference's protocol, which has no row for documents of one token.
    """
    sums, others, names, sizes = _sums(rows), _sums(first), tokens.subset_names(), tokens.column("bytes").tolist()
    return [
        {"document": number, "subset": names[number], "bytes": sizes[number], "nll": nll, "tokens": count}
        | dict(zip(("reference_nll", "reference_tokens"), others.get(number, (0.0, 0)), strict=True))
        for number, (nll, count) in sorted(sums.items())
    ]


def _sums(rows: Sequence[Row]) -> dict[int, tuple[float, int]]:
    """{document: (nats, tokens)}"""
    sums: dict[int, tuple[float, int]] = {}
    for row in rows:
        nll, count = sums.get(row["document"], (0.0, 0))
        sums[row["document"]] = (nll + row["nll"], count + row["tokens"])
    return sums


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """{loss (nats per token), perplexity, bits_per_byte, total_tokens, total_bytes, documents, reference_protocol}, of all rows and, below
    `by_subset`, of each subset."""
    subsets = {name: [row for row in rows if row["subset"] == name] for name in sorted({row["subset"] for row in rows})}
    return _summary(rows) | {"by_subset": {name: _summary(members) for name, members in subsets.items()}}


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums over sums: weighted by token. Bits per byte do not depend on the tokenizer."""
    found = _loss(rows, "nll", "tokens")
    size, nats = sum(row["bytes"] for row in rows), math.fsum(row["nll"] for row in rows)
    found |= {"bits_per_byte": nats / math.log(2) / size if size else None, "total_bytes": size, "documents": len(rows)}
    return found | {"reference_protocol": _loss(rows, "reference_nll", "reference_tokens")}


def _loss(rows: Sequence[Row], nats: str, tokens: str) -> dict[str, Any]:
    total = sum(row[tokens] for row in rows)
    loss = math.fsum(row[nats] for row in rows) / total if total else None
    return {"loss": loss, "perplexity": None if loss is None else math.exp(min(loss, 700.0)), "total_tokens": total}


def unigram_nll(counts: NDArray[np.int64], test: Tokens, vocabulary: int) -> float:
    """Nats per token of the test documents under training frequencies with one added to every count: what no context gives.

    `counts` (at most vocabulary,): how often each id occurs in the training text.
    """
    counts = np.pad(counts, (0, vocabulary - len(counts))) + 1
    seen = np.concatenate(test.documents())
    return float(-np.log(counts[seen] / counts.sum()).mean())


def rounding(model: PreTrainedModel, cut: Sequence[Window], batch_size: int, stop: Stop) -> dict[str, Any]:
    """What bf16 changes, on some windows: nats per token in bf16 minus fp32.

    `mean_difference` over tokens, `largest_difference` of a window's mean and of one token (in size), and a sentence if the mean
    is above ROUNDING_LIMIT.
    """
    groups = batches(cut, batch_size)
    by_window: list[float] = []
    largest, total, tokens = 0.0, 0.0, sum(window.scored for window in cut)
    with packed_causal(model, kernels=ANY_SHAPE):
        for group in groups:
            stop.check()
            change = window_losses(model, group, "bf16") - window_losses(model, group, "fp32")
            sums = change.sum(dim=1).tolist()
            largest, total = max(largest, float(change.abs().max())), total + math.fsum(sums)
            by_window += [abs(nats) / window.scored for nats, window in zip(sums, group, strict=True)]
    mean = total / tokens
    said = f"bf16 moves the loss by {mean:+.4f} nats per token, more than {ROUNDING_LIMIT:g}: measure with compute.precision=fp32"
    return {
        "windows": len(cut),
        "tokens": tokens,
        "mean_difference": mean,
        "largest_difference": max(by_window),
        "largest_difference_of_a_token": largest,
        "flag": said if abs(mean) > ROUNDING_LIMIT else None,
    }


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
    spec, precision, device, test = config.evaluate, config.compute.precision, device_of(config.compute), Tokens(test_tokens)
    cut, first = windows(test, spec), first_windows(test, spec)
    checked = sample(cut, spec.precision_windows if precision == "bf16" else 0)
    rows: list[Row] = []
    results, rounded = {}, {}
    for name, folder in models.items():
        model = load_model(folder, device)
        scored = score_windows(model, cut, spec.batch_size, precision, state / f"{name}.jsonl", stop, name)
        again = score_windows(
            model, first, spec.batch_size, precision, state / f"{name}_reference.jsonl", stop, f"{name}, as the reference"
        )
        documents = by_document(test, scored, again)
        rows += [{"model": name, **row} for row in documents]
        results[f"{name}_pythia"] = summarise(documents)
        if checked:
            rounded[name] = rounding(model, checked, spec.batch_size, stop)
    write_rows(records, rows)
    unigram = unigram_nll(np.load(unigram_counts, allow_pickle=False), test, model.config.vocab_size)
    return {
        "pile_test": results,
        "rounding": rounded,
        "metadata": {
            "seed": seed,
            "model_name": config.model.name,
            "context": spec.context,
            "stride": spec.stride,
            "precision": precision,
            "unigram_loss": unigram,
            "unigram_perplexity": math.exp(unigram),
            "loss_unit": "nats per token, weighted by token; every token of a document scored once",
            "reference_protocol": "the first `context` tokens of each document, nothing in front, the first token not scored",
        },
    }
