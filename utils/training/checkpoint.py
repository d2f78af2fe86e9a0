"""Checkpoints of a training run: complete step folders, newest intact one first, written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils.run.artifacts import Listed, damage, inventory, published, read_json, remove, sweep_temporaries, sync, write_json
from utils.run.errors import InputError
from utils.training.distributed import ALONE, World, local, whole
from utils.training.parts import assembled, header, offset
from utils.training.tensor_file import write_tensors

READERS = 4  # files whose checksums are taken at once
FILES = MODEL, OPTIMIZER, SQUARES = "model.safetensors", "optimizer.safetensors", "optimizer_squares.safetensors"
Named = Mapping[str, Tensor]


@dataclass
class TrainState:
    """What is needed, beside the tensors, to go on as if nothing had happened."""

    step: int = 0
    metrics_bytes: int = 0
    metrics_sha256: str = ""
    best_step: int = 0
    best_nll: float | None = None
    seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)
    skipped: int = 0
    bad_in_a_row: int = 0
    micro_batch: int = 0
    recompute: float = 0.0
    processes: int = 0  # for which the two above were chosen; 0: for none yet, or by a version that did not say
    parallel: str = "none"


class Snapshot:
    """Copies of tensors on the host, in memory that is kept for the next time.

    On a GPU the copy runs beside the computation: the host does not wait, and the device waits (`before_update`) only just before
    the tensors change, a whole forward and backward pass later.
    """

    def __init__(self, cut: bool = False) -> None:
        """With `cut` of a tensor that is cut over processes the own part alone is copied."""
        self.cut = cut
        self.buffers: dict[str, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None
        self.copied: torch.cuda.Event | None = None

    def take(self, tensors: Named) -> dict[str, Tensor]:
        """Start to copy; the result may be read after `arrived`."""
        if self.stream is None and any(tensor.is_cuda for tensor in tensors.values()):
            self.stream = torch.cuda.Stream()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            copies = {name: self._copy(name, tensor.detach()) for name, tensor in tensors.items()}
        if self.stream is not None:
            self.copied = self.stream.record_event()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        full = local(tensor) if self.cut else whole(tensor)
        if full is not tensor and self.stream is not None:
            full.record_stream(self.stream)  # gathered for this copy alone: it must outlive it
        return self._buffer(name, full).copy_(full, non_blocking=True)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        found = self.buffers.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            try:
                found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            except RuntimeError:  # the system limits locked memory: a plain buffer is slower and as good
                found = torch.empty(tensor.shape, dtype=tensor.dtype)
            self.buffers[name] = found
        return found

    def arrived(self) -> None:
        """Let the calling thread wait for the copy."""
        if self.copied is not None:
            self.copied.synchronize()

    def before_update(self) -> None:
        """Let the device, not the host, wait for a copy that is under way."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)


