"""How far attacks raise the loss: rise of the loss under flips, paired by text. Nats per untouched token throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import pandas as pd

from utils.report.numbers import NATS, SHARE, Number, P, Source
from utils.report.study import CONTROLS, RANDOM, Study
from utils.statistics import paired
from utils.statistics.estimate import Estimate

WORST = "worst_case"
OWN = "own_searches"  # the worst case without transfers: a control made from the baseline is open to what was found on the baseline
LONGER = "longer"  # has more than the common budget, on some of the texts: a check of HotFlip, and no part of the worst case
TRANSFER = "transfer"
OVER_SEVERAL = (WORST, OWN)  # taken over several attacks
HEADLINES = (WORST, *CONTROLS)  # comparisons of worst cases: with the baseline, and with each matched control


@lru_cache(maxsize=256)
def kinds(study: Study, *models: str) -> tuple[str, ...]:
    """Attacks made on all of these models, in the order of the records."""
    made = [set(study.flips[study.flips["model"] == model]["attack"]) for model in models]
    return tuple(kind for kind in dict.fromkeys(study.flips["attack"]) if all(kind in one for one in made))


def ensemble(study: Study, *models: str, attack: str = WORST) -> list[str]:
    """Attacks of the common budget made on all of these models. Worst cases are taken over these alone, so that no model is attacked
    by more means than the one it is compared with. Nothing for an attack that is none of several, or has nothing to leave out."""
    made = [kind for kind in kinds(study, *models) if kind != LONGER]
    without = [kind for kind in made if kind != TRANSFER]
    return {WORST: made, OWN: without if without != made else []}.get(attack, [])


def rises(study: Study, model: str, attack: str, over: list[str] | None = None, value: str = "rise") -> pd.DataFrame:
    """(S, texts) rise of each text; for the worst case the largest over the attacks `over`. Of several transfers to a model the largest."""
    chosen = (over or ensemble(study, model, attack=attack)) if attack in OVER_SEVERAL else [attack]
    return _largest(study, model, tuple(chosen), value)


@lru_cache(maxsize=256)
def _largest(study: Study, model: str, attacks: tuple[str, ...], value: str) -> pd.DataFrame:
    return study.matrix(study.flips, "text", value, {"model": [model], "attack": attacks}, "max")


def rise(study: Study, model: str, attack: str = "hotflip", over: list[str] | None = None) -> Number:
    over = over or ensemble(study, model, attack=attack)
    return study.mean(rises(study, model, attack, over), NATS, f"rise under {_named(attack, over)}", _source(attack, over, model))


def transferred_rise(study: Study, model: str, found_on: str) -> Number | None:
    """Rise on `model` of flips that were found on another, or on itself (HotFlip); None where that was not tried."""
    attack, found = ("hotflip", "") if model == found_on else (TRANSFER, found_on)
    matrix = study.matrix(study.flips, "text", "rise", {"model": [model], "attack": [attack], "found_on": [found]})
    source = Source("hotflip_records", {"model": (model,), "attack": (f"{attack}:{found}".rstrip(":"),)}, ("nll",))
    return None if matrix.empty else study.mean(matrix, NATS, f"rise under flips found on {found_on}", source)


def random_rise(study: Study, model: str) -> Number:
    """Rise under as many random flips, the control of HotFlip."""
    matrix = rises(study, model, "hotflip", value="random_rise")
    source = Source("hotflip_records", {"model": (model,), "attack": ("hotflip",)}, ("nll", "random_nll"))
    return study.mean(matrix, NATS, "rise under random flips", source)


def curve(study: Study, model: str) -> list[Number]:
    """HotFlip's rise after 0, 1, ... flips."""
    rows = study.flips[(study.flips["model"] == model) & (study.flips["attack"] == "hotflip")]
    length, source = min(rows["nll"].map(len)), _source("hotflip", [], model)
    curves = [rows.assign(after=rows["nll"].map(lambda nll, k=k: nll[k] - nll[0])) for k in range(length)]
    return [study.mean(study.matrix(each, "text", "after", {}), NATS, f"rise after {k} flips", source) for k, each in enumerate(curves)]


def success(study: Study, model: str, attack: str = "hotflip", over: list[str] | None = None) -> Number:
    """Share of the texts whose rise exceeds the threshold common to all models."""
    limit, over = study.config.hotflip.threshold_nats, over or ensemble(study, model, attack=attack)
    matrix = rises(study, model, attack, over) > limit
    return _rate(study, matrix, f"rise above {limit:g} nats under {_named(attack, over)}", _source(attack, over, model))


def _rate(study: Study, hits: pd.DataFrame, how: str, source: Source) -> Number:
    """Share of the texts: Wilson's interval for one seed (or seeds that agree on every text), else bootstrap over texts and seeds."""
    if (hits.nunique() > 1).any():
        return study.mean(hits.astype(float), SHARE, how, source)
    estimate = paired.rate(hits.to_numpy()[0].tolist(), study.config.report.confidence)
    return Number.of(estimate, SHARE, f"share with {how}; Wilson's score interval", source)


