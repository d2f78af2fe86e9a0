"""Checkpoints of a training run: complete step folders, newest intact one first, written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from utils.run.artifacts import damage, inventory, published, read_json, remove, sweep_temporaries, write_json
from utils.run.errors import InputError
from utils.training.distributed import whole
from utils.training.tensor_file import write_tensors

READERS = 4  # files whose checksums are taken at once
FILES = MODEL, OPTIMIZER, SQUARES = "model.safetensors", "optimizer.safetensors", "optimizer_squares.safetensors"
Named = Mapping[str, Tensor]


@dataclass
class TrainState:
    """What is needed, beside the tensors, to go on as if nothing had happened."""

    step: int = 0
    metrics_bytes: int = 0
    best_step: int = 0
    best_nll: float | None = None
    seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)
    skipped: int = 0
    bad_in_a_row: int = 0
    micro_batch: int = 0
    recompute: float = 0.0


class Snapshot:
    """Copies of tensors on the host, in memory that is kept for the next time.

    On a GPU the copy runs beside the computation: the host does not wait, and the device waits (`before_update`) only just before
    the tensors change, a whole forward and backward pass later.
    """

    def __init__(self) -> None:
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
        full = whole(tensor)
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
    """Step folders below `folder`. Each is published by a rename, with its own checksums."""

    def __init__(self, folder: Path, keep_last: int, writes: bool = True) -> None:
        """With `writes` false this process is not the first of several: it helps to gather, reads what the first has verified, and writes
        nothing."""
        self.folder, self.keep_last, self.writes = folder, keep_last, writes
        self.snapshot = Snapshot()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._intact: set[Path] = set()
        if writes:
            sweep_temporaries(folder)

    def save(self, state: TrainState, model: Named, optimizer: Named) -> None:
        """Copy the tensors to the host and let a thread write them. At most one save is under way: a second one waits for the first.

        Raises what the save before it raised.
        """
        if not self.writes:
            for tensor in (*model.values(), *optimizer.values()):
                whole(tensor)
            return
        self.wait()
        copies = self.snapshot.take(_labelled(model, optimizer))
        self._pending = self._writer.submit(self._write, self._path(state.step), asdict(state), copies)

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

    def _write(self, path: Path, state: dict[str, Any], copies: dict[str, Tensor]) -> None:
        self.snapshot.arrived()
        files: dict[str, dict[str, Tensor]] = {name: {} for name in FILES}
        for label, tensor in copies.items():
            file, name = label.split("/", 1)
            files[file][name] = tensor
        with published(path) as aside:
            aside.mkdir()
            with ThreadPoolExecutor(len(files)) as pool:
                facts = dict(zip(files, pool.map(lambda name: write_tensors(files[name], aside / name), files), strict=True))
            write_json(aside / "state.json", state)
            facts |= {"state.json": inventory(aside / "state.json")["."]}
            write_json(aside / "manifest.json", {"files": facts})
        self._prune()

    def newest(self) -> TrainState | None:
        """State of the newest checkpoint that is intact, and whose best one is too. Others are named, removed and passed over."""
        self.wait()
        for path in reversed(self._paths()):
            fault = self._fault([path])
            if fault is None:
                state = TrainState(**read_json(path / "state.json"))
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
            return TrainState(**read_json(self._paths()[-1] / "state.json"))
        except (IndexError, InputError, TypeError):
            return None

    def model_tensors(self, step: int) -> dict[str, Tensor]:
        """Read-only views of the file: copy them before they are changed."""
        return self._tensors(step, (MODEL,))

    def optimizer_tensors(self, step: int) -> dict[str, Tensor]:
        """As `model_tensors`."""
        return self._tensors(step, (OPTIMIZER, SQUARES))

    def _tensors(self, step: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        self.wait()
        path = self._path(step)
        if self.writes and not self._intact.issuperset(path / name for name in names) and (fault := self._fault([path], names)):
            raise InputError(f"checkpoint of step {step}: {fault}; run the stage again with --discard")
        return {name: tensor for file in names for name, tensor in load_file(path / file).items()}

    def _fault(self, paths: Iterable[Path], names: Iterable[str] | None = None) -> str | None:
        """What is wrong with checkpoints, or with some of their files, in words; None if they are intact. Files are read side by side."""
        try:
            listed = {path / name: facts for path in paths for name, facts in read_json(path / "manifest.json")["files"].items()}
            wanted = listed if names is None else {path / name: listed[path / name] for path in paths for name in names}
            with ThreadPoolExecutor(READERS) as pool:
                faults = list(pool.map(lambda item: damage(item[0], {".": item[1]}), wanted.items()))
        except (InputError, KeyError, TypeError, AttributeError) as error:
            return f"its manifest is not readable ({error})"
        self._intact |= {file for file, fault in zip(wanted, faults, strict=True) if fault is None}
        return next(filter(None, faults), None)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step_*")) if self.folder.is_dir() else []

    def _prune(self) -> None:
        """Keep the last ones, and the best one that each of them points to."""
        last = self._paths()[-self.keep_last :]
        kept = set(last) | {self._path(read_json(path / "state.json")["best_step"]) for path in last if (path / "state.json").is_file()}
        for path in self._paths():
            if path not in kept:
                remove(path)


def _labelled(model: Named, optimizer: Named) -> dict[str, Tensor]:
    """All tensors as {file/name: tensor}. The moments go into two files, so that three files of one size are read and checked at once."""
    named = {f"{MODEL}/{name}": tensor for name, tensor in model.items()}
    return named | {f"{SQUARES if name.endswith('.exp_avg_sq') else OPTIMIZER}/{name}": tensor for name, tensor in optimizer.items()}
