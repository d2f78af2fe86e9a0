"""One process of a training run on several GPUs: `python -m utils.training.worker SPEC.json`, started by `launch`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from configs.schema import Experiment, Monotone
from utils.run.artifacts import read_json
from utils.run.launch import StopFile, end_of_several
from utils.run.progress import Report
from utils.training.distributed import joined
from utils.training.loop import train
from utils.training.recovery import Files, prepared


def main(path: str) -> None:
    """Train as the file says."""
    spec = read_json(Path(path))
    config = Experiment.model_validate_json(spec["config"])
    constraint = Monotone.model_validate(spec["constraint"]) if spec["constraint"] else None
    files = Files(**{name: Path(value) for name, value in spec["files"].items() if value is not None})
    with ExitStack() as stack:
        world = stack.enter_context(joined(config.compute.parallel))
        stop = StopFile(files.state / "stop")
        if world.first:
            stack.enter_context(Report.into(files.state / "progress.json", stop.deadline))
        train(prepared(config, spec["seed"], spec["learning_rate"], constraint, files, stop, spec["label"], world))


if __name__ == "__main__":
    end_of_several(lambda: main(sys.argv[1]))
