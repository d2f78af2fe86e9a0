"""The contract of a stage: declared inputs, outputs and configuration, and the runner that holds a stage to them."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from configs.schema import Experiment
from utils.run import manifest
from utils.run.artifacts import remove, sweep_temporaries
from utils.run.environment import code_revision
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.folders import Folders
from utils.run.lock import locked
from utils.run.preemption import Stop
from utils.run.progress import duration

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Stage:
    """A stage as a value.

    `reads` names artefacts; `writes` maps an artefact's name to its path below the stage's folder; `config_keys` are the
    sections (or `section.key`) of the configuration on which the outputs depend, apart from the inputs.
    """

    number: int
    name: str
    purpose: str
    reads: tuple[str, ...]
    writes: Mapping[str, str]
    config_keys: tuple[str, ...]
    run: Callable[[Context], None]
    version: int = 1
    every_seed: bool = True

    @property
    def label(self) -> str:
        return f"stage_{self.number}_{self.name}"

    def folder(self, folders: Folders, seed: int) -> Path:
        """A stage that is not run for every seed sums the run up, and lives in the results."""
        return folders.run / f"seed_{seed}" / self.label if self.every_seed else folders.final


@dataclass
class Context:
    """What a running stage is handed: its configuration, its inputs (by seed and name), its folder, and the request to stop."""

    config: Experiment
    folders: Folders
    seed: int
    folder: Path
    writes: Mapping[str, str]
    inputs: Mapping[int, Mapping[str, Path]]
    stop: Stop = field(default_factory=Stop)
    identity: Mapping[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Path:
        return self.inputs[self.seed][name]

    def write(self, name: str) -> Path:
        return self.folder / self.writes[name]

    @property
    def state(self) -> Path:
        """Partial work; removed once the stage is complete."""
        return self.folder / "state"


def producer(pipeline: Sequence[Stage], artefact: str) -> Stage:
    """The one stage that writes an artefact."""
    (stage,) = (stage for stage in pipeline if artefact in stage.writes)
    return stage


def run_stage(stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], stop: Stop, discard: bool = False) -> int:
    """Run one stage, or find that there is nothing to do. Returns an exit code and prints every message a user needs."""
    folders = Folders.of(config.paths, config.run_name)
    where = f"stage {stage.number} {stage.name}" + (f", seed {seed}" if stage.every_seed else "")
    folder = stage.folder(folders, seed)
    try:
        with locked(folder):
            if discard and (reason := _unusable(stage, config, seed, pipeline, folders)):
                print(f"[{where}] {reason}\n  moved to {set_aside(folder)}")
        with locked(folder):
            return _run_locked(stage, config, seed, pipeline, stop, folders, where)
    except InputError as error:
        print(f"[{where}] refused: {error}", file=sys.stderr)
        return REFUSED
    except StoppedInTime as reason:
        print(f"[{where}] stopped in time ({reason}); the state is saved in {folder}. The same command goes on from there.")
        return STOPPED
    except WorkFailed as error:
        print(f"[{where}] failed: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        named = error.filename or folder
        print(
            f"[{where}] cannot write or read {named}: {error.strerror or error}. What is complete is kept: "
            f"make room or give access, or choose other folders (paths.work, paths.results, paths.cache), then run again.",
            file=sys.stderr,
        )
        return FAILED


def _run_locked(stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], stop: Stop, folders: Folders, where: str) -> int:
    folder = stage.folder(folders, seed)
    inputs, identity = _gather(stage, config, seed, pipeline, folders)
    _compare(stage, folder, identity)
    context = Context(config, folders, seed, folder, stage.writes, inputs, stop, identity)
    if manifest.completed(folder):
        remove(context.state)
        print(f"[{where}] already complete: {folder}")
        return DONE
    print(f"[{where}] {stage.purpose}", flush=True)
    began = time.monotonic()
    stop.check()
    notes = manifest.begin(folder, identity)
    _warn_of_changed_code(notes)
    sweep_temporaries(folder)
    stage.run(context)
    seconds = time.monotonic() - began
    manifest.complete(folder, notes, stage.writes, seconds)
    remove(context.state)
    print(f"[{where}] done in {duration(seconds)}: {folder}", flush=True)
    return DONE


def _gather(
    stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], folders: Folders
) -> tuple[dict[int, dict[str, Path]], dict[str, Any]]:
    """Paths of all inputs, verified against their producers' manifests, and the identity of the work to do."""
    seeds = (seed,) if stage.every_seed else config.seeds
    inputs: dict[int, dict[str, Path]] = {}
    digests: dict[str, str] = {}
    for one in seeds:
        inputs[one] = {}
        for name in stage.reads:
            source = producer(pipeline, name)
            origin = source.folder(folders, one)
            again = f"run stage {source.number} ({source.name}, seed {one}) first"
            done = manifest.completed(origin)
            if done is None:
                raise InputError(f"the input {name!r} is missing: {origin / source.writes[name]} is not complete; {again}")
            if fault := manifest.first_damage(origin, done, name):
                raise InputError(f"the input {name!r} is damaged: {fault}; {again.removesuffix(' first')} again with --discard")
            inputs[one][name] = origin / source.writes[name]
            digests[f"seed {one}: {name}" if not stage.every_seed else name] = manifest.digest_of(done, name)
    settings = config.model_dump(mode="json")
    chosen = {key: reduce(getitem, key.split("."), settings) for key in stage.config_keys}
    identity = {"stage": stage.label, "version": stage.version, "config": chosen, "inputs": digests}
    if stage.every_seed:
        identity["seed"] = seed
    return inputs, identity


def _compare(stage: Stage, folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds other work. A summary over seeds is redone when only its inputs changed; the old one is kept."""
    there = manifest.started(folder)
    if there is not None and (changed := manifest.differences(there["identity"], identity)):
        if not stage.every_seed and all(line.startswith("inputs.") for line in changed):
            print(f"  the inputs changed; the earlier results are kept in {set_aside(folder)}")
            return
        raise InputError(
            f"{folder} holds another experiment. Different (there -> asked for):\n    " + "\n    ".join(changed) + "\n  "
            "Give this one another name (--run-name NAME), or move the old folder aside and start afresh (--discard)."
        )
    done = manifest.completed(folder)
    if done and (fault := manifest.first_damage(folder, done)):
        raise InputError(f"a complete stage was damaged: {fault}. Move its folder aside and make it again with --discard.")


def _unusable(stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], folders: Folders) -> str | None:
    """Why the stage's folder cannot be gone on with, or None. Missing inputs are another matter and raise."""
    _, identity = _gather(stage, config, seed, pipeline, folders)
    try:
        _compare(stage, stage.folder(folders, seed), identity)
    except InputError as error:
        return str(error)
    return None


def set_aside(folder: Path) -> Path:
    """Move a folder out of the way, to a name that is free, and leave an empty one."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    target = next(
        path for count in range(1000) if not (path := folder.with_name(f"{folder.name}.{stamp}{f'-{count}' if count else ''}")).exists()
    )
    folder.rename(target)
    folder.mkdir()
    return target


def _warn_of_changed_code(notes: Mapping[str, Any]) -> None:
    earlier = {start["code_revision"] for start in notes["starts"]} - {code_revision()}
    if earlier:
        print(f"  warning: begun with code revision {', '.join(sorted(earlier))}, going on with {code_revision()}")
