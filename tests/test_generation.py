"""Greedy continuations: counted by hand, against a loop without a cache, the same for every batch size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.presets import load
from configs.schema import Evaluate
from tests.builders import VOCABULARY, small_model, token_folder
from tests.fake_stages import TINY
from utils.data.tokenizer import save_tokenizer, train_tokenizer
from utils.data.tokens import Tokens
from utils.evaluation.generation import agreement, continuations, generate_stored, prompts, repetition
from utils.models.loading import save_model
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop

LENGTHS = (40, 3, 31, 32, 60, 33, 50, 32)
DOCUMENTS = [np.random.default_rng(number).integers(1, VOCABULARY, length).tolist() for number, length in enumerate(LENGTHS)]


@pytest.fixture
def split(tmp_path: Path) -> Tokens:
    return token_folder(tmp_path / "test", DOCUMENTS)


@torch.no_grad()
def slow(model: PreTrainedModel, ids: list[int], new: int) -> list[int]:
    """The whole text is read anew for each token; end-of-text (0) is passed over."""
    made: list[int] = []
    for _ in range(new):
        made.append(1 + int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1, 1:].argmax()))
    return made


def test_repeated_n_grams_are_counted() -> None:
    assert repetition([1, 2, 3, 4, 5], 2) == repetition([1], 2) == 0
    assert repetition([1, 2, 1, 2, 1, 2], 2) == 1 - 2 / 5
    assert repetition([7] * 100, 4) == 1 - 1 / 97
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4], 4) == 1 - 5 / 6


def test_agreement_ends_at_the_first_difference() -> None:
    assert [agreement([1, 2, 3, 4], other) for other in ([1, 2, 3, 4], [1, 2, 9, 4], [9, 2, 3, 4])] == [1.0, 0.5, 0.0]


def test_prompts_are_long_enough_and_spread(split: Tokens) -> None:
    chosen, ids, new = prompts(split, Evaluate(context=33, stride=8, batch_size=4, generation_prompts=3))
    assert (ids.shape, new) == ((3, 33), 22) and chosen == [0, 4, 7]  # of those with 32 tokens or more: 0, 3, 4, 5, 6, 7
    assert ids.tolist() == [[0, *DOCUMENTS[number][:32]] for number in chosen]
    assert prompts(split, Evaluate(context=33, stride=8, batch_size=4, generation_prompts=99))[0] == [0, 3, 4, 5, 6, 7]
    for spec in (Evaluate(context=99, stride=8, batch_size=4), Evaluate(context=33, stride=8, batch_size=4, generation_prompts=0)):
        chosen, ids, new = prompts(split, spec)
        assert chosen == [] and len(ids) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_continuations_equal_a_loop_without_a_cache(batch_size: int) -> None:
    model, ids = small_model(), np.array([[0, *document[:9]] for document in DOCUMENTS if len(document) > 9])
    made = continuations(model, ids, 20, "fp32", batch_size, Stop())
    assert made == [slow(model, row, 20) for row in ids.tolist()]
    assert all(0 not in row for row in made)
    with torch.no_grad():  # now it would rather end
        table = model.get_output_embeddings().weight
        table[0] = 1.5 * table[max(made[0], key=made[0].count)]
        assert int(model(torch.from_numpy(np.append(ids[0], made[0][:-1])[None])).logits.argmax(dim=-1).eq(0).sum()) > 0
    made = continuations(model, ids, 20, "fp32", batch_size, Stop())
    assert made == [slow(model, row, 20) for row in ids.tolist()] and all(0 not in row for row in made)
    model.generation_config.update(repetition_penalty=1.7, no_repeat_ngram_size=2)  # as some published models are set
    assert continuations(model, ids, 20, "fp32", batch_size, Stop()) == made


def test_stored_models_are_compared_with_the_base(split: Tokens, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(iter(["a b c"]), 257), tmp_path / "tokenizer")
    models = {"base": small_model(0), "other": small_model(1), "same": small_model(0)}
    for name, model in models.items():
        save_model(model, tmp_path / name)
    config = load(TINY, ["evaluate.generation_prompts=4", "evaluate.batch_size=3"])

    def run(stop: Stop) -> dict:
        return generate_stored(
            config,
            models={name: tmp_path / name for name in models},
            tokenizer=tmp_path / "tokenizer",
            test_tokens=split.folder,
            records=tmp_path / "records.jsonl",
            stop=stop,
        )

    found = run(Stop())
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(row["model"], row["document"]) for row in rows] == [(name, d) for name in ("text", *models) for d in (0, 4, 5, 7)]
    assert (found["prompts"], found["prompt_tokens"], found["new_tokens"]) == (4, 10, 22)
    for row in rows:
        document = DOCUMENTS[row["document"]]
        expected = document[10:32] if row["model"] == "text" else slow(models[row["model"]], [0, *document[:10]], 22)
        assert row["ids"] == expected and row["rep_4"] == repetition(expected, 4)
    means = found["models"]
    assert means["base"]["agreement"] == means["same"]["agreement"] == 1.0 > means["other"]["agreement"]
    for name in ("text", *models):
        assert means[name]["rep_2"] == pytest.approx(np.mean([row["rep_2"] for row in rows if row["model"] == name]))
    assert means["text"]["rep_4"] == 0.0 < means["base"]["rep_4"]  # random text does not repeat, a random model soon does

    class Now(Stop):
        def check(self) -> None:
            raise StoppedInTime("the test")

    with pytest.raises(StoppedInTime):
        run(Now())


def test_without_prompts_nothing_is_written(split: Tokens, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(iter(["a b c"]), 257), tmp_path / "tokenizer")
    found = generate_stored(
        load(TINY, ["evaluate.generation_prompts=0"]),
        models={"base": tmp_path / "not there"},
        tokenizer=tmp_path / "tokenizer",
        test_tokens=split.folder,
        records=tmp_path / "records.jsonl",
        stop=Stop(),
    )
    assert found["prompts"] == 0 and found["models"] == {} and (tmp_path / "records.jsonl").read_text() == ""
