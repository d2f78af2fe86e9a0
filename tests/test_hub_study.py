"""A study whose model and text are on the hub: fetched by stage 0, and no network needed afterwards."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import load_file

from configs.presets import load
from configs.schema import Experiment, Paths
from stages.pipeline import run_each, stages
from tests.fake_stages import ROOT, TINY
from tests.hub_server import Hub
from utils.data import shards
from utils.data.tokenise import token_cache
from utils.data.tokenizer import save_tokenizer, train_tokenizer
from utils.models.loading import save_model, scratch_model
from utils.report.study import Study
from utils.report.summary import final_results, summary_text
from utils.run import patience
from utils.run.artifacts import inventory, read_json
from utils.run.errors import InputError, StoppedInTime
from utils.run.preemption import Stop
from utils.training.base import base_cache

WORDS = ("what", "a", "monotone", "layer", "maps", "larger", "inputs", "to", "is", "never", "smaller", "in", "any", "coordinate")
TEXTS = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 60)) + f" {number}" for number in range(400)]
PILE = "hf://datasets/monology/pile-uncopyrighted"
FILES = {"train": [f"{PILE}/train/*.jsonl.zst"], "validation": [f"{PILE}/val.jsonl.zst"], "test": [f"{PILE}/test.jsonl.zst"]}
LESS = ("uat.search_texts=2", "uat.select_texts=2", "uat.report_texts=2", "hotflip.texts=2", "training.steps=4", "data.train_tokens=4000")
MAY_UNSHARE = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0


def rows(texts: list[str]) -> bytes:
    return zstandard.compress("".join(json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}) + "\n" for text in texts).encode())


@pytest.fixture
def published(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Model and text on the hub, in the layout of the study; the experiment that names them."""
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(patience, "WAITS", ())
    folder = tmp_path / "published"
    shape = load(TINY, ["model.scratch.vocabulary=300"]).model.scratch
    assert shape
    save_model(scratch_model(shape, end_of_text=0), folder)
    save_tokenizer(train_tokenizer(iter(TEXTS), 300), folder)
    hub.add(
        "model", "EleutherAI/pythia-0m", {path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"a pickle"}
    )
    shutil.rmtree(folder)
    half = {"train/00.jsonl.zst": rows(TEXTS[:150]), "train/01.jsonl.zst": rows(TEXTS[150:280])}
    hub.add("dataset", "monology/pile-uncopyrighted", half | {"val.jsonl.zst": rows(TEXTS[280:360]), "test.jsonl.zst": rows(TEXTS[360:])})
    model = "model={source: pretrained, name: EleutherAI/pythia-0m, scratch: null}"
    return load(TINY, [model, "data.source=files", "data.embedded=null", f"data.files={json.dumps(FILES)}", *LESS])


def setup(config: Experiment, code: int = 0) -> None:
    assert run_each(stages()[:1], config, config.seeds, discard=False) == code


def test_setup_fetches_and_says_what(published: Experiment, hub: Hub, stage_folder: Callable[[Path, int], Path], own_folders: Path) -> None:
    setup(published)
    written = read_json(stage_folder(own_folders, 0) / "setup_complete.json")
    (commit,) = {origin["commit"] for origin in written["source"]["origins"].values()}
    assert len(commit) == 40 and written["base_model_origin"]["commit"] != commit
    assert written["source"]["files"]["train"] == FILES["train"]
    assert written["source"]["origins"][FILES["train"][0]]["train/01.jsonl.zst"]["bytes"] == len(rows(TEXTS[150:280]))
    assert written["source"]["fallback_because"] is None
    assert not any("pytorch_model.bin" in request.path and request.method == "GET" for request in hub.requests)
    assert (own_folders / "scratch/foundation_llm_cache/hub").is_dir(), "a home may have no room: files lie in the run's own cache"


