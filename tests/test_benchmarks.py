"""Benchmarks through the harness, offline, on tasks made here: against likelihoods by hand, resumed, and refused before any work."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from huggingface_hub import constants
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from configs.presets import ConfigError, load
from configs.schema import Experiment, Monotone
from stages.pipeline import run_each, stages
from stages.stage_4_evaluate import MODELS
from tests.fake_stages import ROOT, TINY
from tests.hub_server import Hub
from utils.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from utils.evaluation.benchmarks import benchmark_stored, fetch_benchmarks
from utils.models.convert import convert
from utils.models.loading import load_model, save_model, scratch_model
from utils.run.artifacts import read_sealed, write_sealed
from utils.run.checks import examined
from utils.run.errors import InputError, StoppedInTime
from utils.run.folders import Folders
from utils.run.preemption import Stop
from utils.verify.benchmarks import benchmarks
from utils.verify.look import Look

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
QUESTIONS = [("the sum of one", ["and one", "or two and three", "x"], 0), ("a b a", ["b", "a", "the the"], 1), ("def f", ["(x):", "is"], 1)]
SENTENCES = ["one and two and three", "the sum of the two", "a b a b a b a"]


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of this test's own, and no hub."""
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield tmp_path / "cache"


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    rows = [{"question": question, "choices": given, "gold": gold} for question, given, gold in QUESTIONS]
    return task_file(
        tmp_path,
        "own_choices",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_target="{{gold}}",
        doc_to_choice="{{choices}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )


@pytest.fixture
def words(tmp_path: Path) -> Path:
    rows = [{"text": text} for text in SENTENCES]
    return task_file(
        tmp_path,
        "own_words",
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )


def task_file(folder: Path, name: str, rows: list[dict], **settings: object) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task | settings | {"metadata": {"version": 1.0}}))
    return path


