"""Everything that reads a file which nothing vouches for: inputs that are right, and what is done with an input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import pyarrow
import zstandard
from pyarrow import parquet

from configs.presets import CLUSTERS, PRESETS, load, load_cluster
from stages.pipeline import stages
from tests.builders import small_model, token_folder
from tests.fake_slurm import FakeSlurm, interrupt, make_chain, small_checkout
from tests.fake_stages import NUMBERS, SQUARES, SQUARES_OF_42, TINY, StopAt, folder_of, run
from tests.faults.confined import Look
from tests.faults.mutation import Kind
from tests.test_checkpoint import saved
from utils.attacks.flip_records import Stored as Flips
from utils.attacks.hotflip import Attack
from utils.attacks.uat import SearchState
from utils.data.attack_texts import read_attack_texts
from utils.data.formats import items
from utils.data.shards import Shards
from utils.data.tokenizer import load_tokenizer, train_tokenizer
from utils.data.tokens import Tokens
from utils.models.loading import load_model, save_model
from utils.run import hub
from utils.run.artifacts import SEAL, left_behind, read_json, value_digest
from utils.run.cache import cached
from utils.run.errors import DONE, REFUSED
from utils.run.folders import Folders
from utils.run.preemption import Stop
from utils.run.records import Records, json_line
from utils.slurm import client, job
from utils.slurm.status import report
from utils.training.checkpoint import Checkpoints

ROWS = [{"text": f"text {number} ü", "meta": {"pile_set_name": "Wiki"}} for number in range(5)]


@dataclass(frozen=True)
class Reader:
    """`named`: what a refusal has to name; `share`: of the campaign's inputs, where a look takes long."""

    name: str
    kind: Kind
    valid: list[bytes]
    look: Look
    named: str = ""
    share: float = 1.0


def readers(folder: Path) -> list[Reader]:
    """All of them, with their files below `folder`, which becomes $SCRATCH and $PROJECT too."""
    os.environ |= {"SCRATCH": str(folder / "scratch"), "PROJECT": str(folder / "project")}
    return [
        *_configurations(folder),
        *_texts(folder),
        *_marks(folder),
        *_states(folder),
        *_tokens(folder),
        *_models(folder),
        *_queue(folder),
    ]


def _of_file(
    name: str, kind: Kind, valid: list[bytes], path: Path, look: Callable[[Path], object], share: float = 1.0, sealed: bool = False
) -> Reader:
    """With `sealed` what was changed gets the checksums that it needs to be looked at."""

    def put(given: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_sealed(given, kind) if sealed else given)
        return look(path)

    return Reader(name, kind, valid, put, path.name, share)


def _sealed(given: bytes, kind: Kind) -> bytes:
    if kind == "lines":
        return b"".join(line + b"\t%08x\n" % crc32(line) for line in given.splitlines())
    try:
        value = json.loads(given)
        return json.dumps(value | {SEAL: value_digest(value)}).encode() if isinstance(value, dict) else given
    except (ValueError, RecursionError):
        return given


def _unsealed(path: Path) -> bytes:
    return json.dumps({key: part for key, part in json.loads(path.read_bytes()).items() if key != SEAL}).encode()


def _configurations(folder: Path) -> list[Reader]:
    presets = [Path(TINY).read_bytes(), (PRESETS / "mini.yaml").read_bytes(), b"extends: mini\ntraining: {steps: 3}\n"]
    sites = [path.read_bytes() for path in CLUSTERS.glob("*.yaml")]
    given = [b"training.steps=5", b"seeds=[1, 2]", b"model.name=a", b"paths.work=/tmp/a", b"run_name='a'", b"uat.race_share=1e-3"]

    def preset(path: Path) -> None:
        config = load(str(path))
        Folders.of(config.paths, config.run_name)

    def override(text: bytes) -> None:
        config = load(TINY, [text.decode(errors="surrogateescape")])
        Folders.of(config.paths, config.run_name)

    return [
        _of_file("preset", "yaml", presets, folder / "own.yaml", preset),
        _of_file("site", "yaml", sites, folder / "site.yaml", lambda path: load_cluster(str(path)).options("uat", True)),
        Reader("--set", "bytes", given, override),
    ]


