"""What may be said. Every sentence follows from an interval, a certificate or the absence of records; none is constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from utils.report import quality, robustness, triggers
from utils.report.numbers import Number
from utils.report.robustness import HEADLINES, WORST, Comparison, own
from utils.report.study import ARMS, CONTROLS, Study
from utils.statistics.estimate import reduction_percent

GOOD, BAD, OPEN, NOTE = "good", "bad", "open", "note"  # for the monotonic model; note: neither
PROMISED = ("derivative", "pairs_anywhere")  # falsifiers that a certified sublayer must withstand
ROBUST = {"below": "monotonic", "above": "baseline"}


@dataclass(frozen=True)
class Finding:
    text: str
    tone: str


def findings(study: Study) -> list[Finding]:
    """The primary endpoint first, then robustness from the strongest claim to the weakest, then what qualifies them."""
    made = robustness.comparisons(study)
    return [
        *_quality(study),
        *_worst_case(made),
        *_controls(made),
        *_hotflip(study, made),
        *_triggers(study),
        *_family(study, made),
        *_certificate(study),
        *_spread(study),
    ]


def key_findings(study: Study) -> dict[str, Any]:
    """Numbers and the words that follow from their intervals; None where there are no records."""
    made = robustness.comparisons(study)
    worst, flips, searches = made.get(WORST), made.get("hotflip"), triggers.trigger_difference(study)
    before, after = (robustness.success(study, arm).value if flips else None for arm in ARMS)
    ratio = _ratio(study)
    return {
        "primary_endpoint": "perplexity ratio, monotonic over baseline",
        "perplexity_gap_percent": None if ratio is None else 100 * (ratio.value - 1),
        "perplexity_ratio": _numbers(ratio),
        "perplexity_ratio_by_seed": quality.ratio_by_seed(study) if ratio else {},
        "perplexity_verdict": quality.loss_difference(study, *_pair()).verdict("monotonic better", "monotonic worse") if ratio else None,
        "non_inferior_within_margin": non_inferior(study),
        "margin_nats": study.config.report.margin_nats,
        "hotflip_reduction_percent": None if before is None or after is None else reduction_percent(before, after),
        "hotflip_rise_difference": _numbers(flips.mean if flips else None),
        "hotflip_mcnemar_by_seed": robustness.mcnemar_by_seed(study) if flips else {},
        "hotflip_success_difference": _numbers(robustness.success_difference(study, *_pair()) if flips else None),
        "most_robust_hotflip": flips.mean.verdict(**ROBUST) if flips else None,
        "worst_case_attacks": list(worst.over) if worst else [],
        "worst_case_rise_difference": {name: _numbers(made[name].mean) for name in HEADLINES if name in made},
        "most_robust_worst_case": worst.mean.verdict(**ROBUST) if worst else None,
        "own_searches_rise_difference": {name: _numbers(each.mean) for name in HEADLINES if (each := own(made, name))},
        "more_robust_with_and_without_transfers": {name: claim(made, name) == GOOD for name in HEADLINES if name in made},
        "wilcoxon_p": {name: each.p.value for name, each in made.items()},
        "holm_p": robustness.adjusted(study, made),
        "uat_rise_difference": _numbers(searches),
        "most_robust_uat": searches.verdict(**ROBUST) if searches else None,
        "absent": study.absent,
        "flags": [line.text for line in flags(study)],
    }


def non_inferior(study: Study) -> bool | None:
    """Whether the interval's upper bound of the loss difference is below the margin; None without an interval."""
    if not set(ARMS) <= set(study.models):
        return None
    return quality.loss_difference(study, *_pair()).below(study.config.report.margin_nats)


def flags(study: Study) -> list[Finding]:
    """What the stages found suspicious about themselves."""
    said: dict[tuple[int, str], list[int]] = {}
    for seed, stored in study.stored("evaluation_results").items():
        for model, facts in stored.get("rounding", {}).items():
            if facts["flag"]:
                said.setdefault((4, f"{model}: {facts['flag']}"), []).append(seed)
    for number, artefact in ((5, "uat_results"), (6, "hotflip_results")):
        for seed, stored in study.stored(artefact).items():
            for sentence in stored.get("flags", []):
                said.setdefault((number, sentence), []).append(seed)
    return [Finding(f"Flag (stage {number}, seed {', '.join(map(str, seeds))}): {text}", BAD) for (number, text), seeds in said.items()]


