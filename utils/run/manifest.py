"""A stage's two marks on disk: `started.json`, what it is working on, and `manifest.json`, written last, that it is complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from utils.run.artifacts import Inventory, Name, damage, inventory, read_sealed, settle, value_digest, write_sealed
from utils.run.environment import code_revision, host, now, versions

STARTED = "started.json"
MANIFEST = "manifest.json"


class Identity(TypedDict):
    """What a stage works on: what differs makes it another work."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]


class Start(TypedDict):
    code_revision: str


class Started(TypedDict):
    identity: Identity
    starts: list[Start]


class Output(TypedDict):
    path: Name
    files: Inventory


class Complete(Started):
    finished: str
    outputs: dict[str, Output]


def begin(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Note one more start in the folder; return the notes. The identity (stage, config, inputs) must agree with the one there."""
    path = folder / STARTED
    notes: dict[str, Any] = read_sealed(path, Started, always=False) if path.exists() else {"identity": identity, "starts": []}
    notes["starts"].append({"at": now(), "code_revision": code_revision(), **host()})
    write_sealed(path, notes)
    return notes


def started(folder: Path) -> dict[str, Any] | None:
    return _load(folder / STARTED, Started, "put a copy of it back, since it says what the work beside it was made from")


def completed(folder: Path) -> dict[str, Any] | None:
    """The manifest, if the stage is complete."""
    return _load(folder / MANIFEST, Complete, "remove it to have the stage done again")


def _load(path: Path, shape: Any, cure: str) -> dict[str, Any] | None:
    if not (path.exists() or path.is_symlink()):
        return None
    return read_sealed(path, shape, cure, always=False)  # earlier versions wrote no checksum


def complete(folder: Path, notes: Mapping[str, Any], outputs: Mapping[str, str], seconds: float) -> None:
    """Declare the stage complete: every output is there and on the disk, its digest is taken, the manifest comes last."""
    listed = {}
    for name, relative in outputs.items():
        path = folder / relative
        if not path.exists():
            raise RuntimeError(f"the stage ended without its declared output {name!r}: {path} is missing")
        settle(path)
        listed[name] = {"path": relative, "files": inventory(path)}
    write_sealed(
        folder / MANIFEST,
        {
            "identity": notes["identity"],
            "outputs": listed,
            "starts": notes["starts"],
            "finished": now(),
            "seconds_of_last_start": round(seconds, 3),
            "code_revision": code_revision(),
            "versions": versions(),
        },
    )


def digest_of(manifest: Mapping[str, Any], name: str) -> str:
    """Digest of one output, over the checksums of its files."""
    return value_digest(manifest["outputs"][name]["files"])


def first_damage(folder: Path, manifest: Mapping[str, Any], names: Iterable[str], contents: bool = True) -> str | None:
    """What is wrong with the named outputs, in words; None if all are intact. Without `contents` by size alone."""
    for name in names:
        facts = manifest["outputs"].get(name)
        if facts is None:
            return f"{folder / MANIFEST} lists no output {name!r}"
        if fault := damage(folder / facts["path"], facts["files"], contents):
            return fault
    return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every leaf in which two identities differ."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}" for key in keys]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {key: leaf for name, branch in tree.items() for key, leaf in _flat(branch, f"{prefix}.{name}" if prefix else name).items()}