def test_earlier_checkpoints_are_fetched_by_revision(
    published: Experiment, hub: Hub, stage_folder: Callable[[Path, int], Path], own_folders: Path, tmp_path: Path
) -> None:
    shape = load(TINY, ["model.scratch.vocabulary=300", "model.scratch.seed=5"]).model.scratch
    assert shape
    save_model(scratch_model(shape, end_of_text=0), tmp_path / "young")
    files = {path.name: path.read_bytes() for path in (tmp_path / "young").iterdir()}
    commit = hub.add("model", "EleutherAI/pythia-0m", files, branches=("refs/pr/1",))
    setup(published.model_copy(update={"model": published.model.model_copy(update={"earlier_revisions": ("refs/pr/1",)})}))
    folder = stage_folder(own_folders, 0)
    assert read_json(folder / "setup_complete.json")["base_model_origin"]["earlier_commits"] == {"refs/pr/1": commit}
    (name,) = read_json(folder / "earlier_models" / "index.json")["oldest_first"]
    stored = load_file(folder / "earlier_models" / name / "model.safetensors")
    assert all(torch.equal(stored[key], weight) for key, weight in load_file(tmp_path / "young" / "model.safetensors").items())
    (tmp_path / "young" / "tokenizer.json").write_bytes(b"{}")
    of_a_folder = published.model.model_copy(update={"name": str(tmp_path / "young"), "earlier_revisions": ("a",)})
    with pytest.raises(InputError, match="is a folder, which has no revisions"):
        base_cache(published.model_copy(update={"model": of_a_folder}), tmp_path / "cache", tmp_path, Stop())


def test_another_seed_asks_the_hub_for_nothing(published: Experiment, hub: Hub) -> None:
    setup(published)
    hub.requests.clear()
    hub.down()
    setup(published.model_copy(update={"seeds": (7,)}))
    assert hub.requests == []


