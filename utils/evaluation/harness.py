"""The lm-evaluation-harness (package lm_eval) on models in memory, zero-shot. Only importing this file needs the package."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lm_eval
from huggingface_hub import constants
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, PreTrainedModel

from configs.schema import Experiment
from utils.run import hub
from utils.run.errors import InputError
from utils.run.preemption import Stop
from utils.run.records import Row
from utils.run.trouble import exhausted

OWN = "datasets"  # folder of the items in the run's cache
VERSION = f"lm_eval {version('lm_eval')}"
FEWSHOT_SEED = 0  # nothing is drawn without examples, but the harness asks for one
Tasks = dict[str, dict[str, Task]]
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(names: Sequence[str], root: Path) -> Tasks:
    """{entry of evaluate.benchmarks: {task: its items}}, fetched if they are not there; a group has several tasks.

    An entry is a task of the harness or a YAML file. Items lie in `root`, the run's own cache, unless the user has a place for them
    (HF_HOME, HF_DATASETS_CACHE). Raises InputError for an unknown task, and if its items cannot be had.
    """
    constants.HF_HUB_CACHE = str(hub.root(root))
    if not (os.environ.get("HF_HOME") or os.environ.get("HF_DATASETS_CACHE")):
        datasets.config.HF_DATASETS_CACHE = root / OWN
    datasets.disable_progress_bars()
    return {name: _load(_manager(not _is_file(name)), name) for name in names}


@cache
def _manager(known: bool) -> TaskManager:
    """`known`: with the harness's own tasks, thousands of files that take seconds to read."""
    return TaskManager(include_defaults=known)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager: TaskManager, name: str) -> dict[str, Task]:
    if not (Path(name).is_file() if _is_file(name) else name in manager.all_tasks):
        expected = "an existing file" if _is_file(name) else f"a task of {VERSION}, or a YAML file"
        raise InputError(f"evaluate.benchmarks: found {name!r}, expected {expected}; correct the name ('lm-eval ls tasks' lists all)")
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # whatever the hub, a reader of files or a task's own code raises
        if exhausted(error):
            raise
        said = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"evaluate.benchmarks: the items of {name!r} cannot be had ({type(error).__name__}: {said}). Fetch them once where there is a "
            "network: python verify_downloads.py --full (with this --config), or stage 0; or leave the benchmark out"
        ) from None
    for task in tasks.values():
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


class Harness(HFLM):
    """A loaded model for the harness: products in the run's precision, softmax in fp32, and a stop between two batches."""

    def __init__(self, model: PreTrainedModel, tokenizer: Path, config: Experiment, stop: Stop) -> None:
        self.stop = stop
        super().__init__(
            pretrained=model,
            tokenizer=AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False),
            batch_size=config.evaluate.batch_size,
            max_length=config.evaluate.context,
            mixed_precision_dtype="bfloat16" if config.compute.precision == "bf16" else None,
            softmax_dtype="float32",
        )

    def _model_call(self, *given: Any, **named: Any) -> Any:
        self.stop.check()
        return super()._model_call(*given, **named)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **named: Any) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **named)


def score(harness: HFLM, tasks: dict[str, Task], limit: int) -> dict[str, Any]:
    """Run the tasks on a model: {results: {task: summary}, rows: [{task, item, hash, metric, value}]}.

    `hash` names the item's content. `value` is what the harness aggregates: 0 or 1 for an accuracy, the log-likelihood in nats for a
    perplexity, a share for mc2 of TruthfulQA.
    """
    found = lm_eval.evaluate(harness, {"tasks": tasks}, limit=limit or None, bootstrap_iters=0, log_samples=True)
    rows = [row for task in tasks for sample in found["samples"][task] for row in _rows(task, sample)]
    return {"results": {task: _summary(found["results"][task], rows, task) for task in tasks}, "rows": rows}


def _rows(task: str, sample: dict[str, Any]) -> Iterable[Row]:
    for metric in sample["metrics"]:
        name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
        item = {"task": task, "item": sample["doc_id"], "hash": sample["doc_hash"][:16], "metric": name}
        value = sample[metric]
        yield item | {"value": [float(part) for part in value] if isinstance(value, (list, tuple)) else float(value)}


def _summary(aggregated: dict[str, Any], rows: Sequence[Row], task: str) -> dict[str, Any]:
    """{metric: {value (the harness's own), items, mean and standard error of the items' values where these are numbers}}."""
    found: dict[str, Any] = {}
    for metric in dict.fromkeys(row["metric"] for row in rows if row["task"] == task):
        values = [row["value"] for row in rows if (row["task"], row["metric"]) == (task, metric)]
        found[metric] = {"value": aggregated[metric if "," in metric else f"{metric},none"], "items": len(values)}
        if all(isinstance(value, float) for value in values):
            error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            found[metric] |= {"mean": fmean(values), "standard_error": error}
    return found


def facts(task: Task) -> dict[str, Any]:
    """What is asked: the version of the task and where its items are from."""
    return {"version": task.VERSION, "dataset": task.DATASET_PATH, "name": task.DATASET_NAME, "items": len(task.eval_docs)}
