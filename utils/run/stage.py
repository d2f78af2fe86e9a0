"""The contract of a stage: declared inputs, outputs and configuration, and the runner that holds a stage to them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from configs.schema import Experiment
from utils.run import manifest
from utils.run.artifacts import remove, sweep_temporaries, sync
from utils.run.environment import code_revision, restarted
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.folders import Folders
from utils.run.lock import locked
from utils.run.preemption import Stop
from utils.run.progress import Report, duration
from utils.run.trouble import explained

Task = tuple[int, int]  # (number, how many): one of several jobs that share a stage's work


class MissingInput(InputError):
    """A stage whose output is needed has not finished. A stage that sums up the seeds does without, if another seed has it."""


@dataclass(frozen=True)
class Stage:
    """A stage as a value.

    `reads` names artefacts; `writes` maps an artefact's name to its path below the stage's folder; `config_keys` are the
    sections (or `section.key`) of the configuration on which the outputs depend, apart from the inputs.
    `share` does a task's part of the work, beside others, and leaves it in the state; None where nothing can be shared.
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
    share: Callable[[Context, Task], None] | None = None

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


def run_stage(
    stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], stop: Stop, discard: bool = False, task: Task | None = None
) -> int:
    """Run one stage, or find that there is nothing to do. Returns an exit code and prints every message a user needs.

    As a `task` it does its share, beside others, and the stage is not complete afterwards.
    """
    where = f"stage {stage.number} {stage.name}" + (f", seed {seed}" if stage.every_seed else "")
    folder: Path | None = None
    try:
        folders = Folders.of(config.paths, config.run_name)
        folder = stage.folder(folders, seed)
        with locked(folder, queue=stop if restarted() else None, shared=task is not None):
            inputs, identity = _gather(stage, config, seed, pipeline, folders)
            context = Context(config, folders, seed, folder, stage.writes, inputs, stop, identity)
            reason = _unusable(stage, context)
            if reason is None:
                return _share(stage, context, where, pipeline, task) if task else _work(stage, context, where, pipeline)
            if _outdated_summary(stage, context):
                print(f"[{where}] the inputs changed; the earlier results are kept in {set_aside(folder)}")
            elif discard:
                print(f"[{where}] {reason}\n  moved to {set_aside(folder)}")
            else:
                raise InputError(reason)
        with locked(folder):  # once more: the lock went away with the old folder
            if reason := _unusable(stage, context):
                raise InputError(reason)
            return _work(stage, context, where, pipeline)
    except InputError as error:
        print(f"[{where}] refused: {error}", file=sys.stderr)
        return REFUSED
    except StoppedInTime as reason:
        print(f"[{where}] stopped in time ({reason}); the state is saved in {folder}. The same command goes on from there.")
        return STOPPED
    except WorkFailed as error:
        print(f"[{where}] failed: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        if (words := explained(error, folder)) is None:
            raise
        print(f"[{where}] {words}", file=sys.stderr)
        return FAILED


def _work(stage: Stage, context: Context, where: str, pipeline: Sequence[Stage]) -> int:
    """Do the stage's work in a locked folder that holds this work or none, unless it is complete."""
    folder = context.folder
    if manifest.completed(folder):
        remove(context.state)
        print(f"[{where}] already complete: {folder}")
        return DONE
    print(f"[{where}] {stage.purpose}", flush=True)
    began = time.monotonic()
    context.stop.check()
    notes = manifest.begin(folder, context.identity)
    _warn_of_changed_code(notes)
    sweep_temporaries(folder)
    with Report.into(context.state / "progress.json", context.stop.deadline), _on_steady_inputs(stage, context, pipeline):
        stage.run(context)
    seconds = time.monotonic() - began
    manifest.complete(folder, notes, stage.writes, seconds)
    remove(context.state)
    print(f"[{where}] done in {duration(seconds)}: {folder}", flush=True)
    return DONE


def _share(stage: Stage, context: Context, where: str, pipeline: Sequence[Stage], task: Task) -> int:
    """Do a task's share, in a folder that only others like it use meanwhile."""
    assert stage.share is not None
    if manifest.completed(context.folder):
        print(f"[{where}] already complete: {context.folder}")
        return DONE
    print(f"[{where}] task {task[0] + 1} of {task[1]}: {stage.purpose}", flush=True)
    with locked(context.folder / "starts", queue=context.stop):
        manifest.begin(context.folder, context.identity)
    with Report.into(context.state / "progress.json", context.stop.deadline), _on_steady_inputs(stage, context, pipeline):
        stage.share(context, task)
    print(f"[{where}] task {task[0] + 1} of {task[1]} found nothing more to take", flush=True)
    return DONE


@contextmanager
def _on_steady_inputs(stage: Stage, context: Context, pipeline: Sequence[Stage]) -> Iterator[None]:
    """Raise WorkFailed if an input was made again during the block: its results would be of the one and the other."""
    try:
        yield
    except StoppedInTime:
        raise
    except Exception as error:
        if reason := _made_again(stage, context, pipeline):
            raise WorkFailed(reason) from error
        raise
    if reason := _made_again(stage, context, pipeline):
        raise WorkFailed(reason)


def _made_again(stage: Stage, context: Context, pipeline: Sequence[Stage]) -> str | None:
    """The input that is not what this stage began with, in words; None if all are. Reads manifests alone."""
    for seed, paths in context.inputs.items():
        for name in paths:
            origin = producer(pipeline, name).folder(context.folders, seed)
            done = manifest.completed(origin)
            if done is None or manifest.digest_of(done, name) != context.identity["inputs"][_input_key(stage, name, seed)]:
                return f"the input {name!r} in {origin} was made again meanwhile; when that is complete, run this stage again"
    return None


def _gather(
    stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], folders: Folders
) -> tuple[dict[int, dict[str, Path]], dict[str, Any]]:
    """Paths of all inputs, verified against their producers' manifests, and the identity of the work to do.

    A stage that sums up the seeds lacks what some of them have not made, and says so; what no seed has made is refused.
    """
    seeds = (seed,) if stage.every_seed else config.seeds
    inputs: dict[int, dict[str, Path]] = {one: {} for one in seeds}
    digests: dict[str, str] = {}
    for name in stage.reads:
        missing = {}
        for one in seeds:
            try:
                done, path = _input(name, config, one, pipeline, folders)
            except MissingInput as error:
                missing[one] = error
                continue
            inputs[one][name] = path
            digests[_input_key(stage, name, one)] = manifest.digest_of(done, name)
        if len(missing) == len(seeds):
            raise missing[seeds[0]]
        for one, reason in missing.items():
            print(f"[stage {stage.number} {stage.name}] goes on without seed {one}: {reason}", flush=True)
    identity = {"stage": stage.label, "version": stage.version, "config": _chosen(stage, config), "inputs": digests}
    if stage.every_seed:
        identity["seed"] = seed
    return inputs, identity


