"""Every token scored once, whatever the windows and batches: compared with a loop over tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import Evaluate, Experiment
from tests.builders import VOCABULARY, small_model, token_folder
from utils.data.tokens import Tokens
from utils.evaluation import perplexity
from utils.evaluation.perplexity import by_document, evaluate_stored, rounding, score_windows, summarise, unigram_nll, window_losses
from utils.evaluation.windows import Window, batches, first_windows, sample, windows
from utils.models.likelihood import mean_nll
from utils.models.loading import save_model
from utils.run.errors import StoppedInTime, WorkFailed
from utils.run.preemption import Stop

LENGTHS = (1, 0, 30, 2, 7, 16, 17, 1, 5)
SUBSETS = ("code", "prose", "code", "prose", "prose", "code", "prose", "code", "code")
DOCUMENTS = [np.random.default_rng(length + 100 * number).integers(1, VOCABULARY, length).tolist() for number, length in enumerate(LENGTHS)]
SPECS = [(64, 8), (33, 16), (8, 7), (8, 1), (8, 3), (2, 1)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_model()


@pytest.fixture
def split(tmp_path: Path) -> Tokens:
    return token_folder(tmp_path / "test", DOCUMENTS, SUBSETS)


def spec(context: int, stride: int, batch_size: int = 4) -> Evaluate:
    return Evaluate(context=context, stride=stride, batch_size=batch_size)


@torch.no_grad()
def slow_nll(model: PreTrainedModel, document: list[int], context: int, stride: int) -> list[float]:
    """One token at a time: its window ends at the first of context, context + stride, ... that reaches beyond it."""
    ids, losses = [0, *document], []
    for place in range(1, len(ids)):
        end = context
        while end <= place:
            end += stride
        start = max(0, min(end, len(ids)) - context)
        logits = model(torch.tensor([ids[start:place]])).logits[0, -1].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[ids[place]]))
    return losses


def window_nll(model: PreTrainedModel, batch: list[Window]) -> list[float]:
    return window_losses(model, batch, "fp32").sum(dim=1).tolist()


@torch.no_grad()
def slow_first(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """Losses of all tokens but the first, nothing in front."""
    if len(ids) < 2:
        return []
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return [-float(logits[place, token]) for place, token in enumerate(ids[1:])]


def score(model: PreTrainedModel, tokens: Tokens, how: Evaluate, path: Path) -> list[dict]:
    return by_document(tokens, score_windows(model, windows(tokens, how), how.batch_size, "fp32", path, Stop(), "test"))


@pytest.mark.parametrize(("context", "stride"), SPECS)
def test_every_token_is_scored_exactly_once(split: Tokens, context: int, stride: int) -> None:
    scored: dict[int, list[int]] = {number: [] for number in range(len(DOCUMENTS))}
    for window in windows(split, spec(context, stride)):
        assert 0 < window.scored < len(window.ids) <= context
        whole = [0, *DOCUMENTS[window.document]]
        end = len(scored[window.document]) + window.scored + 1
        assert window.ids.tolist() == whole[end - len(window.ids) : end]
        assert len(window.ids) - window.scored >= min(context - stride, end - window.scored)  # tokens of context before the first
        scored[window.document] += window.ids[-window.scored :].tolist()
    assert list(scored.values()) == DOCUMENTS


@pytest.mark.parametrize(("context", "stride"), SPECS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_losses_equal_a_loop_over_tokens(
    model: PreTrainedModel, split: Tokens, tmp_path: Path, context: int, stride: int, batch_size: int
) -> None:
    rows = score(model, split, spec(context, stride, batch_size), tmp_path / "rows.jsonl")
    assert [row["document"] for row in rows] == [number for number, length in enumerate(LENGTHS) if length]
    for row in rows:
        losses = slow_nll(model, DOCUMENTS[row["document"]], context, stride)
        assert row["tokens"] == len(losses) == LENGTHS[row["document"]]
        assert row["nll"] == pytest.approx(sum(losses), rel=1e-5)
        assert row["subset"] == SUBSETS[row["document"]] and row["bytes"] == 10 * row["tokens"]


def test_padding_has_no_effect(model: PreTrainedModel) -> None:
    short, long = Window(0, np.array([0, 5, 9]), 2), Window(1, np.arange(60), 7)
    alone = [*window_nll(model, [short]), *window_nll(model, [long])]
    assert window_nll(model, [short, long]) == pytest.approx(alone, rel=1e-5)
    ones = [Window(number, np.array([0, number]), 1) for number in range(1, 5)]
    assert window_nll(model, ones) == pytest.approx([slow_nll(model, [number], 64, 8)[0] for number in range(1, 5)], rel=1e-5)


def test_batches_hold_every_window_and_pad_little(split: Tokens) -> None:
    cut = windows(split, spec(8, 3))
    made = batches(cut, 4)
    assert sorted(id(window) for batch in made for window in batch) == sorted(map(id, cut))
    lengths = [len(window.ids) for batch in made for window in batch]
    assert lengths == sorted(lengths)


def test_the_mean_is_over_tokens_and_not_over_documents() -> None:
    rows = [
        {"subset": "all", "bytes": 2, "nll": 10.0, "tokens": 1, "reference_nll": 0.0, "reference_tokens": 0},
        {"subset": "b", "bytes": 8, "nll": 8.0, "tokens": 4, "reference_nll": 6.0, "reference_tokens": 3},
        {"subset": "b", "bytes": 5, "nll": 0.0, "tokens": 5, "reference_nll": 1.0, "reference_tokens": 4},
    ]
    summary = summarise(rows)
    subsets = summary.pop("by_subset")
    assert {name: entry["loss"] for name, entry in subsets.items()} == {"all": 10.0, "b": pytest.approx(8 / 9)}
    assert summary == {
        "loss": 1.8,
        "perplexity": math.exp(1.8),
        "total_tokens": 10,
        "bits_per_byte": 18.0 / math.log(2) / 15,
        "total_bytes": 15,
        "documents": 3,
        "reference_protocol": {"loss": 1.0, "perplexity": math.e, "total_tokens": 7},
    }
    assert subsets["all"]["reference_protocol"] == {"loss": None, "perplexity": None, "total_tokens": 0}
    hopeless = summarise([rows[0] | {"nll": 1e6, "bytes": 0}])
    assert hopeless["bits_per_byte"] is None
    assert math.isfinite(hopeless["perplexity"])  # strict JSON knows no infinity


def test_unigram_loss_equals_counting(split: Tokens, tmp_path: Path) -> None:
    train = [[5, 5, 5, 9], [9, 1], []]
    counts = dict.fromkeys(range(VOCABULARY), 1)
    for token in (5, 5, 5, 9, 0, 9, 1, 0, 0):
        counts[token] += 1
    losses = [-math.log(counts[token] / (VOCABULARY + 9)) for document in DOCUMENTS for token in document]
    found = unigram_nll(token_folder(tmp_path / "train", train).counts(VOCABULARY - 5), split, VOCABULARY)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_mean_nll_is_the_same_for_every_batch_size(model: PreTrainedModel) -> None:
    sequences = np.random.default_rng(0).integers(0, VOCABULARY, (7, 13))
    losses = [slow_nll_of_sequence(model, row) for row in sequences.tolist()]
    for size in range(1, 9):
        assert mean_nll(model, sequences, size, "fp32") == pytest.approx(np.mean(losses), rel=1e-6)


@torch.no_grad()
def slow_nll_of_sequence(model: PreTrainedModel, ids: list[int]) -> float:
    logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(dim=1)
    return -sum(float(logits[place, token]) for place, token in enumerate(ids[1:])) / (len(ids) - 1)


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(model: PreTrainedModel, split: Tokens, tmp_path: Path) -> None:
    how = spec(8, 3)
    straight = score(model, split, how, tmp_path / "straight.jsonl")

    class After(Stop):
        def requested(self) -> bool:
            self.left = getattr(self, "left", 2) - 1
            return self.left < 0

    path = tmp_path / "resumed.jsonl"
    with pytest.raises(StoppedInTime):
        score_windows(model, windows(split, how), how.batch_size, "fp32", path, After(), "test")
    assert len(path.read_text().splitlines()) == 2 * how.batch_size
    with path.open("a") as handle:
        handle.write('{"document": 3, "nl')  # torn by a power loss
    assert score(model, split, how, path) == straight
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_a_model_that_gives_nan_is_not_recorded(split: Tokens, tmp_path: Path) -> None:
    broken = small_model()
    with torch.no_grad():
        broken.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(WorkFailed, match=r"loss of the model .* is not finite on the test text"):
        score(broken, split, spec(8, 3), tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_stored_models_are_evaluated_on_identical_tokens(split: Tokens, tiny: Experiment, tmp_path: Path) -> None:
    models = {name: small_model(seed) for seed, name in enumerate(("baseline", "monotonic"))}
    for name, model in models.items():
        save_model(model, tmp_path / name)
    train = token_folder(tmp_path / "train", [[5, 6, 7]])
    np.save(tmp_path / "counts.npy", train.counts(VOCABULARY))
    results = evaluate_stored(
        tiny,
        7,
        models={name: tmp_path / name for name in models},
        unigram_counts=tmp_path / "counts.npy",
        test_tokens=split.folder,
        state=tmp_path / "state",
        records=tmp_path / "records.jsonl",
        stop=Stop(),
    )
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(row["model"], row["document"]) for row in rows] == [(name, n) for name in models for n, size in enumerate(LENGTHS) if size]
    for name, model in models.items():
        losses = [slow_nll(model, document, tiny.evaluate.context, tiny.evaluate.stride) for document in DOCUMENTS]
        flat = [loss for document in losses for loss in document]
        entry = results["pile_test"][f"{name}_pythia"]
        assert entry["total_tokens"] == sum(LENGTHS) == len(flat)
        assert entry["loss"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        assert entry["bits_per_byte"] == pytest.approx(sum(flat) / math.log(2) / (10 * len(flat)), rel=1e-5)
        first = [loss for document in DOCUMENTS for loss in slow_first(model, document[: tiny.evaluate.context])]
        assert entry["reference_protocol"]["total_tokens"] == len(first) == sum(max(0, min(size, 33) - 1) for size in LENGTHS)
        assert entry["reference_protocol"]["loss"] == pytest.approx(sum(first) / len(first), rel=1e-5)
        code = [loss for document, subset in zip(losses, SUBSETS, strict=True) if subset == "code" for loss in document]
        assert entry["by_subset"]["code"]["loss"] == pytest.approx(sum(code) / len(code), rel=1e-5)
    assert results["metadata"]["unigram_loss"] == unigram_nll(train.counts(VOCABULARY), split, VOCABULARY)
    assert results["metadata"]["seed"] == 7 and results["rounding"] == {}
    json.dumps(results, allow_nan=False)


def test_the_references_windows_start_at_the_document(split: Tokens) -> None:
    cut = first_windows(split, spec(8, 3))
    assert [(window.document, window.ids.tolist()) for window in cut] == [
        (number, document[:8]) for number, document in enumerate(DOCUMENTS) if len(document) > 1
    ]
    assert all(window.scored == len(window.ids) - 1 for window in cut)


def test_a_sample_is_spread_and_has_no_window_twice(split: Tokens) -> None:
    cut = windows(split, spec(8, 3))
    chosen = sample(cut, 3)
    assert [id(window) for window in chosen] == [id(cut[place]) for place in (0, round((len(cut) - 1) / 2), len(cut) - 1)]
    assert sample(cut, 1000) == cut and sample(cut, 0) == []


def test_what_bf16_changes_is_measured_and_said_if_it_is_much(split: Tokens) -> None:
    cut = windows(split, spec(33, 16))
    model, rough = small_model(scale=0.02), small_model(scale=3.0)
    exact = [window_losses(model, [window], "fp32") for window in cut]
    bf16 = [window_losses(model, [window], "bf16") for window in cut]
    found = rounding(model, cut, 4, Stop())
    changes = [float((one - other).sum()) for one, other in zip(bf16, exact, strict=True)]
    assert found["tokens"] == sum(LENGTHS) and found["windows"] == len(cut)
    assert found["mean_difference"] == pytest.approx(sum(changes) / sum(LENGTHS), abs=1e-6)
    means = [abs(change) / window.scored for change, window in zip(changes, cut, strict=True)]
    assert found["largest_difference"] == pytest.approx(max(means), abs=1e-5)
    tokens = max(float((one - other).abs().max()) for one, other in zip(bf16, exact, strict=True))
    assert found["largest_difference_of_a_token"] == pytest.approx(tokens, abs=1e-5)
    assert found["flag"] is None
    much = rounding(rough, cut, 4, Stop())
    assert abs(much["mean_difference"]) > 0.01 and "bf16 moves the loss by" in much["flag"]


def test_logits_are_formed_for_scored_tokens_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = perplexity.token_nll
    monkeypatch.setattr(perplexity, "token_nll", lambda hidden, *rest: seen.append(len(hidden)) or plain(hidden, *rest))
    window_losses(model, [Window(0, np.arange(30), 7), Window(1, np.arange(9), 8)], "fp32")
    assert seen == [15]
