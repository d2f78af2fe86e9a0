"""Where a run lives on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

from configs.schema import Paths
from utils.run.errors import InputError


@dataclass(frozen=True)
class Folders:
    """Absolute folders of one run."""

    work: Path
    results: Path
    cache: Path
    run_name: str

    @classmethod
    def of(cls, paths: Paths, run_name: str) -> Folders:
        scratch = Path(os.environ.get("SCRATCH") or "runs")
        project = Path(os.environ.get("PROJECT") or ".")
        return cls(
            work=_absolute(paths.work or scratch / "foundation_llm_work"),
            results=_absolute(paths.results or project / "foundation_llm_final_results"),
            cache=_absolute(paths.cache or scratch / "foundation_llm_cache"),
            run_name=run_name,
        )

    @property
    def run(self) -> Path:
        return self.work / self.run_name

    @property
    def final(self) -> Path:
        """Results of this run."""
        return self.results / self.run_name

    @property
    def summary(self) -> Path:
        """Always the newest finished run's summary."""
        return self.results / "experiment_summary.txt"


def _absolute(path: Path) -> Path:
    if any(category(each) in ("Cc", "Cs") for each in str(path)):  # Cs: bytes that are no UTF-8
        raise InputError(
            f"paths: found {str(path)!r}, expected UTF-8 without line ends and other control characters; choose another folder"
        )
    try:
        return path.expanduser().resolve()
    except RuntimeError as error:
        raise InputError(f"paths: {path}: {error}; write the folder out") from None
