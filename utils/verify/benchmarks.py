"""The items of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from utils.run.checks import Finding
from utils.verify.look import Look


def benchmarks(look: Look) -> Finding:
    """Every task is known and its items load; fetched with --full, from the cache alone with --offline."""
    names = look.config.evaluate.benchmarks
    if not names:
        return "skip", "this experiment runs no benchmark"
    if look.mode == "quick":
        return "skip", f"{len(names)} benchmarks; setup fetches their items, and so does --full"
    from utils.evaluation.harness import facts, load_tasks

    with _network(look.online):
        tasks = [task for group in load_tasks(names, look.folders.cache).values() for task in group.values()]
    return "ok", f"{len(tasks)} tasks, {sum(facts(task)['items'] for task in tasks)} items, all here"


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """The library that reads items asks the hub whenever it may."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
