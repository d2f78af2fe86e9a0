"""All splits, tokenised once; the tokenizer; published models from a local folder without a network."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from configs.presets import load
from configs.schema import Experiment
from tests.builders import small_model
from tests.conftest import TINY
from utils.data.attack_texts import write_attack_texts
from utils.data.sources import SPLITS, rows
from utils.data.tokenise import token_cache
from utils.data.tokenizer import END_OF_TEXT, fetch_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from utils.data.tokens import Tokens
from utils.models.ffn import feed_forward
from utils.models.loading import load_model, save_model
from utils.run.artifacts import read_json
from utils.run.errors import InputError
from utils.run.preemption import Stop
from utils.training.base import base_cache

WORDS = ("what", "a", "monotone", "layer", "maps", "larger", "inputs", "to", "is", "never", "smaller", "in", "any", "coordinate")
TEXTS = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 40)) + f" {number}" for number in range(120)]
EMBEDDED = "data.embedded={packages: [pydantic], characters: 300_000, document_characters: 600}"


def from_files(folder: Path, train: list[str], validation: list[str], test: list[str], *more: str) -> Experiment:
    for name, texts in (("train", train), ("validation", validation), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    named = {name: [str(folder / f"{name}.jsonl")] for name in ("train", "validation", "test")}
    small = "model.scratch.vocabulary=300"
    return load(TINY, ["data.source=files", "data.embedded=null", f"data.files={json.dumps(named)}", small, *more])


def texts_of(content: Path) -> dict[str, list[str]]:
    tokenizer = load_tokenizer(content / "tokenizer")
    return {split: [tokenizer.decode(ids.tolist()) for ids in Tokens(content / "tokens" / split).documents()] for split in SPLITS}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load(TINY, [EMBEDDED])


@pytest.fixture(scope="module")
def content(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_cache(experiment, tmp_path_factory.mktemp("cache"), Stop())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_no_text_is_in_two_splits(content: Path) -> None:
    found = {split: Counter(texts) for split, texts in texts_of(content).items()}
    assert all(found.values())
    assert not any(found[first] & found[second] for first, second in combinations(SPLITS, 2))


def test_counts_and_limits(content: Path, experiment: Experiment) -> None:
    counts = read_json(content / "counts.json")
    for split in SPLITS:
        tokens = Tokens(content / "tokens" / split)
        assert counts[split]["tokens"] == len(tokens.ids)
        assert counts[split]["documents"] == len(tokens.documents())
        assert counts[split]["duplicates"] == 0
    assert counts["train"]["tokens"] <= experiment.data.train_tokens
    assert counts["validation"]["tokens"] <= experiment.data.validation_tokens
    assert counts["test"]["tokens"] <= experiment.data.test_tokens
    assert max(map(len, Tokens(content / "tokens" / "attack").documents())) == 16


def test_a_second_use_builds_nothing(content: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.data.tokenise.tokenise", None)
    assert token_cache(experiment, content.parents[1], Stop()) == content


def test_the_tokenizer_is_deterministic_and_has_exactly_the_vocabulary(content: Path, experiment: Experiment, tmp_path: Path) -> None:
    again = train_tokenizer((row.text for row in rows(experiment.data, "train")), 512)
    save_tokenizer(again, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (content / "tokenizer" / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(content / "tokenizer")
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    text = "Zürich\t漢字 \U0001f600\n  def f(x): return x"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_plain_transformers_loads_the_tokenizer(content: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(content / "tokenizer", local_files_only=True)
    text = "def monotone(x): return x"
    assert plain(text)["input_ids"] == load_tokenizer(content / "tokenizer").encode(text).ids
    assert plain.eos_token_id == 0


def test_copies_of_held_out_documents_leave_the_training_text(tmp_path: Path) -> None:
    train, validation, test = TEXTS[:60], TEXTS[60:100], TEXTS[100:]
    copies = [test[3], "  " + validation[5].replace(" ", "\n "), test[7]]
    config = from_files(tmp_path, train[:30] + copies + train[30:], [*validation, test[0]], test)
    content = token_cache(config, tmp_path / "cache", Stop())
    found, counts = texts_of(content), read_json(content / "counts.json")
    assert found["train"] == train
    assert found["test"] == test
    assert set(found["validation"]) < set(validation)
    assert len(found["validation"]) + len(found["attack"]) == 40
    assert counts["train"]["duplicates"] == 3
    assert sum(counts[split]["duplicates"] for split in ("validation", "attack")) == 1
    assert counts["test"]["duplicates"] == 0


def test_a_split_without_text_is_refused(tmp_path: Path) -> None:
    config = from_files(tmp_path, TEXTS, ["a", "b", "c", "d", "e"], ["", ""])
    with pytest.raises(InputError, match="data: found no text for the split 'test', expected at least one document; give more text"):
        token_cache(config, tmp_path / "cache", Stop())


def test_too_little_attack_text_is_refused(tmp_path: Path) -> None:
    config = from_files(tmp_path, TEXTS[:60], TEXTS[60:64] * 9, TEXTS[100:])
    content = token_cache(config, tmp_path / "cache", Stop())
    with pytest.raises(
        InputError, match=r"attack texts: found \d unused documents of at least 16 tokens for the set 'hotflip', expected 6"
    ):
        write_attack_texts(Tokens(content / "tokens" / "attack"), load_tokenizer(content / "tokenizer"), config, tmp_path / "texts.json")


@pytest.fixture
def published(tmp_path: Path, no_network: None) -> Iterator[Experiment]:
    """An experiment on a model folder such as a user may have on a cluster without a network."""
    save_model(small_model(), tmp_path / "published")
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    save_tokenizer(tokenizer, tmp_path / "published")
    source = json.dumps({"source": "pretrained", "name": str(tmp_path / "published"), "scratch": None})
    yield from_files(tmp_path, TEXTS[:60], TEXTS[60:100], TEXTS[100:], f"model={source}")


def test_a_local_folder_serves_as_published_model(published: Experiment, tmp_path: Path) -> None:
    content = token_cache(published, tmp_path / "cache", Stop())
    assert texts_of(content)["train"] == TEXTS[:60]
    own = Tokenizer.from_file(str(tmp_path / "published" / "tokenizer.json"))
    assert Tokens(content / "tokens" / "test").documents()[0].tolist() == own.encode(TEXTS[100]).ids
    base = base_cache(published, tmp_path / "cache", content, Stop())
    assert read_json(base / "origin.json") == {"name": published.model.name, "commit": "local"}
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(base / "model")(ids).logits, small_model()(ids).logits)
    assert len(feed_forward(load_model(base / "model"))) == 2


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"model\.name='.*empty', revision 'main': no tokenizer found"):
        fetch_tokenizer(str(tmp_path / "empty"), "main", tmp_path / "target")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path, no_network: None) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(iter(TEXTS), 300)).save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="its tokenizer has no end-of-text token, expected one between documents"):
        fetch_tokenizer(str(tmp_path / "endless"), "main", tmp_path / "target")