def _input(name: str, config: Experiment, seed: int, pipeline: Sequence[Stage], folders: Folders) -> tuple[dict[str, Any], Path]:
    """The manifest of an input's producer and the input's path, verified. Raises MissingInput if the producer has not finished."""
    source = producer(pipeline, name)
    origin = source.folder(folders, seed)
    again = f"run stage {source.number} ({source.name}, seed {seed}) first"
    done = manifest.completed(origin)
    if done is None:
        raise MissingInput(f"the input {name!r} is missing: {origin / source.writes[name]} is not complete; {again}")
    if changed := manifest.differences(done["identity"]["config"], _chosen(source, config)):
        raise InputError(
            f"the input {name!r} was made by another configuration in {origin}. Different (there -> asked for):\n    "
            + "\n    ".join(changed)
            + f"\n  Give this run another name (--run-name NAME), or {again.removesuffix(' first')} again with --discard."
        )
    if reason := _stale(source, done, seed, pipeline, folders):
        raise InputError(f"the input {name!r} in {origin} is out of date: {reason}; {again.removesuffix(' first')} again with --discard")
    if fault := manifest.first_damage(origin, done, [name]):
        raise InputError(f"the input {name!r} is damaged: {fault}; {again.removesuffix(' first')} again with --discard")
    return done, origin / source.writes[name]


def _stale(stage: Stage, done: Mapping[str, Any], seed: int, pipeline: Sequence[Stage], folders: Folders) -> str | None:
    """Why a complete stage no longer stands for the program and the inputs there are, or None. Reads manifests alone."""
    if done["identity"]["version"] != stage.version:
        return f"{stage.label} was made by version {done['identity']['version']} of the stage, now {stage.version}"
    for name in stage.reads:
        maker = producer(pipeline, name)
        there = manifest.completed(maker.folder(folders, seed))
        if there is None or manifest.digest_of(there, name) != done["identity"]["inputs"].get(name):
            return f"{stage.label} was made from another {name!r} than {maker.label} holds now"
        if reason := _stale(maker, there, seed, pipeline, folders):
            return reason
    return None