def _texts(folder: Path) -> list[Reader]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = folder / "right.parquet"
    parquet.write_table(pyarrow.table({"text": [row["text"] for row in ROWS], "meta": [row["meta"] for row in ROWS]}), table)
    ids = folder / "ids.parquet"
    parquet.write_table(pyarrow.table({"token_ids": [[5, 6, 0, 7]]}), ids)

    def all_items(path: Path) -> list[str]:
        return [item.text.encode().decode() + item.subset.encode().decode() for item in items(path)]

    def packed(given: bytes) -> object:
        (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(given))
        return all_items(folder / "rows.jsonl.zst")

    return [
        _of_file("text: JSON lines", "lines", [lines], folder / "rows.jsonl", all_items),
        Reader("text: JSON lines in zstandard", "lines", [lines], packed, "rows.jsonl.zst"),
        _of_file("text: zstandard", "bytes", [zstandard.compress(lines), zstandard.compress(lines) * 2], folder / "a.jsonl.zst", all_items),
        _of_file("text: gzip", "bytes", [gzip.compress(lines)], folder / "a.jsonl.gz", all_items),
        _of_file("text: Parquet", "bytes", [table.read_bytes(), ids.read_bytes()], folder / "a.parquet", all_items, 0.5),
        _of_file("text: plain", "bytes", [lines], folder / "a.txt", all_items, 0.2),
    ]


def _marks(folder: Path) -> list[Reader]:
    """The marks of a stage: whatever one says, the next start answers with an exit code."""
    assert run(NUMBERS) == 0
    assert run(SQUARES, stop=StopAt(3)) == 75
    whole, made = folder_of(NUMBERS, folder), folder_of(SQUARES, folder)
    for each in (whole, made):
        shutil.copytree(each, folder / "kept" / each.name)

    def begun(path: Path) -> None:
        given = path.read_bytes()
        for each in (whole, made):
            shutil.rmtree(each)
            shutil.copytree(folder / "kept" / each.name, each)
        path.write_bytes(given)
        codes = {run(NUMBERS), run(SQUARES)}
        assert codes <= {DONE, REFUSED}, codes
        assert codes != {DONE} or read_json(made / "squares.json") == SQUARES_OF_42

    return [
        _of_file(f"mark: {path.name}", "json", [_unsealed(path)], path, begun, 0.5, sealed=True)
        for path in (whole / "manifest.json", made / "started.json")
    ]


def _states(folder: Path) -> list[Reader]:
    """What lies in the folder of a stage at work, and what others look at meanwhile."""
    rows = [{"text": number, "nll": 1.5} for number in range(6)]
    lines = "".join(map(json_line, rows)).encode()
    saved(folder / "checkpoints", {4: 4, 8: 4})
    step = folder / "checkpoints" / "step_00000008"
    shutil.copytree(folder / "checkpoints", folder / "checkpoints kept")
    entry = cached(folder, "thing", {}, lambda target, state: (target / "a").write_text("a") and None, Stop()).parent
    flips = asdict(Flips(1, [Attack([1.0, 2.0], [{"position": 1, "old": 2, "new": 3}])]))
    search = asdict(SearchState(0, beam=[{"trigger": [1, 2], "objective": 1.0}], by_sweep=[1.0]))

    def records(path: Path) -> None:
        there = Records(path)
        list(there.pending([rows[:2], rows[2:4], rows[4:]]))
        there.rows()

    def checkpoints(path: Path) -> None:
        given = path.read_bytes()
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(folder / "checkpoints kept", folder / "checkpoints")
        path.write_bytes(given)
        there = Checkpoints(folder / "checkpoints", 2)
        there.glimpse()
        assert there.newest() is not None

    def flips_of(path: Path) -> object:
        return left_behind(path, Flips)

    def search_of(path: Path) -> object:
        return SearchState.stored(path, 0)

    def cache(path: Path) -> None:
        cached(folder, "thing", {}, lambda target, state: (target / "a").write_text("a") and None, Stop())

    return [
        _of_file("records", "lines", [lines], folder / "records.jsonl", records, sealed=True),
        _of_file("checkpoint: manifest", "json", [(step / "manifest.json").read_bytes()], step / "manifest.json", checkpoints, 0.5),
        _of_file("checkpoint: state", "json", [(step / "state.json").read_bytes()], step / "state.json", checkpoints, 0.5),
        _of_file("cache: manifest", "json", [(entry / "manifest.json").read_bytes()], entry / "manifest.json", cache, 0.5),
        _of_file("flips under way", "json", [json.dumps(flips).encode()], folder / "flips.json", flips_of, sealed=True),
        _of_file("trigger search", "json", [json.dumps(search).encode()], folder / "uat.json", search_of, sealed=True),
    ]