def _pair() -> tuple[str, str]:
    return "monotonic", "baseline"


def _ratio(study: Study) -> Number | None:
    return quality.perplexity_ratio(study) if set(ARMS) <= set(study.models) else None


def _numbers(number: Number | None) -> dict[str, Any] | None:
    return None if number is None else number.as_dict()


def tone(number: Number) -> str:
    """For a difference of rise or success, monotonic minus another: below zero speaks for the monotonic model."""
    return number.verdict(GOOD, BAD, OPEN).partition(" ")[0]


def _quality(study: Study) -> Iterator[Finding]:
    ratio, margin = _ratio(study), f"at a margin of {study.config.report.margin_nats:g} nats"
    if ratio is None:
        yield Finding("Quality: baseline and monotonic are not both in the records.", OPEN)
        return
    verdict = quality.loss_difference(study, *_pair()).verdict(
        "the monotonic model is better than the baseline",
        "the monotonic model is worse than the baseline",
        "the monotonic model and the baseline are not distinguishable",
    )
    inferior = non_inferior(study)
    shown = {True: f"non-inferior {margin}", False: f"not shown to be non-inferior {margin}", None: f"non-inferiority {margin} stays open"}
    settled = {True: GOOD, False: BAD, None: OPEN}[inferior]
    yield Finding(f"Quality: {verdict}, perplexity {100 * (ratio.value - 1):+.1f} %; {shown[inferior]}.", settled)


def _worst_case(made: Mapping[str, Comparison]) -> Iterator[Finding]:
    if WORST not in made:
        yield Finding("Robustness: no attack was made on both the baseline and the monotonic model.", OPEN)
        return
    worst = made[WORST]
    over = f"the worst of {', '.join(worst.over)} for each text" if len(worst.over) > 1 else f"{worst.over[0]}, the only attack"
    yield Finding(
        f"Robustness: under {over}, rise differs by {worst.mean.text()} nats per untouched token (monotonic minus baseline; "
        f"Hodges-Lehmann {worst.shift.text()}); more robust: {worst.mean.verdict(**ROBUST)}.",
        claim(made, WORST),
    )
    yield from _alone(made, WORST)


def _alone(made: Mapping[str, Comparison], name: str) -> Iterator[Finding]:
    """A comparison without transfers: controls are relatives of the baseline, and what was found on one of them fits the others."""
    if alone := own(made, name):
        yield Finding(
            f"  without flips found on other models {alone.mean.text()}; more robust: {alone.mean.verdict('monotonic', alone.other)}.",
            tone(alone.mean),
        )


def claim(made: Mapping[str, Comparison], name: str) -> str:
    """What a comparison of worst cases settles: good or bad only where the one without transfers says the same."""
    tones = {tone(each.mean) for each in (made[name], own(made, name)) if each}
    return tones.pop() if len(tones) == 1 else OPEN


def _controls(made: Mapping[str, Comparison]) -> Iterator[Finding]:
    """Whether a model as bad as the monotonic one, but without a constraint, is as robust."""
    there = [name for name in CONTROLS if name in made]
    for name in there:
        yield Finding(
            f"Against the quality-matched control {name} ({CONTROLS[name]}): {made[name].mean.text()} nats; more robust: "
            f"{made[name].mean.verdict('monotonic', name)}.",
            claim(made, name),
        )
        yield from _alone(made, name)
    if not there:
        yield Finding("No quality-matched control was attacked: a gain in robustness may come from lower quality alone.", OPEN)
    elif WORST in made and tone(made[WORST].mean) == GOOD:
        yield _explained(made, there)


