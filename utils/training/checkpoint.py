"""Checkpoints of a training run: complete step folders, newest intact one first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from utils.models.loading import save_tensors
from utils.run.artifacts import damage, inventory, published, read_json, remove, sweep_temporaries, write_json
from utils.run.errors import InputError


@dataclass
class TrainState:
    """What is needed, beside the tensors, to go on as if nothing had happened."""

    step: int = 0
    metrics_bytes: int = 0
    best_step: int = 0
    best_nll: float | None = None
    seconds: float = 0.0
    resumed_at: list[int] = field(default_factory=list)


class Checkpoints:
    """Step folders below `folder`. Each is published by a rename, with its own checksums."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        sweep_temporaries(folder)

    def save(self, state: TrainState, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        path = self._path(state.step)
        with published(path) as aside:
            aside.mkdir()
            save_tensors(model, aside / "model.safetensors")
            save_tensors(optimizer, aside / "optimizer.safetensors")
            write_json(aside / "state.json", asdict(state))
            write_json(aside / "manifest.json", {"files": inventory(aside)})
        self._prune()

    def newest(self) -> TrainState | None:
        """State of the newest checkpoint that is intact, and whose best one is too. Others are named, removed and passed over."""
        for path in reversed(self._paths()):
            fault = _fault(path)
            if fault is None:
                state = TrainState(**read_json(path / "state.json"))
                best = self._path(state.best_step)
                fault = _fault(best) if state.best_nll is not None and best != path else None
                if fault is None:
                    return state
            print(f"  checkpoint {path.name} is damaged and passed over: {fault}")
            remove(path)
        return None

    def model_tensors(self, step: int) -> dict[str, Tensor]:
        path = self._path(step)
        if fault := _fault(path):
            raise InputError(f"checkpoint of step {step}: {fault}; run the stage again with --discard")
        return load_file(path / "model.safetensors")

    def optimizer_tensors(self, step: int) -> dict[str, Tensor]:
        """To be called right after `newest` or `model_tensors`, which check the whole checkpoint."""
        return load_file(self._path(step) / "optimizer.safetensors")

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


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is intact."""
    try:
        manifest: dict[str, Any] = read_json(path / "manifest.json")
        return damage(path, manifest["files"])
    except (InputError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest is not readable ({error})"
