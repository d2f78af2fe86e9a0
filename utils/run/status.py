"""How far a run is, read from its folders; nothing is started or changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.schema import Experiment
from utils.run import manifest
from utils.run.errors import InputError
from utils.run.folders import Folders
from utils.run.stage import Stage


def status_table(pipeline: Sequence[Stage], config: Experiment) -> str:
    """One line for each stage and seed: complete, begun (with the newest checkpoint) or not begun."""
    folders = Folders.of(config.paths, config.run_name)
    lines = [f"run {config.run_name} in {folders.run}"]
    for stage in pipeline:
        for seed in config.seeds if stage.every_seed else (None,):
            folder = stage.folder(folders, seed or 0)
            who = f"stage {stage.number} {stage.name}" + (f", seed {seed}" if seed is not None else "")
            lines.append(f"  {who:<36} {_state(folder)}")
    return "\n".join(lines)


def _state(folder: Path) -> str:
    try:
        if done := manifest.completed(folder):
            return f"complete, {done['finished']}, {len(done['starts'])} start(s)"
        if begun := manifest.started(folder):
            steps = sorted((folder / "state" / "checkpoints").glob("step_*"))
            newest = f", checkpoint {steps[-1].name}" if steps else ""
            return f"begun, {len(begun['starts'])} start(s){newest}"
    except (InputError, OSError) as error:
        return f"damaged: {error}"
    return "not begun"
