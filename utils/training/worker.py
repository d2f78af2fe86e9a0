"""One process of a training run on several GPUs: `python -m utils.training.worker SPEC.json`, started by `launch`."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from configs.schema import Experiment, Monotone
from utils.run.artifacts import read_json
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.preemption import SIGNALS, die_with_parent
from utils.run.progress import Report
from utils.run.trouble import explained
from utils.training.distributed import joined
from utils.training.launch import StopFile
from utils.training.loop import train
from utils.training.recovery import Files, prepared


def main(path: str) -> int:
    """Train as the file says; returns an exit code."""
    die_with_parent()
    for number in SIGNALS:  # they are for the stage's process, which asks through a file
        signal.signal(number, signal.SIG_IGN)
    spec = read_json(Path(path))
    config = Experiment.model_validate_json(spec["config"])
    constraint = Monotone.model_validate(spec["constraint"]) if spec["constraint"] else None
    files = Files(**{name: Path(value) for name, value in spec["files"].items() if value is not None})
    try:
        with ExitStack() as stack:
            world = stack.enter_context(joined(config.compute.parallel))
            stop = StopFile(files.state / "stop")
            if world.first:
                stack.enter_context(Report.into(files.state / "progress.json", stop.deadline))
            train(prepared(config, spec["seed"], spec["learning_rate"], constraint, files, stop, spec["label"], world))
    except StoppedInTime as reason:
        print(f"  {reason}", flush=True)
        return STOPPED
    except (InputError, WorkFailed) as error:
        print(f"  {error}", file=sys.stderr, flush=True)
        return REFUSED if isinstance(error, InputError) else FAILED
    except Exception as error:
        if (words := explained(error, files.state)) is None:
            raise
        print(f"  {words}", file=sys.stderr, flush=True)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
