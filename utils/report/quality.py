"""How good the models are: test loss, perplexity and their ratios, paired by document; benchmarks, paired by item."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd

from utils.report.numbers import NATS, PERPLEXITY, RATIO, SHARE, Number, Source
from utils.report.study import Study
from utils.statistics import resampling


def loss(study: Study, model: str, subset: str | None = None) -> Number:
    """Test loss in nats per token, documents as clusters."""
    return _weighted(study, _nats(study, model, subset), subset, f"summed nats over summed tokens of {model}", model)


def loss_difference(study: Study, model: str, other: str, subset: str | None = None) -> Number:
    """Nats per token, `model` minus `other`, paired by document (and seed)."""
    difference = (_nats(study, model, subset) - _nats(study, other, subset)).dropna(how="all").dropna(axis=1)
    return _weighted(study, difference, subset, f"summed nats over summed tokens, {model} minus {other}, paired by document", model, other)


def perplexity_of(study: Study, model: str, subset: str | None = None) -> Number:
    return loss(study, model, subset).exp(PERPLEXITY)


def perplexity_ratio(study: Study, model: str = "monotonic", other: str = "baseline") -> Number:
    """The primary endpoint, for its defaults."""
    return loss_difference(study, model, other).exp(RATIO)


def ratio_by_seed(study: Study, model: str = "monotonic", other: str = "baseline") -> dict[int, float]:
    """Perplexity ratio within each seed that has both."""
    difference = (_nats(study, model) - _nats(study, other)).dropna(how="all").dropna(axis=1)
    rates = difference.sum(axis=1) / _tokens(study)[difference.columns].sum()
    return {int(seed): Number(rate, None, None, 1).exp(RATIO).value for seed, rate in rates.items()}


@lru_cache(maxsize=256)
def _nats(study: Study, model: str, subset: str | None = None) -> pd.DataFrame:
    return study.matrix(study.documents, "document", "nll", _where(subset, model))


def _tokens(study: Study) -> pd.Series:
    return study.documents.groupby("document")["tokens"].first()


def _where(subset: str | None, *models: str) -> dict[str, tuple[str, ...]]:
    return {"model": models} | ({} if subset is None else {"subset": (subset,)})


def _weighted(study: Study, nats: pd.DataFrame, subset: str | None, how: str, *models: str) -> Number:
    report = study.config.report
    tokens = _tokens(study)[nats.columns]
    estimate = resampling.weighted_mean(nats.to_numpy(), tokens.to_numpy(), report.confidence, report.bootstrap_draws)
    source = Source("evaluation_records", _where(subset, *models), ("nll", "tokens"))
    return Number.of(estimate, NATS, f"{how}; {study.resampled(nats)}", source)


def benchmark_tasks(study: Study) -> list[tuple[str, str]]:
    """(task, metric) of every benchmark."""
    return sorted(set(zip(study.benchmarks["task"], study.benchmarks["metric"], strict=True))) if len(study.benchmarks) else []


def in_words(metric: str) -> str:
    """An item of lm-eval's `perplexity` is a log-likelihood; only the exponential of their negative mean is a perplexity."""
    return "log-likelihood of an item, nats" if metric.partition(",")[0] == "perplexity" else metric


def benchmark(study: Study, task: str, metric: str, model: str, minus: str | None = None) -> Number | None:
    """Mean over the items of a task, or the difference of two models paired by item; None where a model was not measured."""
    models = (model,) if minus is None else (model, minus)
    if not set(models) <= set(study.benchmarks["model"]):
        return None
    scores = [study.matrix(study.benchmarks, "item", "value", {"task": [task], "metric": [metric], "model": [one]}) for one in models]
    matrix = scores[0] if minus is None else (scores[0] - scores[1]).dropna(how="all").dropna(axis=1)
    if matrix.empty:
        return None
    unit = SHARE if study.benchmarks["value"][study.benchmarks["metric"] == metric].between(0, 1).all() else "as recorded"
    source = Source("benchmark_records", {"task": (task,), "metric": (metric,), "model": models}, ("value",))
    return study.mean(matrix, unit, f"{in_words(metric)} of {task}, {' minus '.join(models)}", source, least=0.0 if minus is None else -1.0)