def _tokens(folder: Path) -> list[Reader]:
    split = folder / "split"
    token_folder(split, [[3, 4], [5], [6, 7, 8]])
    shutil.copytree(split, folder / "split kept")
    index = split / "index.json"
    texts = {
        "alphabet": {"end_of_text": 0, "entries": 9, "special": [0]},
        "sets": {"report": [{"id": "attack-0", "subset": "Wiki", "ids": [1, 2]}]},
    }

    def taken_up(path: Path) -> None:
        given = path.read_bytes()
        shutil.rmtree(split)
        shutil.copytree(folder / "split kept", split)
        path.write_bytes(given)
        Shards(split, 97, 0)
        Tokens(split).documents()

    words = train_tokenizer(iter(["a few words", "and more of them"]), 300).to_str().encode()
    return [
        _of_file("tokens: index", "json", [_unsealed(index)], index, taken_up, sealed=True),
        _of_file("attack texts", "json", [json.dumps(texts).encode()], folder / "attack_texts.json", read_attack_texts),
        _of_file("tokenizer", "json", [words], folder / "words" / "tokenizer.json", lambda path: load_tokenizer(path.parent), 0.2),
    ]


def _models(folder: Path) -> list[Reader]:
    """What somebody else made: a model's folder."""
    found = []
    for name, kind, file in (("configuration", "json", "config.json"), ("weights", "bytes", "model.safetensors")):
        path = folder / name / file
        save_model(small_model(), path.parent)
        found.append(_of_file(f"model: {name}", kind, [path.read_bytes()], path, lambda path: load_model(path.parent), 0.1))
    return [replace(reader, named="model") for reader in found]


def _queue(folder: Path) -> list[Reader]:
    """What a run on a cluster keeps for itself, what SLURM tells a job, and what the hub said of a repository."""
    chain = make_chain(small_checkout(folder / "checkout"))
    interrupt(chain, 0, 42, 5)
    progress = stages()[0].folder(chain.folders, 42) / "state" / "progress.json"
    chain.note(stages()[0], "17", [42], [], by="hand")
    entry = {"size": 3, "sha256": None, "sha1": "a" * 40}
    listed = folder / "hub" / "listings" / "datasets--owner--name@main.json"
    told = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_END_TIME": "1800000000", "JOB_RESTARTS": "2"}
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0"}

    jobs = chain.record.read_bytes()

    def shown(path: Path) -> None:
        if path != chain.record:
            chain.record.write_bytes(jobs)
        with patch.object(client, "call", FakeSlurm()):
            report(chain)
            chain.position(stages()[0], [42])

    def inside(given: bytes) -> None:
        chain.record.write_bytes(jobs)
        for name in told | array:
            os.environ.pop(name, None)
        try:
            os.environ |= {name: value for name, value in json.loads(given).items() if name in told | array}
        except (ValueError, AttributeError, TypeError, OSError, RecursionError):
            return  # no environment can hold it
        with patch.object(client, "call", FakeSlurm()) as slurm, patch.object(job, "PATIENCE", 0.0):
            slurm.add(job.own_id(), "job_0_setup", "RUNNING")
            Stop()
            seeds = job.own_seeds(chain, stages()[0])
            job.arrive(chain, stages()[0], seeds)
            job.leave(chain, stages()[0], seeds)

    def known(path: Path) -> None:
        hub.is_here(hub.Repository("dataset", "owner/name"), ["*.jsonl"], folder)

    files = {"a.jsonl": entry, "b/c.jsonl": entry}
    return [
        _of_file("jobs submitted", "json", [jobs], chain.record, shown, 0.5),
        _of_file("progress", "json", [progress.read_bytes()], progress, shown, 0.5),
        Reader("what SLURM tells a job", "json", [json.dumps(each).encode() for each in (told, told | array)], inside, "environment", 0.5),
        _of_file("hub: listing", "json", [json.dumps({"commit": "b" * 40, "files": files}).encode()], listed, known),
    ]
