"""verify_downloads.py against a hub on loopback: all is well, and each thing that can be missing turns its line to `no`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from configs.presets import load
from configs.schema import Scratch
from tests.fake_stages import ROOT, TINY
from tests.hub_server import Hub
from utils.data.tokenizer import save_tokenizer, train_tokenizer
from utils.models.loading import save_model, scratch_model
from utils.run import patience
from utils.run.hub import of_entry
from verify_downloads import main

STUDY = load("pythia-1.4b")
assert STUDY.data.files
PILE = of_entry(STUDY.data.files.test[0])[0]
NAMES = [
    *("cache folder", "network", "hub", "token", "disk", "model files", "tokenizer", "sequences"),
    *("architecture", "text files", "first rows", "fallback", "benchmarks", "offline use", "small model"),
]
TEXT = "def Monotone(x):\n    return x  # größer, 漢字"
ROWS = zstandard.compress(b'{"text": "a row", "meta": {"pile_set_name": "Pile-CC"}}\n' * 3)
C4 = {split: [f"hf://datasets/allenai/c4/en/{split}.json.gz"] for split in ("train", "validation", "test")}
FALLBACK = ("--set", f"data.fallback={json.dumps(C4)}")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a published model of the smallest kind."""
    folder = tmp_path_factory.mktemp("model")
    shape = load(TINY, ["model.scratch.vocabulary=300", "model.scratch.context=2048"]).model.scratch
    assert isinstance(shape, Scratch)
    save_model(scratch_model(shape, end_of_text=0), folder)
    save_tokenizer(train_tokenizer(iter([TEXT]), 300), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def study(hub: Hub, model_folder: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]) -> Hub:
    """A hub that holds all that the study asks for, and a disk with room for it."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(patience, "WAITS", ())
    free(1000)
    hub.add("model", STUDY.model.name, model_folder, commit=STUDY.model.revision)
    hub.add("model", "EleutherAI/pythia-14m", model_folder)
    hub.add("dataset", PILE.name, dict.fromkeys(("train/00.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"), ROWS), commit=PILE.revision)
    return hub


def verdicts(said: str) -> dict[str, str]:
    """{name: verdict} of the table at the end."""
    rows = said[said.index("check  ") :].splitlines()[1:]
    return {row[: len("cache folder")].strip(): row[len("cache folder") :].split()[0] for row in rows[: len(NAMES)]}


def look(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, str], str]:
    """Without benchmarks, which test_benchmarks.py fetches: their reader goes its own way to the hub."""
    code = main(["--set", "evaluate.benchmarks=[]", *options])
    said = capsys.readouterr()
    return code, verdicts(said.out), said.out + said.err


def test_quick_on_a_good_network(study: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = look(capsys)
    assert code == 0 and list(found) == NAMES
    assert found == dict.fromkeys(NAMES, "ok") | {"fallback": "skip", "benchmarks": "skip", "offline use": "warn"}
    assert f"{STUDY.model.name} at {STUDY.model.revision[:12]}: " in said
    assert "subset of the first row train: Pile-CC, validation: Pile-CC, test: Pile-CC" in said
    assert said.rstrip().endswith("setup can get what it needs: bash run_all.sh --config pythia-1.4b")
    fetched = {request.path.rsplit("/", 1)[-1] for request in study.requests if request.method == "GET" and request.status == 200}
    assert "model.safetensors" in fetched  # of the small model, not of the study's
    assert len([request for request in study.requests if request.path.endswith("model.safetensors") and request.method == "GET"]) <= 2


def test_full_then_offline(study: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = look(capsys, "--offline")
    assert code == 1 and found["offline use"] == found["model files"] == found["text files"] == "no"
    assert "fetch it where there is a network" in said
    code, found, said = look(capsys, "--full", *FALLBACK)
    assert code == 0 and found["offline use"] == "ok" and found["fallback"] == "warn", said
    assert "allenai/c4@main: the hub has no such repository" in said
    study.down()
    code, found, said = look(capsys, "--offline")
    skipped = dict.fromkeys(("network", "hub", "token", "fallback", "benchmarks"), "skip")
    assert (code, found) == (0, dict.fromkeys(NAMES, "ok") | skipped), said
    assert "all here with the hub's hashes" in said


def test_offline_finds_a_damaged_file(study: Hub, own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(capsys, "--full")[0] == 0
    blobs = own_folders / "scratch/foundation_llm_cache/hub/models--EleutherAI--pythia-1.4b/blobs"
    largest = max(blobs.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, found, said = look(capsys, "--offline")
    assert code == 1 and found["model files"] == "no"
    assert "model.safetensors differs from the hub's SHA-256 (1 of " in said


def test_offline_names_what_was_taken_away(study: Hub, own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(capsys, "--full")[0] == 0
    cache = own_folders / "scratch/foundation_llm_cache/hub"
    (cache / f"datasets--monology--pile-uncopyrighted/snapshots/{PILE.revision}/train/00.jsonl.zst").unlink()
    (cache / f"models--EleutherAI--pythia-1.4b/snapshots/{STUDY.model.revision}/tokenizer.json").unlink()
    code, found, said = look(capsys, "--offline")
    assert code == 1 and all(found[name] == "no" for name in ("text files", "first rows", "tokenizer", "model files", "offline use"))
    assert "train/00.jsonl.zst is missing (1 of 3 files)" in said and "tokenizer.json is missing" in said
    assert f"train/00.jsonl.zst of dataset {PILE.name}@{PILE.revision} is not on this machine" in said


def unlike(files: dict[str, bytes], **changes: bytes | None) -> dict[str, bytes]:
    merged: dict[str, bytes | None] = {**files, **{name.replace("__", "."): content for name, content in changes.items()}}
    return {name: content for name, content in merged.items() if content is not None}


Plant = Callable[[Hub, dict[str, bytes], pytest.MonkeyPatch], object]
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode()


def republish(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("model", STUDY.model.name, files, commit=STUDY.model.revision)


def retext(hub: Hub, **files: bytes) -> None:
    named = dict.fromkeys(("train/00.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"), ROWS)
    hub.add("dataset", PILE.name, named | {name.replace("__", "."): data for name, data in files.items()}, commit=PILE.revision)


def switch_off(hub: Hub, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def break_tokenizer(hub: Hub, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> None:
    republish(hub, unlike(files, tokenizer__json=b"{}"))


def empty_row(hub: Hub, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> None:
    retext(hub, test__jsonl__zst=zstandard.compress(b'{"text": " "}\n'))


FAULTS: dict[str, tuple[str, str, Plant]] = {
    "hub down": ("hub", "the hub cannot be reached", lambda hub, files, patch: hub.down()),
    "network off": (
        "hub",
        "the network is switched off",
        switch_off,
    ),
    "bad token": (
        "token",
        "the hub does not accept the token",
        lambda hub, files, patch: patch.setenv("HF_TOKEN", "hf_bad_secret"),
    ),
    "gated": ("token", "it is gated; accept its terms", lambda hub, files, patch: hub.gate("model", STUDY.model.name)),
    "no weights": ("model files", "lacks *.safetensors", lambda hub, files, patch: republish(hub, unlike(files, model__safetensors=None))),
    "no configuration": ("model files", "lacks config.json", lambda hub, files, patch: republish(hub, unlike(files, config__json=None))),
    "a shard is missing": (
        "model files",
        "lacks model-00001-of-00002.safetensors (2 in all)",
        lambda hub, files, patch: republish(hub, files | {"model.safetensors.index.json": INDEX}),
    ),
    "broken tokenizer": (
        "tokenizer",
        "name a model whose tokenizer",
        break_tokenizer,
    ),
    "few positions": (
        "sequences",
        "data.sequence_length = 2048: expected at most 64, the longest sequence of the base model; lower it",
        lambda hub, files, patch: republish(hub, files | {"config.json": files["config.json"].replace(b": 2048", b": 64")}),
    ),
    "unknown architecture": (
        "architecture",
        "found architecture 'bloom', expected one of gemma",
        lambda hub, files, patch: republish(hub, files | {"config.json": b'{"model_type": "bloom", "hidden_size": 64}'}),
    ),
    "text removed": ("text files", "no such repository", lambda hub, files, patch: hub.remove("dataset", PILE.name)),
    "split not there": (
        "text files",
        "holds no file like val.jsonl.zst",
        lambda hub, files, patch: hub.add("dataset", PILE.name, {"train/00.jsonl.zst": ROWS, "test.jsonl.zst": ROWS}, commit=PILE.revision),
    ),
    "rows of another kind": (
        "first rows",
        'val.jsonl.zst, line 1: found \'{"body"',
        lambda hub, files, patch: retext(hub, val__jsonl__zst=zstandard.compress(b'{"body": "x"}\n')),
    ),
    "first row empty": (
        "first rows",
        "has no text",
        empty_row,
    ),
    "small model broken": (
        "small model",
        "cannot be loaded as a causal LM",
        lambda hub, files, patch: hub.add("model", "EleutherAI/pythia-14m", unlike(files, model__safetensors=b"broken")),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_a_no_with_the_cause(
    study: Hub, model_folder: dict[str, bytes], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, words, plant = FAULTS[fault]
    plant(study, model_folder, monkeypatch)
    code, found, said = look(capsys)
    assert code == 1 and found[name] == "no", said
    assert words in said and "secret" not in said
    assert "correct what is marked 'no' above, then run this again" in said


@pytest.mark.parametrize("harm", ["no end of text", "another text"])
def test_a_tokenizer_that_will_not_do(
    study: Hub, model_folder: dict[str, bytes], harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(iter([TEXT]), 300)
    if harm == "another text":
        tokenizer.normalizer = normalizers.Lowercase()
        save_tokenizer(tokenizer, tmp_path)
    else:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    republish(study, model_folder | {path.name: path.read_bytes() for path in tmp_path.glob("*.json")})
    code, found, said = look(capsys)
    assert code == 1 and found["tokenizer"] == "no"
    words = {"no end of text": "it has no end-of-text token", "another text": "a text that is encoded and decoded comes out as another one"}
    assert words[harm] in said


def test_a_full_disk_is_a_no(study: Hub, free: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    free(100)
    code, found, said = look(capsys)
    assert code == 1 and found["disk"] == "no" and "100 GB free" in said and "make room, or set paths.cache" in said


def test_a_cache_that_cannot_be_written_is_a_no(study: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, found, said = look(capsys, "--set", f"paths.cache={tmp_path / 'file'}")
    assert code == 1 and found["cache folder"] == "no" and "cannot be written" in said


def test_what_asks_the_hub_is_skipped_once_it_does_not_answer(study: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    study.down()
    code, found, _ = look(capsys)
    assert code == 1 and found["network"] == "warn" and found["hub"] == "no"
    assert all(found[name] == "skip" for name in ("token", "disk", "model files", "tokenizer", "text files", "first rows", "small model"))


def test_parquet_rows_are_left_to_full(study: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet.write_table(pyarrow.table({"text": ["a row"] * 3}), tmp_path / "a.parquet")
    study.add("dataset", "EleutherAI/the_pile_deduplicated", {"data/train-00000.parquet": (tmp_path / "a.parquet").read_bytes()})
    parted = ("--set", "data.files.train=[hf://datasets/EleutherAI/the_pile_deduplicated/data/*.parquet]")
    code, _, said = look(capsys, *parted)
    assert code == 0 and "not looked at: train (Parquet, --full)" in said
    code, _, said = look(capsys, "--full", *parted)
    assert code == 0 and "train: unknown, validation: Pile-CC" in said


def test_only_parquet(study: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.add("dataset", "some/tables", {f"{name}.parquet": b"never read" for name in ("a", "b", "c")})
    entries = [
        *("--set", "data.files.train=[hf://datasets/some/tables/a.parquet]"),
        *(
            "--set",
            "data.files.validation=[hf://datasets/some/tables/b.parquet]",
            "--set",
            "data.files.test=[hf://datasets/some/tables/c.parquet]",
        ),
    ]
    code, found, said = look(capsys, *entries)
    assert code == 0 and found["first rows"] == "skip" and "Parquet files are read whole: --full" in said


def test_local_text_and_a_fallback_that_lacks_a_split(study: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(ROWS)
    study.add("dataset", "allenai/c4", {"en/train.json.gz": b"", "en/test.json.gz": b""})
    files = {name: [str(tmp_path / f"{name}.jsonl.zst")] for name in ("train", "validation", "test")}
    code, found, said = look(capsys, "--set", f"data.files={json.dumps(files)}", *FALLBACK)
    assert code == 0 and found["text files"] == found["first rows"] == "ok"
    assert found["fallback"] == "warn" and "holds no file like en/validation.json.gz" in said


def test_a_small_model_that_computes_nonsense(study: Hub, model_folder: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_weights(model_folder["model.safetensors"]).items()}
    study.add("model", "EleutherAI/pythia-14m", model_folder | {"model.safetensors": save_weights(weights, metadata={"format": "pt"})})
    code, found, said = look(capsys)
    assert code == 1 and found["small model"] == "no" and "EleutherAI/pythia-14m computes the loss nan" in said


def test_interrupted_by_hand(study: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(look: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("verify_downloads.download_checks", interrupt)
    assert main([]) == 130


def test_an_experiment_without_the_hub(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found, _ = look(capsys, "--config", "mini")
    assert code == 0 and set(found.values()) == {"ok", "skip"} and found["hub"] == found["small model"] == "skip"
    (tmp_path / "config.json").touch()
    folder = f"model={{source: pretrained, name: {tmp_path}, scratch: null}}"
    code, found, said = look(capsys, "--config", TINY, "--set", folder)
    assert code == 1 and found["model files"] == "no" and "lacks *.safetensors; complete it" in said


def test_a_wrong_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "pithya"]) == 2
    assert "no preset 'pithya'" in capsys.readouterr().err


def test_as_a_user_types_it(study: Hub, tmp_path: Path) -> None:
    environment = os.environ | study.environment | {"SCRATCH": str(tmp_path)}
    command = [sys.executable, "verify_downloads.py", "--offline", "--set", "evaluate.benchmarks=[]"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no    model files: model EleutherAI/pythia-1.4b@fedc38a16eea3bd36a96b906d78d11d2ce18ed79 was not fetched before" in done.stderr
