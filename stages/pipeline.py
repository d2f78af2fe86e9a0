"""The pipeline from the top: eight stages in order, the command line of each, and the graph that follows from reads and writes."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from configs.presets import ConfigError, load
from configs.schema import Experiment
from utils.run.environment import keep_others_from_writing
from utils.run.errors import REFUSED
from utils.run.preemption import Stop
from utils.run.stage import Stage, producer, run_stage

MODULES = (
    "stage_0_setup",
    "stage_1_monotonicity",
    "stage_2_train_baseline",
    "stage_3_train_monotonic",
    "stage_4_evaluate",
    "stage_5_uat",
    "stage_6_hotflip",
    "stage_7_aggregate",
)


def stages() -> tuple[Stage, ...]:
    """All declarations, in order. Importing them costs nothing: a stage imports its libraries when it runs."""
    return tuple(importlib.import_module(f"stages.{name}").STAGE for name in MODULES)


def depends_on(stage: Stage, pipeline: Sequence[Stage]) -> list[int]:
    """Numbers of the stages whose artefacts a stage reads, leaving out those that another of them already waits for."""
    direct = {producer(pipeline, name).number for name in stage.reads}
    implied = {earlier for number in direct for earlier in _ancestors(number, pipeline)}
    return sorted(direct - implied)


def _ancestors(number: int, pipeline: Sequence[Stage]) -> set[int]:
    direct = {producer(pipeline, name).number for name in pipeline[number].reads}
    return direct.union(*(_ancestors(earlier, pipeline) for earlier in direct))


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="NAME|FILE", help="a preset, or a YAML file (default: mini; on a cluster pythia-1.4b)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key; repeatable")
    parser.add_argument("--run-name", metavar="NAME", help="name of the run's folders (default: the preset's)")
    parser.add_argument("--seeds", metavar="N,N,...", help="training seeds (default: the preset's)")
    parser.add_argument("--discard", action="store_true", help="move aside what was made by another configuration, and start it afresh")


def experiment(options: argparse.Namespace, default: str = "mini") -> Experiment:
    """The resolved configuration. Raises ConfigError."""
    overrides = list(options.overrides)
    if options.run_name is not None:
        overrides.append(f"run_name={json.dumps(options.run_name)}")
    if options.seeds is not None:
        overrides.append(f"seeds=[{options.seeds}]")
    return load(options.config or default, overrides)


def main(stage: Stage, arguments: Sequence[str] | None = None) -> None:
    """Command line of one stage script; exits with the stage's code."""
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage.label}", description=stage.purpose)
    add_experiment_options(parser)
    parser.add_argument("--seed", type=int, help="run this one of the seeds (default: all of them in turn)")
    options = parser.parse_args(arguments)
    keep_others_from_writing()
    try:
        config = experiment(options)
        if options.seed is not None and options.seed not in config.seeds:
            options.seeds = str(options.seed)
            config = experiment(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    seeds = (config.seeds if options.seed is None else (options.seed,)) if stage.every_seed else config.seeds[:1]
    sys.exit(run_each([stage], config, seeds, options.discard))


def run_each(chosen: Sequence[Stage], config: Experiment, seeds: Sequence[int], discard: bool) -> int:
    """Run stages in this process, one after the other, each for every seed; the first exit code that is not 0 ends it."""
    stop, pipeline = Stop(), stages()
    stop.listen()
    for stage in chosen:
        for seed in seeds if stage.every_seed else config.seeds[:1]:
            if code := run_stage(stage, config, seed, pipeline, stop, discard):
                return code
    return 0
