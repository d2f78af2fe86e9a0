"""One process of an attack stage on several GPUs: `python -m utils.attacks.worker SPEC.json`, started by `launch`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from configs.schema import Experiment
from utils.attacks.flip_study import FlipStudy
from utils.attacks.study import Files, Study
from utils.attacks.trigger_study import TriggerStudy
from utils.models.loading import device_of
from utils.run.artifacts import read_json
from utils.run.launch import StopFile, end_of_several, place
from utils.run.progress import Report
from utils.run.units import Place, Share

STUDIES: dict[str, type[Study]] = {study.__name__: study for study in (FlipStudy, TriggerStudy)}


def main(path: str) -> None:
    """Do this process's share as the file says."""
    spec, (rank, size, local) = read_json(Path(path)), place()
    config, files, tasks = Experiment.model_validate_json(spec["config"]), Files.read(spec["files"]), spec["tasks"]
    if device_of(config.compute).type == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    study, stop = STUDIES[spec["study"]](config, files), StopFile(Path(spec["stop"]))
    mine = Place(spec["task"] * size + rank, tasks * size, waits=tasks == 1)
    with Report.into(files.state / "progress.json", stop.deadline) if rank == 0 else nullcontext():
        Share(study.ready, study.folder, stop, mine, speaks=rank == 0).run()


if __name__ == "__main__":
    end_of_several(lambda: main(sys.argv[1]))