@pytest.fixture
def models(tmp_path: Path, tiny: Experiment) -> dict[str, Path]:
    """A base model, its conversion and a converted gated model, with the tokenizer beside them."""
    tokenizer = train_tokenizer(iter([*SENTENCES, *(f"{q} {' '.join(c)}" for q, c, _ in QUESTIONS)]), 300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    base = scratch_model(tiny.model.scratch.model_copy(update={"vocabulary": 300}), 0)
    with torch.no_grad():
        for number, parameter in enumerate(base.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    save_model(base, tmp_path / "base")
    save_model(convert(base, Monotone.model_validate({"scope": "mlp_both"}), torch.arange(1, 40)[None])[0], tmp_path / "converted")
    gated = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=0)
    settings = {"scope": "gated_all", "activation": "drelu", "recentre": False}
    rectified = convert(AutoModelForCausalLM.from_config(gated), Monotone.model_validate(settings), torch.arange(1, 40)[None])[0]
    save_model(rectified, tmp_path / "gated")
    return {name: tmp_path / name for name in ("base", "converted", "gated")}


def run(config: Experiment, models: dict[str, Path], root: Path, cache: Path, stop: Stop | None = None) -> tuple[dict, list[dict]]:
    found = benchmark_stored(
        config,
        models=models,
        tokenizer=models["base"].parent / "tokenizer",
        cache=cache,
        state=root / "state",
        records=root / "records.jsonl",
        stop=stop or Stop(),
    )
    return found, [json.loads(line) for line in (root / "records.jsonl").read_text().splitlines()]


def configured(*benchmarks: Path | str, **settings: object) -> Experiment:
    chosen = [f"evaluate.benchmarks=[{','.join(map(str, benchmarks))}]", *(f"evaluate.{k}={v}" for k, v in settings.items())]
    return load(TINY, chosen)


@torch.no_grad()
def likelihood(model: PreTrainedModel, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Nats of the continuation's tokens behind the context, and whether each of them is the likeliest."""
    prefix, whole = tokenizer.encode(context).ids, tokenizer.encode(context + continuation).ids
    scores = model(torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
    places = range(len(prefix), len(whole))
    return sum(float(scores[at - 1, whole[at]]) for at in places), all(int(scores[at - 1].argmax()) == whole[at] for at in places)


def test_items_equal_likelihoods_by_hand(own_cache: Path, models: dict[str, Path], choices: Path, words: Path, tmp_path: Path) -> None:
    found, rows = run(configured(choices, words), models, tmp_path, own_cache)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(rows) == 3 * 2 * (len(QUESTIONS) + len(SENTENCES))
    for label, folder in models.items():
        model, values = load_model(folder), {}
        for row in rows:
            if row["model"] == label:
                values[row["task"], row["metric"], row["item"]] = row["value"]
        for item, (question, given, gold) in enumerate(QUESTIONS):
            nats = [likelihood(model, tokenizer, question, f" {choice}")[0] for choice in given]
            assert values["own_choices", "acc", item] == (max(nats) == nats[gold])
            normed = [one / len(choice) for one, choice in zip(nats, given, strict=True)]
            assert values["own_choices", "acc_norm", item] == (max(normed) == normed[gold])
        lasts = [text.rpartition(" ")[::2] for text in SENTENCES]
        nats, hits = zip(*(likelihood(model, tokenizer, first, f" {last}") for first, last in lasts), strict=True)
        assert [values["own_words", "perplexity", item] for item in range(3)] == pytest.approx(nats, rel=1e-4)
        assert [values["own_words", "acc", item] for item in range(3)] == list(hits)
        summary = found["models"][label]
        assert summary["own_words"]["perplexity"]["value"] == pytest.approx(math.exp(-sum(nats) / 3), rel=1e-4)
        assert summary["own_words"]["perplexity"]["mean"] == pytest.approx(sum(nats) / 3, rel=1e-4)
        hit = [values["own_choices", "acc", item] for item in range(3)]
        assert summary["own_choices"]["acc"]["value"] == summary["own_choices"]["acc"]["mean"] == pytest.approx(sum(hit) / 3)
        assert summary["own_choices"]["acc"]["items"] == 3
    first, second, _ = ([row for row in rows if row["model"] == label] for label in models)
    assert [(row["task"], row["item"], row["hash"]) for row in first] == [(row["task"], row["item"], row["hash"]) for row in second]
    assert len({row["hash"] for row in rows}) == len(QUESTIONS) + len(SENTENCES)
    assert [row["value"] for row in first] != [row["value"] for row in second]  # the conversion changed the function
    assert found["tasks"]["own_words"] == {"version": 1.0, "dataset": "json", "name": None, "items": 3}
    assert found["shots"] == 0 and found["harness"].startswith("lm_eval ")


def test_a_limit_takes_the_first_items(own_cache: Path, models: dict[str, Path], words: Path, tmp_path: Path) -> None:
    found, rows = run(configured(words, benchmark_limit=2), models, tmp_path, own_cache)
    assert {row["item"] for row in rows} == {0, 1} and found["limit"] == 2


def test_what_is_done_is_not_done_again(own_cache: Path, models: dict[str, Path], choices: Path, words: Path, tmp_path: Path) -> None:
    """Stopped between two batches: whole pieces are kept, and the end is the same."""
    config = configured(choices, words, batch_size=2)

    class After(Stop):
        calls, most = 0, 9

        def check(self) -> None:
            self.calls += 1
            if self.calls > self.most:
                raise StoppedInTime("the test")

    straight = run(config, models, tmp_path / "straight", own_cache)
    with pytest.raises(StoppedInTime):
        run(config, models, tmp_path / "resumed", own_cache, After())
    kept = sorted((tmp_path / "resumed/state").iterdir())
    assert 0 < len(kept) < 6
    before = [path.stat().st_mtime_ns for path in kept]
    assert run(config, models, tmp_path / "resumed", own_cache) == straight
    assert [path.stat().st_mtime_ns for path in kept] == before
    stored = read_sealed(kept[0])
    stored["rows"][0]["hash"] = "of another item"
    write_sealed(kept[0], stored)
    with pytest.raises(InputError, match=r"the items of '.*' changed between 'base' and 'converted'"):
        run(config, models, tmp_path / "resumed", own_cache)


def test_bf16_moves_likelihoods_a_little(own_cache: Path, models: dict[str, Path], words: Path, tmp_path: Path) -> None:
    """Products in bf16, the softmax in fp32: a likelihood that bf16 had rounded would be a number of bf16."""
    exact, rough = (
        [
            row["value"]
            for row in run(load(TINY, [f"evaluate.benchmarks=[{words}]", f"compute.precision={how}"]), models, tmp_path / how, own_cache)[1]
        ]
        for how in ("fp32", "bf16")
    )
    nats = torch.tensor(rough)
    assert exact != rough == pytest.approx(exact, abs=0.2)
    assert not torch.equal(nats, nats.bfloat16().float())


def test_what_cannot_be_had_is_refused_with_the_way_out(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder of the harness's tasks stands for all: thousands of files are read at every look at them."""
    from lm_eval.tasks import manager

    from utils.evaluation import harness

    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "lambada" / "any"))
    monkeypatch.setattr(harness, "_manager", harness._manager.__wrapped__)  # nothing of this stays for others
    for name, words in [
        ("lambada_openay", r"found 'lambada_openay', expected a task of lm_eval .*, or a YAML file"),
        ("nowhere.yaml", r"found 'nowhere.yaml', expected an existing file"),
        ("lambada_openai", r"the items of 'lambada_openai' cannot be had .*verify_downloads.py --full"),
    ]:
        with pytest.raises(InputError, match=words):
            fetch_benchmarks(configured(name), own_cache)
    assert fetch_benchmarks(configured(), own_cache) is None


def test_benchmarks_without_the_harness_are_refused_by_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.schema.find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(ConfigError, match=r"pip install 'lm_eval\[hf\]'; or benchmarks=\[\]"):
        configured("piqa")
    assert configured().evaluate.benchmarks == ()
    with pytest.raises(ConfigError, match="names a task twice"):
        load(TINY, ["evaluate.benchmarks=[piqa,piqa]"])


def test_items_come_from_the_hub_once(own_cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Setup or verify_downloads fetches them to the run's cache; afterwards nothing is asked of the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
    hub.add("dataset", "org/items", {"test.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES).encode()})
    settings = {"doc_to_text": "{{text}}", "doc_to_target": " and", "metric_list": [{"metric": "acc"}]}
    path = task_file(tmp_path, "hubbed", [], output_type="loglikelihood", dataset_path="org/items", dataset_kwargs={}, **settings)

    def looked(mode: str, cache: Path) -> tuple[str, str]:
        config = configured(path)
        found = examined(
            "benchmarks", "", lambda: benchmarks(Look(config, replace(Folders.of(config.paths, "x"), cache=cache), mode, Stop()))
        )
        return found.verdict, found.words

    assert looked("quick", own_cache) == ("skip", "1 benchmarks; setup fetches their items, and so does --full")
    assert hub.requests == [] and looked("offline", own_cache)[0] == "no" and hub.requests == []
    assert looked("full", own_cache) == ("ok", "1 tasks, 3 items, all here")
    assert sorted(path.name for path in own_cache.iterdir()) == ["datasets", "hub"]
    hub.requests.clear()
    assert looked("offline", own_cache) == ("ok", "1 tasks, 3 items, all here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch_benchmarks(configured(path), own_cache)
    with pytest.raises(InputError, match=r"the items of .*hubbed.yaml' cannot be had"):
        fetch_benchmarks(configured(path), tmp_path / "another cache")
    assert hub.requests == []
    assert benchmarks(Look(configured(), Folders.of(configured().paths, "x"), "full", Stop()))[0] == "skip"


def test_without_benchmarks_the_harness_is_not_imported() -> None:
    """It takes seconds, and is nobody's need: one file imports it, and whoever needs that file does so when it is at work."""
    for path in ROOT.glob("utils/*/*.py"):
        loaded = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {name for node in loaded for name in (getattr(node, "module", None), *(one.name for one in node.names)) if name}
        assert path.name == "harness.py" or not any(name.startswith(("lm_eval", "utils.evaluation.harness")) for name in names), path


@pytest.mark.integration
def test_the_stages_run_a_benchmark_on_all_models(
    own_cache: Path, filled_cache: Path, choices: Path, stage_folder: Callable[[Path, int], Path]
) -> None:
    """Setup reads the items, stage 4 runs them on all four models, and the results hold what the report needs."""
    config = load(TINY, [f"evaluate.benchmarks=[{choices}]", "evaluate.generation_prompts=2"])
    assert run_each(stages()[:5], config, config.seeds, discard=False) == 0
    folder = stage_folder(filled_cache, 4)
    rows = [json.loads(line) for line in (folder / "benchmark_records.jsonl").read_text().splitlines()]
    assert {(row["model"], row["item"]) for row in rows} == {(name, item) for name in MODELS for item in range(len(QUESTIONS))}
    found = json.loads((folder / "evaluation_results.json").read_text())
    assert found["benchmarks"]["tasks"]["own_choices"]["items"] == len(QUESTIONS)
    assert found["generation"]["prompts"] == 2 and found["published_values"] == []
    assert len((folder / "generation_records.jsonl").read_text().splitlines()) == 2 * 5
