"""Files, names and texts that want to run something, leave something, or get something out of here."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from configs.presets import load, load_cluster
from configs.schema import Model
from tests.fake_stages import ROOT, TINY
from tests.faults.confined import one
from tests.faults.leavings import whole_run
from tests.faults.outcome import Outcome
from tests.faults.scan import scanned, sources
from tests.faults.shells import CANARY, canaries, names
from tests.faults.texts import WORDS
from tests.test_checkpoint import saved
from tests.tiny_models import random_model
from utils.data.lengths import refuse_longer
from utils.data.tokenizer import copy_tokenizer, save_tokenizer, train_tokenizer
from utils.models.loading import fetch_pretrained, load_model, save_model
from utils.run.artifacts import read_json
from utils.run.hub import Listing
from utils.run.lock import locked
from utils.run.preemption import Stop
from utils.training.checkpoint import Checkpoints

AMOUNT = 60  # hostile names for each place where a name goes; everything else is always looked at


class Touch:
    """A pickle that leaves the canary when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return (open, (str(self.canary), "w"))


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    for path in sources():
        found = scanned(path)
        yield Outcome(f"source {path.relative_to(ROOT)}", not found, "; ".join(found) or "calls nothing unsafe")
    for part in (pickles, remote_code, yaml_tags, links_and_paths):
        (folder / part.__name__).mkdir()
        yield from part(folder / part.__name__)
    (folder / "names").mkdir()
    yield from names(folder / "names", amount)
    (folder / "whole run").mkdir()
    yield from whole_run(folder / "whole run")


def harmless(name: str, folder: Path, look: Callable[[], object]) -> Outcome:
    """Refused or used; the canary is nowhere."""
    verdict = one(look, megabytes=4000, seconds=60.0)
    made = canaries(folder)
    return Outcome(
        name, not made and not verdict.fault, f"made {made[0]}" if made else verdict.fault or verdict.refused[:200] or "used, not run"
    )


def pickles(folder: Path) -> Iterator[Outcome]:
    """In every place where torch, numpy or transformers would know what to do with one."""
    hostile = pickle.dumps(Touch(folder / CANARY))
    assert not one(lambda: pickle.loads(hostile)).fault  # noqa: S301 - to see that it does what it is for
    (folder / CANARY).unlink()

    def model(file: str, without: bool) -> Callable[[], object]:
        place = folder / f"{file}-{without}"
        save_model(random_model(), place)
        if without:
            (place / "model.safetensors").unlink()
        (place / file).write_bytes(hostile)
        return lambda: load_model(place)

    for file in ("pytorch_model.bin", "model.safetensors", "adapter_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth"):
        yield harmless(f"pickle as {file}", folder, model(file, False))
        yield harmless(f"pickle as {file}, no other weights", folder, model(file, True))

    def checkpoint() -> None:
        saved(folder / "checkpoints", {4: 4})
        for file in (folder / "checkpoints" / "step_00000004").glob("*.safetensors"):
            file.write_bytes(hostile)
        assert Checkpoints(folder / "checkpoints", 2).newest() is None

    yield harmless("pickle as a checkpoint's tensors", folder, checkpoint)


def remote_code(folder: Path) -> Iterator[Outcome]:
    """A model's folder that brings its own Python: never run, and nobody is asked."""
    save_model(random_model(vocabulary=300), folder / "model")
    save_tokenizer(train_tokenizer(iter(WORDS * 9), 297), folder / "model")
    code = f"open({str(folder / CANARY)!r}, 'w')\nclass Evil: pass\n"
    (folder / "model" / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for file, kind in (
        ("config.json", {}),
        ("config.json", {"model_type": "evil"}),
        ("tokenizer_config.json", {}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}),
    ):
        path = folder / "model" / file
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"auto_map": auto} | kind))
        given = Model(source="pretrained", name=str(folder / "model"))
        source = folder / "model"
        for look in (
            partial(fetch_pretrained, given, folder, Stop()),
            partial(copy_tokenizer, given, source, folder),
            partial(refuse_longer, source, {}),
        ):
            yield harmless(f"code of its own in {file} {kind or ''}, {look.func.__name__}", folder, look)
        path.write_text(before)


def yaml_tags(folder: Path) -> Iterator[Outcome]:
    command = f"touch {folder / CANARY}"
    path = folder / "own.yaml"
    for tag in (
        "!!python/object/apply:os.system",
        "!!python/object/new:os.system",
        "!!python/name:os.system",
        "!!python/module:os",
        "!function",
    ):
        path.write_text(f"extends: mini\nmodel: {tag} [{command!r}]\n")
        yield harmless(f"{tag} in a preset", folder, lambda: load(str(path)))
        yield harmless(f"{tag} in a site file", folder, lambda: load_cluster(str(path)))
        yield harmless(f"{tag} in --set", folder, lambda tag=tag: load(TINY, [f"model={tag} [{command!r}]"]))


def links_and_paths(folder: Path) -> Iterator[Outcome]:
    """A link where a lock is to be, and names that lead out of their folder."""
    victim = folder / "victim"
    victim.write_text("mine")
    (folder / "shared").mkdir()
    (folder / "shared" / ".lock").symlink_to(victim)

    def taken() -> None:
        with locked(folder / "shared"):
            pass

    verdict = one(taken)
    yield Outcome(
        "a link in place of a lock", "found a link" in verdict.refused and victim.read_text() == "mine", verdict.refused or verdict.fault
    )
    for name in ("../../victim", "/etc/passwd", "a/../../victim", "..", ""):
        (folder / "listed.json").write_text(json.dumps({"commit": "c", "files": {name: {"size": 4, "sha256": None, "sha1": None}}}))
        verdict = one(lambda: read_json(folder / "listed.json", Listing))
        yield Outcome(f"the name {name!r} in a hub's listing", bool(verdict.refused), verdict.refused or verdict.fault or "taken")
