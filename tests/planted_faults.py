"""Faults for verify_local.py to find: each breaks one thing that a check looks at."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from configs import presets as shipped
from tests.fake_stages import ROOT
from utils.attacks import hotflip
from utils.attacks.scoring import Scorer
from utils.data.tokenizer import load_tokenizer
from utils.data.tokens import PackedBatches, Tokens
from utils.models import convert
from utils.models.constraints import Constraint
from utils.training import optim
from utils.training.checkpoint import Checkpoints
from utils.verify import attack, child, conversion, disk, machine, packages, repetition, report, tokens

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch, Path], object]


def old_package(patch: Patch, folder: Path) -> None:
    real = metadata.version
    patch.setattr(metadata, "version", lambda name: "1.26.4" if name == "numpy" else real(name))


def broken_package(patch: Patch, folder: Path) -> None:
    patch.setitem(sys.modules, "zstandard", None)  # what Python does with it is what it does where a file is missing


def absent_package(patch: Patch, folder: Path) -> None:
    (folder / "environment.sh").write_text('needed="torch>=2.0 no-such-package>=1.5"\n')
    patch.setattr(packages, "ENVIRONMENT", folder / "environment.sh")


def old_python(patch: Patch, folder: Path) -> None:
    (folder / "pyproject.toml").write_text('requires-python = ">=3.99"\n')
    patch.setattr(packages, "PROJECT", folder / "pyproject.toml")


def unreadable_requirements(patch: Patch, folder: Path) -> None:
    (folder / "environment.sh").touch()
    patch.setattr(packages, "ENVIRONMENT", folder / "environment.sh")


def own_presets(patch: Patch, folder: Path) -> Path:
    copied = Path(shutil.copytree(ROOT / "configs", folder / "configs"))
    patch.setattr(shipped, "PRESETS", copied)
    patch.setattr(shipped, "CLUSTERS", copied / "clusters")
    return copied


def broken_preset(patch: Patch, folder: Path) -> None:
    path = own_presets(patch, folder) / "pythia-1.4b.yaml"
    path.write_text(path.read_text().replace("steps: 800", "stepps: 800"))


def broken_cluster(patch: Patch, folder: Path) -> None:
    (own_presets(patch, folder) / "clusters" / "alpine.yaml").write_text("network: sometimes\n")


def no_clusters(patch: Patch, folder: Path) -> None:
    shutil.rmtree(own_presets(patch, folder) / "clusters")


def replace_copies_over(patch: Patch, folder: Path) -> None:
    def copying(self: Path, target: Path) -> None:
        if self.is_dir():
            shutil.copytree(self, target)
        else:
            shutil.copyfile(self, target)  # into the old file

    patch.setattr(Path, "replace", copying)


def replace_copies_anew(patch: Patch, folder: Path) -> None:
    def copying(self: Path, target: Path) -> None:
        if self.is_dir():
            shutil.copytree(self, target)
        else:
            Path(target).unlink(missing_ok=True)
            shutil.copyfile(self, target)

    patch.setattr(Path, "replace", copying)


def replace_copies_folders(patch: Patch, folder: Path) -> None:
    real = Path.replace
    patch.setattr(Path, "replace", lambda self, target: shutil.copytree(self, target) if self.is_dir() else real(self, target))


def no_sync_of_folders_with_blanks(patch: Patch, folder: Path) -> None:
    real = os.fsync

    def refuse(handle: int) -> None:
        if ".verify " in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    patch.setattr(os, "fsync", refuse)


def lock_for_everybody(patch: Patch, folder: Path) -> None:
    patch.setattr(fcntl, "flock", lambda handle, how: None)


def lock_for_ever(patch: Patch, folder: Path) -> None:
    def busy(handle: int, how: int) -> None:
        raise BlockingIOError

    patch.setattr(fcntl, "flock", busy)


def lock_unknown(patch: Patch, folder: Path) -> None:
    patch.setattr(disk, "OWNER", "raise OSError(38, 'Function not implemented')")


def link_of_nothing(patch: Patch, folder: Path) -> None:
    patch.setattr(disk, "link_or_copy", lambda source, target: target.mkdir())


def no_memory_map(patch: Patch, folder: Path) -> None:
    real = np.memmap

    def refuse(path: Path, **settings: Any) -> Any:
        if ".verify " in str(path):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real(path, **settings)

    patch.setattr(np, "memmap", refuse)


def stale_memory_map(patch: Patch, folder: Path) -> None:
    real = np.memmap
    patch.setattr(np, "memmap", lambda path, **settings: real(path, **settings)[:-1] if ".verify " in str(path) else real(path, **settings))


def results_below_a_file(patch: Patch, folder: Path) -> None:
    (folder / "project").touch()


def full_disk(patch: Patch, folder: Path) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))


def documents_cut(patch: Patch, folder: Path) -> None:
    real = Tokens.documents
    patch.setattr(Tokens, "documents", lambda self: [ids[:-1] for ids in real(self)])


def tokenizer_that_loses(patch: Patch, folder: Path) -> None:
    patch.setattr(tokens, "load_tokenizer", Losing)


class Losing:
    """A tokenizer whose texts come back without their line ends."""

    def __init__(self, folder: Path) -> None:
        self.real = load_tokenizer(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.real.decode(ids, skip_special_tokens=skip_special_tokens).replace("\n", "")


def blind_checksum(patch: Patch, folder: Path) -> None:
    patch.setattr(tokens, "damage", lambda path, facts: None)


def checksum_that_cries(patch: Patch, folder: Path) -> None:
    patch.setattr(tokens, "damage", lambda path, facts: f"{path} differs from its SHA-256 checksum")


def batch_with_a_memory(patch: Patch, folder: Path) -> None:
    """Right for steps that are asked for in order, as a run does it, and wrong for one that is asked for again."""
    real = PackedBatches.batch

    def batch(self: PackedBatches, step: int, size: int) -> Any:
        self.newest = max(step, getattr(self, "newest", 0))  # type: ignore[attr-defined]
        return real(self, self.newest, size)  # type: ignore[attr-defined]

    patch.setattr(PackedBatches, "batch", batch)


def noise_in_training(patch: Patch, folder: Path) -> None:
    """One bit of one weight, in every other run."""
    real, calls = Constraint.project, []

    def project(self: Constraint, *arguments: Any) -> None:
        real(self, *arguments)
        calls.append(1)
        if len(calls) == 12:
            with torch.no_grad():
                weight = self.parameters[0]
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))

    patch.setattr(Constraint, "project", project)


def optimiser_forgotten(patch: Patch, folder: Path) -> None:
    patch.setattr(optim, "restore", lambda *arguments: None)


def checkpoints_unseen(patch: Patch, folder: Path) -> None:
    patch.setattr(Checkpoints, "newest", lambda self: None)


def log_kept_twice(patch: Patch, folder: Path) -> None:
    real = repetition.trained

    def trained(split: Path, place: Path, stop: Any) -> repetition.Outcome:
        found = real(split, place, stop)
        return repetition.Outcome(found.weights, found.metrics * (1 + len(found.resumed_at)), found.resumed_at)

    patch.setattr(repetition, "trained", trained)


def child_that_fails(patch: Patch, folder: Path) -> None:
    patch.setattr(repetition, "killed_child", lambda *arguments: child.killed_child("-c", "raise SystemExit('out of memory')"))


def no_projection(patch: Patch, folder: Path) -> None:
    patch.setattr(Constraint, "project", lambda self, *arguments: None)


def no_clamp(patch: Patch, folder: Path) -> None:
    patch.setattr(convert, "start_within", lambda *arguments: {})


def activation_kept(patch: Patch, folder: Path) -> None:
    patch.setattr(convert, "set_activation", lambda model, name: None)


def certificate_for_everybody(patch: Patch, folder: Path) -> None:
    real = conversion.certify
    good = {"constraint_holds": True, "ffn_monotone": True}
    patch.setattr(conversion, "certify", lambda *arguments: real(*arguments) | good)


def certificate_of_a_falling_model(patch: Patch, folder: Path) -> None:
    no_clamp(patch, folder)
    certificate_for_everybody(patch, folder)


def attack_that_flips_nothing(patch: Patch, folder: Path) -> None:
    patch.setattr(hotflip, "ADMITTED", 99.0)


def attack_by_gradient_alone(patch: Patch, folder: Path) -> None:
    real = hotflip.first_order_candidates
    patch.setattr(hotflip, "first_order_candidates", lambda *arguments: real(*arguments)[:1])


def attack_that_boasts(patch: Patch, folder: Path) -> None:
    real = Scorer._losses
    patch.setattr(Scorer, "_losses", lambda *arguments: real(*arguments) * 1.01)


def chance_as_good(patch: Patch, folder: Path) -> None:
    patch.setattr(attack, "random_control", lambda *arguments: [15.0] * 8)


def blank_figure(patch: Patch, folder: Path) -> None:
    real = Figure.savefig

    def save(self: Figure, path: Path) -> None:
        self.clear()
        real(self, path)

    patch.setattr(Figure, "savefig", save)


def no_pdf(patch: Patch, folder: Path) -> None:
    real = Figure.savefig
    patch.setattr(Figure, "savefig", lambda self, path: real(self, path, format="png"))


def lax_json(patch: Patch, folder: Path) -> None:
    patch.setattr(report, "write_json", lambda path, value: path.write_text(json.dumps(value)))


def coarse_json(patch: Patch, folder: Path) -> None:
    real = report.write_json

    def write(path: Path, value: dict[str, Any]) -> None:
        real(path, {name: round(part, 6) if isinstance(part, float) and part == part else part for name, part in value.items()})

    patch.setattr(report, "write_json", write)


def some_gpu(patch: Patch, free: float = 60.0, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> None:
    """The CPU in the place of a GPU of 80 GiB, in the eyes of its own check alone."""
    card = {"is_available": lambda: True, "mem_get_info": lambda: (free * 2**30, 80 * 2**30), "get_device_name": lambda: "A card"}
    patch.setattr(machine, "torch", SimpleNamespace(**vars(torch) | {"cuda": SimpleNamespace(**card), "matmul": product}))
    patch.setattr(machine, "DEVICE", "cpu")


def gpu_that_gives_nan(patch: Patch, folder: Path) -> None:
    some_gpu(patch, product=lambda a, b: torch.full((512, 512), float("nan")))


def gpu_that_is_off(patch: Patch, folder: Path) -> None:
    some_gpu(patch, product=lambda a, b: (a @ b) * 1.1)


def gpu_without_a_fitting_torch(patch: Patch, folder: Path) -> None:
    def refuse(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    some_gpu(patch, product=refuse)


# One plant for each way in which a check can notice: (check, plant, words that must be said)
PLANTS: list[tuple[str, Plant, str]] = [
    ("packages", old_package, "numpy is 1.26.4, expected 2.0 or newer; "),
    ("packages", broken_package, "zstandard 0.25.0 cannot be imported (ModuleNotFoundError: "),
    ("packages", absent_package, "no-such-package is not installed, expected 1.5 or newer; "),
    ("packages", old_python, "expected 3.99 or newer; "),
    ("packages", unreadable_requirements, "environment.sh: found no line "),
    ("presets", broken_preset, "training.stepps: unknown key; did you mean 'training.steps'?"),
    ("presets", broken_cluster, "network: found 'sometimes', expected: "),
    ("presets", no_clusters, "found 11 presets and 0 clusters in "),
    ("file systems", replace_copies_over, "replacing a file: a reader sees the old file change"),
    ("file systems", replace_copies_anew, "replacing a file: found a copy with 'new', expected the renamed file itself"),
    ("file systems", replace_copies_folders, "replacing a folder: found a copy with ['new'], expected the renamed folder itself"),
    ("file systems", no_sync_of_folders_with_blanks, "replacing a file: refused (Invalid argument); choose another folder (paths.work"),
    ("file systems", lock_for_everybody, "locking: two processes hold it at the same time"),
    ("file systems", lock_for_ever, "locking: it stays when its owner dies"),
    ("file systems", lock_unknown, "OSError: [Errno 38] Function not implemented"),
    ("file systems", link_of_nothing, "linking or copying: "),
    ("file systems", no_memory_map, "mapping a file to memory: refused (No such device)"),
    ("file systems", stale_memory_map, "mapping a file to memory: found other numbers than were written"),
    (
        "file systems",
        results_below_a_file,
        "foundation_llm_final_results cannot be written: Not a directory; choose another folder (",
    ),
    ("free space", full_disk, "0 GB free, about 0 GB needed; make room or set paths.work"),
    ("tokens", documents_cut, "documents read back differ from those written; "),
    ("tokens", tokenizer_that_loses, "a text that is encoded and decoded comes out as another one"),
    ("tokens", blind_checksum, "a changed bit is not noticed by its checksum"),
    ("tokens", checksum_that_cries, "differs from its SHA-256 checksum"),
    ("tokens", batch_with_a_memory, "batch 3 depends on what was asked for before it"),
    ("determinism", noise_in_training, "two equal runs of 8 steps on 1 threads: "),
    ("kill and resume", optimiser_forgotten, "is not the uninterrupted one: "),
    ("kill and resume", checkpoints_unseen, "a run killed after step 5 went on from the start, expected step 3"),
    ("kill and resume", log_kept_twice, "the weights are equal, the logged losses differ"),
    ("kill and resume", child_that_fails, "did not get to the middle of its work within 60 s: out of memory"),
    ("conversion", no_projection, "the projection leaves a negative weight negative"),
    ("conversion", no_clamp, "a converted model is not monotone: the map into the hidden layer has negative entries; "),
    ("conversion", activation_kept, "a converted model is not monotone: the activation GELUActivation decreases"),
    ("conversion", certificate_for_everybody, "one planted negative weight: the certificate counts 1 and says that all is well"),
    ("conversion", certificate_of_a_falling_model, "a model is certified whose output falls by "),
    ("attack", attack_that_flips_nothing, "HotFlip wrote the tokens [], expected the planted 8 2 times"),
    ("attack", attack_by_gradient_alone, "HotFlip wrote the tokens [9, 9], expected the planted 8 2 times"),
    ("attack", attack_that_boasts, "nats per token, the exhaustive search reaches "),
    ("attack", chance_as_good, "expected less than half of it"),
    ("report", blank_figure, "curves.png: the picture is blank"),
    ("report", no_pdf, "curves.pdf: found no PDF"),
    ("report", lax_json, "a NaN was written, which other programs cannot read"),
    ("report", coarse_json, "numbers.json: wrote {'a third': 0.333"),
    ("GPU", gpu_that_gives_nan, "a bf16 product is off by nan of its largest entry, expected less than 0.02"),
    ("GPU", gpu_that_is_off, "a bf16 product is off by 0.1"),
    ("GPU", gpu_without_a_fitting_torch, "CUDA error: no kernel image is available for execution on the device; install the torch build"),
]
