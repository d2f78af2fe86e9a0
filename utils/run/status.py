"""How far a run is, read from its folders; nothing is started or changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Experiment
from utils.run import manifest
from utils.run.artifacts import Listed, damage, read_json
from utils.run.errors import InputError
from utils.run.folders import Folders
from utils.run.progress import Reported, duration
from utils.run.stage import Stage


@dataclass
class Row:
    """One stage of one seed (None: over all seeds). `job` and `slurm` are for those who know of a queue."""

    stage: Stage
    seed: int | None
    state: str = "not begun"
    progress: str = ""
    speed: str = ""
    left: str = ""
    in_job: str = ""
    checkpoint: str = ""
    starts: str = ""
    job: str = ""
    slurm: str = ""

    def cells(self) -> list[str]:
        who = [f"{self.stage.number} {self.stage.name}", "all" if self.seed is None else str(self.seed)]
        return [*who, self.state, self.progress, self.speed, self.left, self.in_job, self.checkpoint, self.starts, self.job, self.slurm]


HEADS = ["stage", "seed", "state", "progress", "tokens/s", "left", "in the job", "checkpoint", "starts", "job", "SLURM"]


def rows(pipeline: Sequence[Stage], config: Experiment) -> list[Row]:
    """What the folders tell of every stage and seed."""
    folders = Folders.of(config.paths, config.run_name)
    found = []
    for stage in pipeline:
        for seed in config.seeds if stage.every_seed else (None,):
            row = Row(stage, seed)
            try:
                _read(row, stage.folder(folders, seed or 0))
                if row.state == "complete" and seed is None and _partial(stage, config, folders):
                    row.state = "partial"
            except (InputError, OSError, KeyError, TypeError) as error:
                row.state, row.progress = "damaged", str(error)
            found.append(row)
    return found


def _read(row: Row, folder: Path) -> None:
    if done := manifest.completed(folder):
        row.state, row.starts, row.progress = "complete", str(len(done["starts"])), str(done["finished"])
    elif begun := manifest.started(folder):
        row.state, row.starts = "begun", str(len(begun["starts"]))
        row.checkpoint = newest_checkpoint(folder / "state" / "checkpoints")
        if (folder / "state" / "progress.json").exists():
            facts = read_json(folder / "state" / "progress.json", Reported)
            row.progress = f"{facts['label']} {facts['done']}/{facts['total']}" + (f", {facts['note']}" if facts["note"] else "")
            row.speed = f"{facts['tokens_per_second']:,.0f}" if facts["tokens_per_second"] else ""
            row.left = duration(facts["seconds_left"]) if facts["seconds_left"] else ""
            row.in_job = _in_job(facts.get("deadline"), facts.get("fits"))


def _partial(stage: Stage, config: Experiment, folders: Folders) -> bool:
    """Whether a summary was made while some seeds lacked something."""
    done = manifest.completed(stage.folder(folders, 0))
    return done is not None and len(done["identity"]["inputs"]) < len(stage.reads) * len(config.seeds)


def _in_job(deadline: float | None, fits: bool | None) -> str:
    """How long the job at work may go on, and whether it will get through; nothing once that time is over."""
    left = 0.0 if deadline is None else deadline - time.time()
    return "" if left <= 0 else duration(left) + {None: "", True: ", enough", False: ", not enough"}[fits]


def newest_checkpoint(folder: Path) -> str:
    """Name of the newest checkpoint whose files have their sizes (their checksums are looked at when it is loaded)."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            if damage(path, read_json(path / "manifest.json", Listed)["files"], contents=False) is None:
                return path.name
        except (InputError, OSError):
            continue
    return ""


def table(found: Sequence[Row]) -> str:
    """Columns that have something in them, aligned."""
    lines = [HEADS, *(row.cells() for row in found)]
    used = [column for column in range(len(HEADS)) if any(line[column] for line in lines[1:])]
    widths = {column: max(len(line[column]) for line in lines) for column in used}
    return "\n".join("  " + "  ".join(line[column].ljust(widths[column]) for column in used).rstrip() for line in lines)


def status_table(pipeline: Sequence[Stage], config: Experiment) -> str:
    """The run's place and its table, from the folders alone."""
    return f"run {config.run_name} in {Folders.of(config.paths, config.run_name).run}\n{table(rows(pipeline, config))}"
