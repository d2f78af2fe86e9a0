"""Benchmarks of stored models, with a record of every item, so that models can be compared item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from configs.schema import Experiment
from utils.models.loading import device_of, load_model
from utils.run.artifacts import left_behind, write_sealed
from utils.run.errors import InputError
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Row, write_rows


class Scored(TypedDict):
    """One model on one benchmark."""

    results: dict[str, Any]
    rows: list[Row]


def fetch_benchmarks(config: Experiment, cache: Path) -> None:
    """Have the items of all benchmarks in the cache, so that later stages need no network. Raises InputError for what cannot be had."""
    if config.evaluate.benchmarks:
        from utils.evaluation.harness import load_tasks

        load_tasks(config.evaluate.benchmarks, cache)


def benchmark_stored(
    config: Experiment, *, models: dict[str, Path], tokenizer: Path, cache: Path, state: Path, records: Path, stop: Stop
) -> dict[str, Any]:
    """Run all benchmarks on stored models; rows go to `records`, the result stands under `benchmarks` in evaluation_results.json.

    What is done of (model, benchmark) lies in `state` and is not done again. Without benchmarks `records` is empty.
    """
    names = config.evaluate.benchmarks
    if not names:
        write_rows(records, [])
        return {}
    from utils.evaluation import harness

    places = {(model, name): state / f"{model}_{number}.json" for model in models for number, name in enumerate(names)}
    tasks = harness.load_tasks(names, cache)
    done = {place: found for place, path in places.items() if (found := left_behind(path, Scored))}
    progress = Progress("benchmarks", len(places), len(done))
    for label, folder in models.items():
        pending = [name for name in names if (label, name) not in done]
        if not pending:
            continue
        judge = harness.Harness(load_model(folder, device_of(config.compute)), tokenizer, config, stop)
        for name in pending:
            stop.check()
            done[label, name] = harness.score(judge, tasks[name], config.evaluate.benchmark_limit)
            write_sealed(places[label, name], done[label, name])
            progress.advance(note=f"{label} {name}")
    progress.close()
    for name in names:
        items = {label: [(row["task"], row["item"], row["hash"]) for row in done[label, name]["rows"]] for label in models}
        if other := next((label for label in models if items[label] != items[next(iter(models))]), None):
            raise InputError(
                f"evaluate.benchmarks: the items of {name!r} changed between {next(iter(models))!r} and {other!r}, which must see the "
                "same; run the stage again with --discard"
            )
    write_rows(records, ({"model": label, **row} for (label, _), found in done.items() for row in found["rows"]))
    return {
        "models": {label: {task: summary for name in names for task, summary in done[label, name]["results"].items()} for label in models},
        "tasks": {task: harness.facts(loaded) for group in tasks.values() for task, loaded in group.items()},
        "harness": harness.VERSION,
        "limit": config.evaluate.benchmark_limit,
        "shots": 0,
    }
