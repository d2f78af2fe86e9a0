"""How far universal triggers raise the loss of held-out texts, nats per token of the text. For verdicts the unit is the search."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd

from utils.report.numbers import NATS, Number, Source
from utils.report.study import ARMS, Study
from utils.statistics import resampling

CHOSEN = "chosen"


def trigger_rise(study: Study, model: str, trigger: str, zero: str = "clean") -> Number:
    """Held-out rise of `model` under a trigger against another (no trigger by default), nats per token of the text."""
    difference = _behind(study, model, trigger) - _behind(study, model, zero)
    source = Source("uat_records", {"model": (model,), "trigger": (*_names(study, trigger), zero)}, ("nll",))
    return study.mean(difference.dropna(how="all").dropna(axis=1), NATS, f"rise behind the trigger {trigger} against {zero}", source)


def searched(study: Study) -> list[str]:
    """Models on which a trigger was searched and then reported."""
    return [model for model in study.triggered if ((study.triggers["model"] == model) & (study.triggers["trigger"] == model)).any()]


def trigger_difference(study: Study) -> Number | None:
    """Rise under the own trigger, monotonic minus baseline; None where either was not attacked.

    The unit is the search: two searches on one model differ more than two texts do, so an interval over texts would claim what a
    repetition refutes. From three seeds on it is the chosen trigger of each seed, before that every restart that both models have
    in the records. No interval from fewer than three.
    """
    ours, theirs = (_searches(study, model) for model in ("monotonic", "baseline"))
    common = [search for search in ours if search in theirs]
    restarts = [search for search in common if search[1] != CHOSEN]
    chosen = [search for search in common if search[1] == CHOSEN]
    unit, used = ("restart", restarts) if restarts and len(chosen) < 3 else ("chosen trigger of a seed", chosen)
    if not used:
        return None
    estimate = resampling.student_mean([ours[search] - theirs[search] for search in used], study.config.report.confidence)
    names = sorted({name for name in study.triggers["trigger"] if name.startswith("restart_") or name in ("clean", *ARMS)})
    source = Source("uat_records", {"model": ARMS, "trigger": tuple(names)}, ("nll",))
    return Number.of(estimate, NATS, f"rise under the own trigger, monotonic minus baseline; Student's interval, unit: {unit}", source)


def _searches(study: Study, model: str) -> dict[tuple[int, str], float]:
    """{(seed, search): mean rise over the held-out texts} of the triggers that were searched on the model itself."""
    nll = study.triggers[study.triggers["model"] == model].groupby(["seed", "trigger"])["nll"].mean()
    found = {}
    for (seed, name), loss in nll.items():
        search, _, target = name.partition(":")
        if name == model or (search.startswith("restart_") and target == model):
            found[seed, CHOSEN if name == model else search] = float(loss - nll[seed, "clean"])
    return found


@lru_cache(maxsize=256)
def _behind(study: Study, model: str, trigger: str) -> pd.DataFrame:
    return study.matrix(study.triggers, "text", "nll", {"model": [model], "trigger": _names(study, trigger)})


def _names(study: Study, trigger: str) -> list[str]:
    """All random triggers stand for one: their mean."""
    return [name for name in study.triggers["trigger"].unique() if name.startswith("random_")] if trigger == "random" else [trigger]