def _explained(made: Mapping[str, Comparison], controls: list[str]) -> Finding:
    """Only where the monotonic model is more robust than the baseline."""
    if claim(made, WORST) != GOOD:
        return Finding("The gain over the baseline rests on flips found on other models, some of them its relatives.", OPEN)
    if short := [name for name in controls if claim(made, name) != GOOD]:
        return Finding(f"The gain over the baseline is not shown to be more than what lower quality gives ({', '.join(short)}).", OPEN)
    if missing := [name for name in CONTROLS if name not in controls]:
        return Finding(f"The gain is larger than that of the control attacked; not settled, since {missing[0]} was not attacked.", OPEN)
    return Finding("The gain is larger than that of every quality-matched control.", GOOD)


def _hotflip(study: Study, made: Mapping[str, Comparison]) -> Iterator[Finding]:
    if "hotflip" not in made:
        return
    flips = made["hotflip"].mean
    yield Finding(
        f"HotFlip: rise differs by {flips.text()} nats (monotonic minus baseline); more robust: {flips.verdict(**ROBUST)}.", tone(flips)
    )
    before, after = (robustness.success(study, arm).value for arm in ARMS)
    change = reduction_percent(before, after)
    if change is None:
        words = "the baseline has none, so there is nothing to reduce"
    elif change == 0:
        words = "no change"
    else:
        tests = ", ".join(f"{test['p']:.2g}" for test in robustness.mcnemar_by_seed(study).values())
        words = f"{abs(change):.1f} % {'lower' if change > 0 else 'higher'}, relatively (exact McNemar, p by seed: {tests})"
    rates = f"{100 * before:.1f} % of the texts for the baseline, {100 * after:.1f} % for the monotonic model"
    difference = robustness.success_difference(study, *_pair())
    yield Finding(f"HotFlip success: {rates}; {words}.", tone(difference))
    yield Finding(f"  difference {difference.text()} (monotonic minus baseline).", NOTE)


def _triggers(study: Study) -> Iterator[Finding]:
    difference = triggers.trigger_difference(study)
    if difference is None:
        yield Finding("Trigger: baseline and monotonic were not both attacked.", OPEN)
        return
    yield Finding(
        f"Trigger: rise differs by {difference.text()} nats; more robust: {difference.verdict(**ROBUST)}; the unit is the search, "
        f"{difference.count} for each model.",
        tone(difference),
    )


def _family(study: Study, made: Mapping[str, Comparison]) -> Iterator[Finding]:
    if corrected := robustness.adjusted(study, made):
        shown = ", ".join(f"{name.replace('_', ' ')} {p:.2g}" for name, p in corrected.items())
        yield Finding(f"Tests over texts, for these trainings, corrected by Holm within the declared family: p {shown}.", NOTE)


def _certificate(study: Study) -> Iterator[Finding]:
    certificates = study.stored("monotonic_certificate").values()
    if not certificates:
        return
    holds = all(stored["ffn_monotone"] for stored in certificates)
    words = f"Certificate: the feed-forward sublayers {'are' if holds else 'are NOT'} monotone in the weights that run."
    yield Finding(words, GOOD if holds else BAD)
    if any(stored["falsifiers"][kind]["violated"] for stored in certificates if stored["ffn_monotone"] for kind in PROMISED):
        yield Finding("  Falsifiers refute it: one of the two is wrong, do not trust either; please report it.", BAD)
    yield from (Finding(f"  {reason}", BAD) for reason in sorted({reason for stored in certificates for reason in stored["reasons"]}))
    if any(stored["vacuous"] for stored in certificates):
        yield Finding(
            "  This order is vacuous behind a mean-subtracting LayerNorm: an unconstrained model with the same activation can be "
            "rewritten to pass the same test with the same function, so the certificate by itself promises no robustness "
            "(docs/METHOD.md).",
            OPEN,
        )


def _spread(study: Study) -> Iterator[Finding]:
    ratios = list(quality.ratio_by_seed(study).values()) if _ratio(study) else []
    if len(ratios) > 1:
        yield Finding(f"Spread over {len(ratios)} seeds of the perplexity ratio: {min(ratios):.3f} to {max(ratios):.3f}.", NOTE)
        if len(ratios) < 10:
            yield Finding(f"  {len(ratios)} seeds say little about others: intervals over so few trainings are too narrow.", OPEN)