def standing(stage: Stage, config: Experiment, seed: int, pipeline: Sequence[Stage], folders: Folders) -> tuple[bool, str | None]:
    """(is it complete, why its folder cannot be gone on with): what a start would find, as far as manifests and the sizes of files tell."""
    folder = stage.folder(folders, seed)
    try:
        done = manifest.completed(folder)
        there = done or manifest.started(folder)
    except InputError as error:
        return False, _unreadable(error)
    if there is None:
        return False, None
    asked = {"version": stage.version, "config": _chosen(stage, config)}
    if changed := manifest.differences({key: there["identity"].get(key) for key in asked}, asked):
        return False, _another(folder, changed)
    if done is None:
        return False, None
    if fault := manifest.first_damage(folder, done, stage.writes, contents=False):
        return False, _damaged(fault)
    now: dict[str, str] = {}
    for one in (seed,) if stage.every_seed else config.seeds:
        for name in stage.reads:
            made = manifest.completed(producer(pipeline, name).folder(folders, one))
            if made is None:
                return False, None  # to be made again, perhaps with the same content: that is for the start to see
            now[_input_key(stage, name, one)] = manifest.digest_of(made, name)
    changed = manifest.differences({"inputs": done["identity"]["inputs"]}, {"inputs": now})
    return not changed, _another(folder, changed) if changed and stage.every_seed else None


def _input_key(stage: Stage, name: str, seed: int) -> str:
    """How an input is called in the identity of a stage."""
    return name if stage.every_seed else f"seed {seed}: {name}"


def _chosen(stage: Stage, config: Experiment) -> dict[str, Any]:
    """The part of the configuration on which the stage's outputs depend."""
    settings = config.model_dump(mode="json")
    return {key: reduce(getitem, key.split("."), settings) for key in stage.config_keys}


def _unusable(stage: Stage, context: Context) -> str | None:
    """Why the stage's folder cannot be gone on with, and what to do; None if it can."""
    folder = context.folder
    try:
        done = manifest.completed(folder)
        left = [path for path in (context.state, *map(context.write, stage.writes)) if path.exists()]
        there = manifest.started(folder) or done  # after that look: another task may begin the same work now
    except InputError as error:
        return _unreadable(error)
    if there is None:
        nameless = f"is there, but no {manifest.STARTED} says what it was made from. Move its folder aside (--discard)."
        return f"{left[0]} {nameless}" if left else None
    if changed := manifest.differences(there["identity"], context.identity):
        return _another(folder, changed)
    if done and (fault := manifest.first_damage(folder, done, stage.writes)):
        return _damaged(fault)
    return None


def _damaged(fault: str) -> str:
    return f"a complete stage was damaged: {fault}. Move its folder aside and make it again with --discard."


def _unreadable(error: InputError) -> str:
    return f"{error}\n  Or move the whole folder aside and start afresh (--discard)."


def _another(folder: Path, changed: Sequence[str]) -> str:
    return (
        f"{folder} holds another experiment. Different (there -> asked for):\n    " + "\n    ".join(changed) + "\n  "
        "Give this one another name (--run-name NAME), or move the old folder aside and start afresh (--discard)."
    )


def _outdated_summary(stage: Stage, context: Context) -> bool:
    """A summary over seeds is redone without asking when only its inputs changed."""
    try:
        there = None if stage.every_seed else manifest.started(context.folder)
    except InputError:
        return False
    changed = manifest.differences(there["identity"], context.identity) if there else []
    return bool(changed) and all(line.startswith("inputs.") for line in changed)


def set_aside(folder: Path) -> Path:
    """Move a folder out of the way, to a name that is free, and leave an empty one."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    target = next(
        path for count in range(1000) if not (path := folder.with_name(f"{folder.name}.{stamp}{f'-{count}' if count else ''}")).exists()
    )
    folder.rename(target)
    folder.mkdir(exist_ok=True)  # another process may have come meanwhile; who may work there, the lock decides
    sync(folder.parent)
    return target


def _warn_of_changed_code(notes: Mapping[str, Any]) -> None:
    earlier = {start["code_revision"] for start in notes["starts"]} - {code_revision()}
    if earlier:
        print(f"  warning: begun with code revision {', '.join(sorted(earlier))}, going on with {code_revision()}")