@pytest.mark.integration
@pytest.mark.skipif(
    subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0, reason="no right to switch the network off"
)
def test_after_setup_the_network_may_be_switched_off(
    published: Experiment, own_folders: Path, stage_folder: Callable[[Path, int], Path]
) -> None:
    """Stages 1 to 7 in a process that has no network interface at all, not even loopback."""
    setup(published)
    (own_folders / "experiment.yaml").write_text(json.dumps(published.model_dump(mode="json")))
    command = [sys.executable, "-m", "stages", "run", "--config", str(own_folders / "experiment.yaml")]
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    done = subprocess.run(["unshare", "-n", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[stage 0 setup, seed 42] already complete" in done.stdout
    assert (stage_folder(own_folders, 7) / "experiment_summary.txt").is_file()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            lambda hub: hub.remove("dataset", "monology/pile-uncopyrighted"),
            "pile-uncopyrighted@main: the hub has no such repository",
        ),
        (lambda hub: hub.gate("model", "EleutherAI/pythia-0m"), "model EleutherAI/pythia-0m@main: it is gated; accept its terms"),
        (lambda hub: hub.down(), "the hub cannot be reached"),
        (lambda hub: hub.fail("*", 429), "asked too often from here (429)"),
    ],
    ids=["removed", "gated", "down", "429"],
)
def test_setup_refuses_with_the_cause(
    published: Experiment, hub: Hub, fault: Callable[[Hub], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault(hub)
    setup(published, code=2)
    assert words in capsys.readouterr().err


def cache_on(config: Experiment, place: Path) -> Experiment:
    return config.model_copy(update={"paths": Paths(cache=place)})


@pytest.mark.parametrize("small_disk", [200, 420], indirect=True)
@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_fills_up_is_one_message_and_leaves_nothing_half(
    published: Experiment, small_disk: Path, free: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a fetch, and after the fetches; the space that was counted before was taken by somebody else."""
    free(1000)
    setup(cache_on(published, small_disk), code=1)
    said = capsys.readouterr().err
    assert "No space left on device" in said and "make room or give access, or choose other folders" in said and "Traceback" not in said
    assert not list(small_disk.rglob("*.incomplete")) and not list(small_disk.glob("base-*/manifest.json"))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    setup(cache_on(published, small_disk))


def test_a_cache_that_is_read_only_is_one_message(published: Experiment, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    setup(cache_on(published, small_disk), code=1)
    said = capsys.readouterr().err
    assert f"cannot write or read {small_disk}" in said and "Read-only file system" in said and "Traceback" not in said


def test_fallback_is_said_in_the_results(
    published: Experiment,
    hub: Hub,
    own_folders: Path,
    stage_folder: Callable[[Path, int], Path],
    finished_records: dict[str, Path],
) -> None:
    """Setup's record says so, and the report of a run with that record."""
    c4 = {split: [f"hf://datasets/allenai/c4/en/{split}.json.gz"] for split in ("train", "validation", "test")}
    content = {"train": TEXTS[:280], "validation": TEXTS[280:360], "test": TEXTS[360:]}
    lines = {split: "".join(json.dumps({"text": text, "url": ""}) + "\n" for text in texts) for split, texts in content.items()}
    hub.add("dataset", "allenai/c4", {f"en/{split}.json.gz": gzip.compress(text.encode()) for split, text in lines.items()})
    hub.remove("dataset", "monology/pile-uncopyrighted")
    data = published.data.model_dump(mode="json") | {"fallback": c4}
    config = type(published).model_validate_json(json.dumps(published.model_dump(mode="json") | {"data": data}))
    setup(config)
    study = Study.load(config, {42: finished_records | {"setup": stage_folder(own_folders, 0) / "setup_complete.json"}})
    summary = summary_text(study)
    assert "FALLBACK TEXT was used (data.fallback), as the configured text could not be had: dataset monology/pile-uncopyrighted" in summary
    assert "no such repository" in final_results(study)["experiment_info"]["text"]["fallback_because"]


def test_no_socket_is_opened_after_setup(published: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    setup(published)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run_each(stages()[:2], published, published.seeds, discard=False) == 0


def with_fallback(config: Experiment, hub: Hub) -> Experiment:
    """The same experiment, which may read other text in place of its own."""
    rest = {"val.jsonl.zst": rows(TEXTS[280:360]), "test.jsonl.zst": rows(TEXTS[360:])}
    hub.add("dataset", "other/text", {"train.jsonl.zst": rows(TEXTS[:280])} | rest)
    names = {"train": "train", "validation": "val", "test": "test"}
    data = config.data.model_dump(mode="json") | {
        "fallback": {split: [f"hf://datasets/other/text/{name}.jsonl.zst"] for split, name in names.items()}
    }
    return Experiment.model_validate_json(json.dumps(config.model_dump(mode="json") | {"data": data}))


def test_a_model_that_cannot_be_had_is_no_reason_to_read_another_text(
    published: Experiment, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.gate("model", "EleutherAI/pythia-0m")
    setup(with_fallback(published, hub), code=2)
    said = capsys.readouterr()
    assert "pythia-0m@main: it is gated" in said.err
    assert "WARNING" not in said.out and not [request for request in hub.requests if "other/text" in request.path]


def test_shards_of_a_branch_that_has_moved_are_not_gone_on_with(published: Experiment, hub: Hub, tmp_path: Path) -> None:
    """Setup is stopped after the first shard; meanwhile the branch gets other text. Nothing of the old one may stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 200)
        with pytest.raises(StoppedInTime):
            token_cache(published, tmp_path / "cache", OnceAShardIsThere(tmp_path / "cache"))
        half = {"train/00.jsonl.zst": rows([text.upper() for text in TEXTS[:280]])}
        rest = {"val.jsonl.zst": rows(TEXTS[280:360][::-1]), "test.jsonl.zst": rows(TEXTS[360:][::-1])}
        hub.add("dataset", "monology/pile-uncopyrighted", half | rest)
        gone_on = token_cache(published, tmp_path / "cache", Stop())
        straight = token_cache(published, tmp_path / "other", Stop())
    assert inventory(gone_on) == inventory(straight)


class OnceAShardIsThere(Stop):
    """Asks to stop as soon as a shard is on the disk."""

    def __init__(self, cache: Path) -> None:
        super().__init__()
        self.cache = cache

    def check(self) -> None:
        if any(self.cache.glob("tokens-*/state/tokens/*/index.json")):
            self.reason = "the test says so"
        super().check()
