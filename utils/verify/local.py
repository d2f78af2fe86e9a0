"""All checks of this machine, in order. Nothing is fetched, and nothing stays behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.schema import Compute, Experiment
from utils.models.loading import device_of
from utils.run.checks import Check, Finding, examined
from utils.run.folders import Folders
from utils.run.places import unwritable, visited
from utils.verify.attack import attack
from utils.verify.conversion import conversion
from utils.verify.disk import files, space
from utils.verify.machine import gpu, slurm
from utils.verify.presets import presets
from utils.verify.repetition import Repetition
from utils.verify.report import report
from utils.verify.tokens import tokens

FAULT = "with the packages of requirements.txt this cannot be; run bash run_tests.sh, and report what it says"
THREADS = "set compute.threads=1, and if that does not help run bash run_tests.sh and report what it says"


def local_checks(config: Experiment, folders: Folders) -> Iterator[Check]:
    """Each check as soon as it is known. They work in the run's own folder, with as many threads as the run; below 1 GB, on a CPU."""
    device_of(Compute(device="cpu", threads=config.compute.threads))
    with visited(folders.work):
        place = None if unwritable("paths.work", folders.work) else folders.work
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=place) as folder:
            for name, (remedy, look) in _looks(config, folders, Path(folder)).items():
                yield examined(name, remedy, look)


def _looks(config: Experiment, folders: Folders, folder: Path) -> dict[str, tuple[str, Callable[[], Finding]]]:
    """{name: (what to do about a `no`, how to look)}."""
    repetition = Repetition(folder / "training")
    return {
        "presets": ("correct the file, or take it from git again: git checkout -- configs", presets),
        "file systems": ("", lambda: files(folders)),
        "free space": ("", lambda: space(config, folders)),
        "tokens": (FAULT, lambda: tokens(folder)),
        "determinism": (THREADS, repetition.twice),
        "kill and resume": (THREADS, repetition.killed),
        "conversion": (FAULT, lambda: conversion(folder / "model")),
        "attack": (FAULT, attack),
        "report": (FAULT, lambda: report(config, folder / "report")),
        "GPU": ("install the torch build for this driver and card (the selector on PyTorch's site)", lambda: gpu(config.compute)),
        "SLURM": ("", slurm),
    }