def success_difference(study: Study, model: str, other: str, attack: str = "hotflip") -> Number:
    """Success rate of `model` minus `other`: Tango's interval for one seed (or seeds that agree on every text, which leave nothing to
    resample), bootstrap over texts and seeds for several."""
    limit, over = study.config.hotflip.threshold_nats, ensemble(study, model, other, attack=attack)
    ours, theirs = _aligned(rises(study, model, attack, over), rises(study, other, attack, over))
    source = _source(attack, over, model, other)
    how = f"rise above {limit:g} nats under {attack}, {model} minus {other}, paired by text"
    difference = (ours > limit).astype(float) - (theirs > limit).astype(float)
    if (difference.nunique() > 1).any():
        return study.mean(difference, SHARE, how, source, least=-1.0)
    before, after = ((each.to_numpy()[0] > limit).tolist() for each in (theirs, ours))
    estimate = paired.success_difference(before, after, study.config.report.confidence)
    return Number.of(estimate, SHARE, f"{how}; Tango's score interval", source)


def mcnemar_by_seed(study: Study) -> dict[int, dict[str, float | int]]:
    """Exact test of HotFlip's success, baseline (first) against monotonic (second), for each seed."""
    limit = study.config.hotflip.threshold_nats
    first, second = _aligned(*(rises(study, model, "hotflip") > limit for model in ("baseline", "monotonic")))
    return {int(seed): paired.mcnemar(first.loc[seed].tolist(), second.loc[seed].tolist()) for seed in first.index}


def reference_success(study: Study, model: str) -> Number:
    """The reference's criterion: relative rise of the model's own loss over all tokens, flipped ones included."""
    rows = study.flips[study.flips["attack"] == "hotflip"]
    limit = study.config.hotflip.reference_threshold
    rows = rows.assign(above=rows["reference_attacked"] / rows["reference_clean"] - 1 > limit)
    where = {"model": (model,), "attack": ("hotflip",)}
    source = Source("hotflip_records", where, ("reference_clean", "reference_attacked"))
    return _rate(study, study.matrix(rows, "text", "above", where, "max"), f"own loss up by {100 * limit:g} %, all tokens scored", source)


@dataclass(frozen=True)
class Comparison:
    """Rise of the monotonic model minus that of `other` under one attack, paired by text."""

    other: str
    attack: str
    over: tuple[str, ...]  # the attacks of WORST or OWN
    mean: Number
    shift: Number  # Hodges-Lehmann, seeds averaged by text
    p: Number  # Wilcoxon's, the same data


def compare(study: Study, other: str, attack: str) -> Comparison | None:
    """Monotonic against `other`; None where either was not attacked so."""
    over = ensemble(study, "monotonic", other, attack=attack)
    if not over and attack not in kinds(study, "monotonic", other):
        return None
    ours, theirs = _aligned(rises(study, "monotonic", attack, over), rises(study, other, attack, over))
    difference, source = ours - theirs, _source(attack, over, "monotonic", other)
    how = f"rise under {_named(attack, over)}, monotonic minus {other}, paired by text"
    by_text = difference.mean(axis=0)
    shift = paired.hodges_lehmann(by_text, study.config.report.confidence)
    test = Estimate(paired.wilcoxon(by_text), None, None, len(by_text))
    return Comparison(
        other,
        attack,
        tuple(over),
        study.mean(difference, NATS, how, source),
        Number.of(shift, NATS, f"Hodges-Lehmann shift of the {how}, seeds averaged", source),
        Number.of(test, P, f"Wilcoxon signed-rank test of the {how}, seeds averaged", source),
    )


@lru_cache(maxsize=1)
def comparisons(study: Study) -> dict[str, Comparison]:
    """The headline, the same against each matched control, both without transfers, and each attack by itself against the baseline."""
    others = {name: "baseline" if name == WORST else name for name in HEADLINES}
    wanted = {name: (other, WORST) for name, other in others.items()} | {_own(name): (other, OWN) for name, other in others.items()}
    wanted |= {kind: ("baseline", kind) for kind in kinds(study, "baseline", "monotonic")}
    made = {name: compare(study, other, attack) for name, (other, attack) in wanted.items()}
    return {name: comparison for name, comparison in made.items() if comparison}


def own(made: Mapping[str, Comparison], name: str) -> Comparison | None:
    """Beside a comparison of worst cases (one of HEADLINES) the one without transfers; None where none was tried."""
    return made.get(_own(name))


def _own(name: str) -> str:
    return OWN if name == WORST else f"{name}_{OWN}"


def adjusted(study: Study, made: Mapping[str, Comparison]) -> dict[str, float]:
    """Holm's p of the declared family (report.family), as far as it could be tested; success gives one member a seed."""
    p: dict[str, float] = {name: made[name].p.value for name in study.config.report.family if name in made}
    if "success" in study.config.report.family and "hotflip" in made:
        p |= {f"success, seed {seed}": float(test["p"]) for seed, test in mcnemar_by_seed(study).items()}
    return paired.holm(p)


def _aligned(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Only seeds and texts that both have."""
    return first.align(second, join="inner")


def _named(attack: str, over: list[str]) -> str:
    return f"the worst of {', '.join(over)}" if attack in OVER_SEVERAL else attack


def _source(attack: str, over: list[str], *models: str) -> Source:
    used = over if attack in OVER_SEVERAL else [attack]
    stored = dict.fromkeys({TRANSFER: f"{TRANSFER}:*", RANDOM: "hotflip"}.get(kind, kind) for kind in used)
    fields = ("nll", "random_nll") if RANDOM in used else ("nll",)
    return Source("hotflip_records", {"model": models, "attack": tuple(stored)}, fields)


def clean_loss(study: Study, model: str) -> Number:
    """Loss of the untouched tokens before any flip, on the attacked texts."""
    source = Source("hotflip_records", {"model": (model,)}, ("nll",))
    return study.mean(study.matrix(study.flips, "text", "clean", {"model": [model]}), NATS, "loss before any flip", source)
