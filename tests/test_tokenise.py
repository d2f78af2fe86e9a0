"""All splits, tokenised once; the tokenizer; published models from a local folder without a network."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer

from configs.presets import load
from configs.schema import Experiment, Files, Model
from stages.pipeline import stages
from tests.conftest import TINY
from tests.tiny_models import random_model
from utils.data import formats, shards, sources
from utils.data.attack_texts import write_attack_texts
from utils.data.formats import Item
from utils.data.sources import SPLITS, Source
from utils.data.tokenise import Limits, token_cache, tokenise
from utils.data.tokenizer import END_OF_TEXT, copy_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from utils.data.tokens import Tokens
from utils.models.ffn import feed_forward
from utils.models.loading import load_model, save_model
from utils.run.artifacts import inventory, read_json
from utils.run.errors import REFUSED, InputError, StoppedInTime
from utils.run.preemption import Stop
from utils.run.stage import run_stage
from utils.training.base import base_cache

WORDS = ("what", "a", "monotone", "layer", "maps", "larger", "inputs", "to", "is", "never", "smaller", "in", "any", "coordinate")
TEXTS = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 40)) + f" {number}" for number in range(120)]
EMBEDDED = "data.embedded={packages: [pydantic], characters: 300_000, document_characters: 600}"


TOKENIZER = train_tokenizer(iter(TEXTS), 300)


def from_files(folder: Path, train: list[str], validation: list[str], test: list[str], *more: str) -> Experiment:
    folder.mkdir(exist_ok=True)
    for name, texts in (("train", train), ("validation", validation), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    named = {name: [str(folder / f"{name}.jsonl")] for name in ("train", "validation", "test")}
    small = "model.scratch.vocabulary=300"
    return load(TINY, ["data.source=files", "data.embedded=null", f"data.files={json.dumps(named)}", small, *more])


def texts_of(content: Path) -> dict[str, list[str]]:
    tokenizer = load_tokenizer(content / "tokenizer")
    return {split: [tokenizer.decode(ids.tolist()) for ids in Tokens(content / "tokens" / split).documents()] for split in SPLITS}


def pretrained(folder: Path) -> Model:
    return Model(source="pretrained", name=str(folder))


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load(TINY, [EMBEDDED])


@pytest.fixture(scope="module")
def content(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_cache(experiment, tmp_path_factory.mktemp("cache"), Stop())


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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
    again = train_tokenizer((row.text for row in Source.of(experiment.data, tmp_path, Stop()).rows("train")), 512)
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
    save_model(random_model(vocabulary=300), tmp_path / "published")
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
    assert read_json(base / "origin.json") == {"name": published.model.name, "commit": "local", "earlier_commits": {}}
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(base / "model")(ids).logits, random_model(vocabulary=300)(ids).logits)
    assert len(feed_forward(load_model(base / "model"))) == 2


def test_an_id_that_the_model_has_no_embedding_for_is_refused(published: Experiment, tmp_path: Path) -> None:
    content = token_cache(published, tmp_path / "cache", Stop())
    save_model(random_model(vocabulary=280), tmp_path / "published")
    with pytest.raises(InputError, match=r"published': its tokenizer gives the id 299, expected ids below 280"):
        base_cache(published, tmp_path / "cache", content, Stop())


@pytest.mark.parametrize(
    ("section", "changed", "kind", "words"),
    [
        ("uat", {"text_tokens": 63}, "gpt_neox", "uat.text_tokens + 2 = 65: expected at most 64, the longest sequence of the base model"),
        ("monotone", {"scope": "gated_all"}, "gpt_neox", "monotone.scope: found 'gated_all', but the sublayers of 'gpt_neox' have no gate"),
        ("monotone", {"directions": 16}, "gpt_neox", "monotone.directions: found 16, expected at most 15"),
        ("monotone", {}, "bloom", "model: found architecture 'bloom', expected one of"),
        ("monotone", {}, "vit", "expected the configuration of a causal language model ("),
    ],
)
def test_a_model_that_does_not_suit_is_refused_before_text_is_tokenised(
    published: Experiment,
    section: str,
    changed: dict,
    kind: str,
    words: str,
    own_folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("utils.data.tokenise.tokenise", lambda *arguments: pytest.fail("tokenised"))
    config = published.model_copy(update={section: getattr(published, section).model_copy(update=changed)})
    if kind != "gpt_neox":
        Path(published.model.name, "config.json").write_text(json.dumps({"model_type": kind}))
    assert run_stage(stages()[0], config, 42, stages(), Stop(), discard=False) == REFUSED
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"model\.name='.*empty', revision 'main': no tokenizer found"):
        copy_tokenizer(pretrained(tmp_path / "empty"), tmp_path / "empty", tmp_path / "target")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path, no_network: None) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(iter(TEXTS), 300)).save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="its tokenizer has no end-of-text token, expected one between documents"):
        copy_tokenizer(pretrained(tmp_path / "endless"), tmp_path / "endless", tmp_path / "target")


def split_of(folder: Path, texts: list[str], limit: int, longest: int | None = None) -> Tokens:
    """The training split of these texts alone."""
    config = from_files(folder, texts, TEXTS[60:100], TEXTS[100:])
    source = Source.of(config.data, folder, Stop())
    limits = dict.fromkeys(SPLITS, Limits(1000)) | {"train": Limits(limit, longest)}
    tokenise(source, TOKENIZER, 0, limits, folder / "tokens", Stop())
    return Tokens(folder / "tokens" / "train")


def test_the_limit_is_never_exceeded(tmp_path: Path) -> None:
    for limit in (3, 4, 38, 39, 40, 200):
        split = split_of(tmp_path / str(limit), TEXTS[:60], limit)
        assert limit - 1 <= split.index["tokens"] == len(split.ids) <= limit
        assert split.ids[-1] == 0
        assert all(len(ids) for ids in split.documents())


def test_of_a_document_its_beginning_is_kept(tmp_path: Path) -> None:
    texts = [f"häuser und 漢字 {text}" for text in TEXTS[:60]]
    split = split_of(tmp_path, texts, 100_000, longest=5)
    for text, ids, size in zip(texts, split.documents(), split.column("bytes").tolist(), strict=True):
        kept = TOKENIZER.decode(ids.tolist())
        assert len(ids) == 5
        assert text.encode().startswith(kept.rstrip("\ufffd").encode())
        assert size == len(text[: TOKENIZER.encode(text).offsets[4][1]].encode())


def test_an_empty_text_is_an_empty_document(tmp_path: Path) -> None:
    split = split_of(tmp_path, ["", "a", ""], 100)
    assert [len(ids) for ids in split.documents()] == [0, 1, 0]
    assert split.column("bytes").tolist() == [0, 1, 0]


def test_a_limit_that_is_reached_reads_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless(path: Path) -> Iterator[Item]:
        nonlocal taken
        while path.stem == "train":
            taken += 1
            yield Item("a b c d " * 100, "prose")
        yield from formats.items(path)

    monkeypatch.setattr(sources, "items", endless)
    assert len(split_of(tmp_path, TEXTS[:1], 500).ids) == 500
    assert taken < 20_000


def interrupted(config: Experiment, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """The token cache, built by a process that is asked to stop at every shard; and how often it stopped."""
    stops = 0
    while True:
        stop = Stop()
        stop.reason = "the test says so"
        try:
            return token_cache(config, root, stop), stops
        except StoppedInTime:
            stops += 1


def test_a_setup_that_is_stopped_at_every_shard_equals_a_straight_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [*TEXTS[:60], TEXTS[101], *TEXTS[:60]]
    config = from_files(tmp_path, train, TEXTS[60:100], TEXTS[100:])
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    straight = token_cache(config, tmp_path / "straight", Stop())
    stopped, stops = interrupted(config, tmp_path / "stopped", monkeypatch)
    assert stops > 10
    assert inventory(stopped) == inventory(straight)
    assert read_json(straight / "counts.json")["train"]["duplicates"] == 1


def packed(folder: Path, documents: list[str], words: Tokenizer, length: int) -> Path:
    """Documents with end-of-text between them, cut into rows of equal length as Pythia's own training data are."""
    stream = [token for text in documents for token in (*words.encode(text).ids, 0)]
    rows = [stream[start : start + length] for start in range(0, len(stream), length)]
    parquet.write_table(pyarrow.table({"uid": range(len(rows)), "token_ids": rows}), folder / "packed.parquet")
    return folder / "packed.parquet"