class Checkpoints:
    """Step folders below `folder`. Each is published by a rename, with its own checksums.

    Of several processes the first one verifies, publishes and prunes. It also writes, unless the state is cut over them: then each writes
    its own parts into the folder that the first will publish, and all learn of an error that one of them had.
    """

    def __init__(self, folder: Path, keep_last: int, world: World = ALONE) -> None:
        self.folder, self.keep_last, self.world, self.writes = folder, keep_last, world, world.first
        self.snapshot = Snapshot(world.cut)
        self._group = dist.new_group(backend="gloo") if world.cut else None  # for the writing threads to talk
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._intact: set[tuple[Path, str]] = set()
        if self.writes:
            sweep_temporaries(folder)

    def save(self, state: TrainState, model: Named, optimizer: Named) -> None:
        """Copy the tensors to the host and let a thread write them. At most one save is under way: a second one waits for the first.

        Raises what the save before it raised.
        """
        if not (self.writes or self.world.cut):
            for tensor in (*model.values(), *optimizer.values()):
                whole(tensor)
            return
        self.wait()
        tensors = _labelled(model, optimizer)
        if self.world.cut:  # what is not cut, every process has: the first writes it
            tensors = {label: tensor for label, tensor in tensors.items() if isinstance(tensor, DTensor) or self.writes}
        copies, offsets = self.snapshot.take(tensors), {label: offset(tensor) for label, tensor in tensors.items()}
        self._pending = self._writer.submit(self._write, self._path(state.step), asdict(state), copies, offsets)

    def check(self) -> None:
        """Raise the error of a save that has failed; costs nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written. Raises what the writer raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the writer, whatever became of its work; `wait` before it to know."""
        self._writer.shutdown(wait=True)

    def _write(self, path: Path, state: dict[str, Any], copies: dict[str, Tensor], offsets: dict[str, tuple[int, ...]]) -> None:
        self.snapshot.arrived()
        if not self.writes:
            self._write_tensors(self._all(None)[0], copies, offsets)
            return
        with published(path) as aside:
            aside.mkdir()
            self._all(aside)
            facts = self._write_tensors(aside, copies, offsets)
            write_json(aside / "state.json", state)
            facts |= {"state.json": inventory(aside / "state.json")["."]}
            write_json(aside / "manifest.json", {"files": facts})
        self._prune()

    def _write_tensors(self, aside: Path, copies: dict[str, Tensor], offsets: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """Write this process's files; returns {file: its checksum} of all processes. Raises what one of them raised."""

        def write(file: str) -> tuple[str, dict[str, Any]]:
            chosen = {label.split("/", 1)[1]: label for label, tensor in copies.items() if label.startswith(f"{file}/") and tensor.numel()}
            tensors = {name: copies[label] for name, label in chosen.items()}
            if not self.world.cut:
                return file, write_tensors(tensors, aside / file)
            part = f"{_kind(file)}/{self.world.rank:05d}.safetensors"
            (aside / part).parent.mkdir(exist_ok=True)
            facts = write_tensors(tensors, aside / part, header({name: offsets[label] for name, label in chosen.items()}))
            sync(aside / part)
            return part, facts

        own: dict[str, Any] | Exception
        try:
            with ThreadPoolExecutor(len(FILES)) as pool:
                own = dict(pool.map(write, FILES))
        except Exception as error:
            own = error
        written: dict[str, Any] = {}
        for found in self._all(own):
            if isinstance(found, Exception):
                raise found
            written |= found
        return written

    def _all(self, value: Any) -> list[Any]:
        """The values of all processes that write, by rank."""
        if self._group is None:
            return [value]
        found = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, value, group=self._group)
        return found

    def newest(self) -> TrainState | None:
        """State of the newest checkpoint that is intact, and whose best one is too. Others are named, removed and passed over."""
        self.wait()
        for path in reversed(self._paths()):
            fault = self._fault([path])
            if fault is None:
                state: TrainState = read_json(path / "state.json", TrainState)
                best = self._path(state.best_step)
                fault = self._fault([best], (MODEL, "state.json")) if state.best_nll is not None and best != path else None
                if fault is None:
                    return state
            print(f"  checkpoint {path.name} is damaged and passed over: {fault}")
            remove(path)
        return None

    def glimpse(self) -> TrainState | None:
        """What the newest checkpoint says of itself, without reading its tensors; None if there is none that can be read."""
        try:
            glimpsed: TrainState = read_json(self._paths()[-1] / "state.json", TrainState)
            return glimpsed
        except (IndexError, InputError):
            return None

    def model_tensors(self, step: int, like: Named | None = None) -> dict[str, Tensor]:
        """Read-only views of the file: copy them before they are changed. What was saved in parts is read whole, or cut as in `like`."""
        return self._tensors(step, (MODEL,), like or {})

    def optimizer_tensors(self, step: int, like: Named | None = None) -> dict[str, Tensor]:
        """As `model_tensors`."""
        return self._tensors(step, (OPTIMIZER, SQUARES), like or {})

    def _tensors(self, step: int, names: tuple[str, ...], like: Named) -> dict[str, Tensor]:
        self.wait()
        path = self._path(step)
        if self.writes and not self._intact.issuperset((path, _kind(name)) for name in names) and (fault := self._fault([path], names)):
            raise InputError(f"checkpoint of step {step}: {fault}; run the stage again with --discard")
        found: dict[str, Tensor] = {}
        for name in names:
            parts = path / _kind(name)
            found |= assembled(parts, like) if parts.is_dir() else load_file(path / name)
        return found

    def _fault(self, paths: Iterable[Path], names: Iterable[str] | None = None) -> str | None:
        """What is wrong with checkpoints, or with some of their files, in words; None if they are intact. Files are read side by side."""
        try:
            listed = {path / name: facts for path in paths for name, facts in read_json(path / "manifest.json", Listed)["files"].items()}
            kinds = {file: (path, _kind(file.relative_to(path).as_posix())) for path in paths for file in listed if path in file.parents}
            chosen = set(kinds.values()) if names is None else {(path, _kind(name)) for path in paths for name in names}
            if missing := chosen - set(kinds.values()):
                raise KeyError(min(missing)[1])
            wanted = {file: facts for file, facts in listed.items() if kinds[file] in chosen}
            with ThreadPoolExecutor(READERS) as pool:
                faults = list(pool.map(lambda item: damage(item[0], {".": item[1]}), wanted.items()))
        except (InputError, KeyError) as error:
            return f"its manifest is not readable ({error})"
        self._intact |= chosen - {kinds[file] for file, fault in zip(wanted, faults, strict=True) if fault is not None}
        return next(filter(None, faults), None)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []

    def _prune(self) -> None:
        """Keep the last ones, and the best one that each of them points to."""
        last = self._paths()[-self.keep_last :]
        kept = set(last) | {self._path(step) for step in map(_best_step, last) if step is not None}
        for path in self._paths():
            if path not in kept:
                remove(path)


def _best_step(path: Path) -> int | None:
    """The best step that a checkpoint points to; None of one that cannot be gone on from."""
    try:
        state: TrainState = read_json(path / "state.json", TrainState)
    except InputError:
        return None
    return state.best_step


def _kind(file: str) -> str:
    """model of model.safetensors, and of model/00003.safetensors, which holds the fourth process's parts."""
    return file.split("/")[0].removesuffix(".safetensors")


def _labelled(model: Named, optimizer: Named) -> dict[str, Tensor]:
    """All tensors as {file/name: tensor}. The moments go into two files, so that three files of one size are read and checked at once."""
    named = {f"{MODEL}/{name}": tensor for name, tensor in model.items()}
    return named | {f"{SQUARES if name.endswith('.exp_avg_sq') else OPTIMIZER}/{name}": tensor for name, tensor in optimizer.items()}