def with_packed_training(published: Experiment, path: Path) -> Experiment:
    assert published.data.files
    files = published.data.files.model_copy(update={"train": (str(path),)})
    return published.model_copy(update={"data": published.data.model_copy(update={"files": files})})


@pytest.mark.parametrize(("length", "copies"), [(100_000, 1), (97, 0)])
def test_a_source_of_ids_keeps_them(published: Experiment, tmp_path: Path, length: int, copies: int) -> None:
    """One long row holds whole documents, so a copy is left out; rows of 97 ids cut nearly all, and lose nothing."""
    documents = [*TEXTS[:20], *[TEXTS[105]] * copies, *TEXTS[20:60]]
    content = token_cache(with_packed_training(published, packed(tmp_path, documents, TOKENIZER, length)), tmp_path / "cache", Stop())
    ids = np.concatenate(Tokens(content / "tokens" / "train").documents())
    assert ids.tolist() == [token for text in TEXTS[:60] for token in TOKENIZER.encode(text).ids]
    assert read_json(content / "counts.json")["train"]["duplicates"] == copies


def test_ids_of_another_tokenizer_are_refused(published: Experiment, tmp_path: Path) -> None:
    other = train_tokenizer(iter(["".join(reversed(text)) for text in TEXTS]), 300)
    config = with_packed_training(published, packed(tmp_path, TEXTS[:60], other, 97))
    with pytest.raises(InputError, match=r"found token_ids of which \d+ of 97 come back after decoding and encoding; expected those of"):
        token_cache(config, tmp_path / "cache", Stop())


HUB = "hf://datasets/some/pile"


def test_a_fallback_is_used_only_where_allowed_and_is_said(tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    plain = from_files(tmp_path, TEXTS[:60], TEXTS[60:100], TEXTS[100:])
    assert plain.data.files
    away = Files(train=(f"{HUB}/a.jsonl",), validation=(f"{HUB}/b.jsonl",), test=(f"{HUB}/c.jsonl",))
    config = plain.model_copy(update={"data": plain.data.model_copy(update={"files": away})})
    with pytest.raises(InputError, match=r"dataset some/pile@main: .*HF_HUB_OFFLINE.*data\.fallback can name other text"):
        token_cache(config, tmp_path / "cache", Stop())
    config = config.model_copy(update={"data": config.data.model_copy(update={"fallback": plain.data.files})})
    content = token_cache(config, tmp_path / "cache", Stop())
    assert texts_of(content)["train"] == TEXTS[:60]
    said = capsys.readouterr().out
    assert "WARNING: the configured text cannot be had: dataset some/pile@main" in said
    assert f"WARNING: data.fallback is read instead: {tmp_path / 'train.jsonl'}" in said
    assert "HF_HUB_OFFLINE" in read_json(content / "source.json")["fallback_because"]
    assert token_cache(plain, tmp_path / "other", Stop()) != content
    assert read_json(token_cache(plain, tmp_path / "other", Stop()) / "source.json")["fallback_because"] is None
