"""final_results.json and experiment_summary.txt. Every sentence of the findings follows from an interval or a certificate."""

from __future__ import annotations

from typing import Any

import numpy as np

from utils.report.statistics import Estimate, perplexity, reduction_percent
from utils.report.study import ATTACKED, MODELS, Study
from utils.report.tables import paper_table
from utils.run.environment import code_revision, now


def final_results(study: Study) -> dict[str, Any]:
    """The reference's fields and ours: intervals, controls, seeds, certificate."""
    first = study.json[study.seeds[0]]
    return {
        "experiment_info": {
            "seed": study.seeds[0],
            "seeds": study.seeds,
            "model_name": study.config.model.name,
            "run_name": study.config.run_name,
            "timestamp": now(),
            "code_revision": code_revision(),
            "text": first["setup"]["source"],
            "loss_unit": "nats per token",
            "confidence": study.config.report.confidence,
        },
        "training_summary": {
            arm: {seed: _training(stored[f"{arm}_history"]) for seed, stored in study.json.items()} for arm in ("baseline", "monotonic")
        },
        "evaluation_summary": {
            f"{model}_pythia": {"loss": study.nll(model).as_dict(), "perplexity": study.nll(model).map(perplexity).as_dict()}
            for model in MODELS
        }
        | {"unigram_perplexity": first["evaluation_results"]["metadata"]["unigram_perplexity"]},
        "attack_summary": {
            "uat": {f"{model}_pythia": _triggers(study, model) for model in ATTACKED},
            "hotflip": {f"{model}_pythia": _flips(study, model) for model in ATTACKED},
        },
        "certificate": {seed: _certificate(stored) for seed, stored in study.certificates.items()},
        "key_findings": key_findings(study),
    }


def _training(history: dict[str, Any]) -> dict[str, Any]:
    keys = ("best_val_perplexity", "best_val_nll", "best_step", "training_time_seconds", "training_time_hours", "training_tokens")
    return {key: history[key] for key in keys}


def _triggers(study: Study, model: str) -> dict[str, Any]:
    return {
        "nll_increase": study.trigger_rise(model, model).as_dict(),
        "increase_over_neutral": study.trigger_rise(model, model, "neutral").as_dict(),
        "neutral_increase": study.trigger_rise(model, "neutral").as_dict(),
        "random_increase": study.trigger_rise(model, "random").as_dict(),
    }


def _flips(study: Study, model: str) -> dict[str, Any]:
    return {
        "rise": study.flip_rise(model).as_dict(),
        "random_rise": study.flip_rise(model, "random_rise").as_dict(),
        "success_rate": study.flip_success(model),
        "reference_criterion_success_rate": study.reference_success(model),
    }


def _certificate(stored: dict[str, Any]) -> dict[str, Any]:
    keys = ("constraint_holds", "ffn_monotone", "vacuous", "order", "covers", "scope", "dtype", "minimum", "negative_entries", "reasons")
    return {key: stored[key] for key in keys}


def key_findings(study: Study) -> dict[str, Any]:
    """Numbers and the words that follow from their intervals."""
    difference, flips, triggers = study.nll_difference("monotonic", "baseline"), study.flip_difference(), study.trigger_difference()
    robust = {"below": "monotonic", "above": "baseline"}
    return {
        "perplexity_gap_percent": 100 * (study.perplexity_ratio.value - 1),
        "perplexity_ratio": study.perplexity_ratio.as_dict(),
        "perplexity_ratio_by_seed": study.per_seed_ratio("monotonic", "baseline"),
        "perplexity_verdict": difference.verdict("monotonic better", "monotonic worse"),
        "non_inferior_within_margin": study.non_inferior,
        "margin_nats": study.config.report.margin_nats,
        "hotflip_reduction_percent": reduction_percent(study.flip_success("baseline"), study.flip_success("monotonic")),
        "hotflip_rise_difference": flips.as_dict(),
        "hotflip_mcnemar_by_seed": study.flip_mcnemar(),
        "most_robust_hotflip": flips.verdict(**robust),
        "uat_rise_difference": triggers.as_dict(),
        "most_robust_uat": triggers.verdict(**robust),
    }


def interval(estimate: Estimate, digits: int = 3) -> str:
    """1.034 [1.020, 1.049]."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f} [no interval from {estimate.count}]"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def summary_text(study: Study) -> str:
    """The reference's five sections, in nats and with intervals."""
    sections = {
        "TRAINING SUMMARY": _training_lines(study),
        "PERPLEXITY EVALUATION": _perplexity_lines(study),
        "ADVERSARIAL ROBUSTNESS": _robustness_lines(study),
        "KEY FINDINGS": _finding_lines(study),
        "PAPER INTEGRATION (Table 7)": paper_table(study).round(3).to_string(index=False).splitlines(),
    }
    head = [
        f"Experiment {study.config.run_name}: {study.config.model.name}, seeds {', '.join(map(str, study.seeds))}",
        f"Losses are nats per token; brackets are {100 * study.config.report.confidence:g} % bootstrap intervals over documents or texts.",
    ]
    if len(study.seeds) == 1:
        head.append("One seed: the intervals do not contain the spread between trainings.")
    if reason := study.json[study.seeds[0]]["setup"]["source"]["fallback_because"]:
        head.append(f"FALLBACK TEXT was used (data.fallback), as the configured text could not be had: {reason}")
    body = [line for title, lines in sections.items() for line in ("", title, "-" * len(title), *lines)]
    return "\n".join([*head, *body]) + "\n"


def _training_lines(study: Study) -> list[str]:
    lines = []
    for arm in ("baseline", "monotonic"):
        for seed, stored in study.json.items():
            history = stored[f"{arm}_history"]
            lines.append(
                f"{arm:<10} seed {seed}: best validation {history['best_val_nll']:.4f} nats (perplexity "
                f"{history['best_val_perplexity']:.2f}) at step {history['best_step']}; {history['training_tokens']:,} tokens"
            )
            lines.append(f"{'':<10} training time {history['training_time_seconds']:.1f} s, {len(history['resumed_at_steps'])} resume(s)")
    return lines


def _perplexity_lines(study: Study) -> list[str]:
    lines = [f"{model:<10} perplexity {interval(study.nll(model).map(perplexity), 2)}" for model in MODELS]
    unigram = study.json[study.seeds[0]]["evaluation_results"]["metadata"]["unigram_perplexity"]
    documents = study.nll("baseline").count
    lines.append(f"{'unigram':<10} perplexity {unigram:.2f}   (training frequencies on the same {documents} test documents)")
    lines.append(f"monotonic / baseline: {interval(study.perplexity_ratio)}")
    if len(study.seeds) > 1:
        ratios = study.per_seed_ratio("monotonic", "baseline")
        lines.append("  by seed: " + ", ".join(f"{seed}: {ratio:.3f}" for seed, ratio in ratios.items()))
    return lines


def _robustness_lines(study: Study) -> list[str]:
    flips, threshold = study.config.hotflip, study.config.hotflip.threshold_nats
    lines = [f"HotFlip, {flips.flips} exact flips, rise on {flips.scored_tokens} untouched tokens (random flips beside it)"]
    for model in ATTACKED:
        lines.append(
            f"  {model:<10} {interval(study.flip_rise(model))}   random {interval(study.flip_rise(model, 'random_rise'))}   "
            f"success (rise > {threshold:g} nats) {100 * study.flip_success(model):.1f} %"
        )
    lines.append("Universal trigger, rise on held-out texts (against no trigger; neutral and random triggers beside it)")
    for model in ATTACKED:
        lines.append(
            f"  {model:<10} {interval(study.trigger_rise(model, model))}   neutral {study.trigger_rise(model, 'neutral').value:.3f}   "
            f"random {study.trigger_rise(model, 'random').value:.3f}   over neutral {interval(study.trigger_rise(model, model, 'neutral'))}"
        )
    reference = ", ".join(f"{model} {100 * study.reference_success(model):.1f} %" for model in ATTACKED)
    lines.append(
        f"The reference's own criterion (own loss up by {100 * flips.reference_threshold:g} %, flipped tokens scored): {reference}"
    )
    lines.append("  It favours a model that is worse to begin with; it is printed for comparison only.")
    return lines


def _quality_line(study: Study) -> str:
    verdict = study.nll_difference("monotonic", "baseline").verdict(
        "the monotonic model is better than the baseline",
        "the monotonic model is worse than the baseline",
        "the monotonic model and the baseline are not distinguishable",
    )
    margin = f"at a margin of {study.config.report.margin_nats:g} nats"
    shown = {True: f"non-inferior {margin}", False: f"not shown to be non-inferior {margin}", None: f"non-inferiority {margin} stays open"}
    return f"Quality: {verdict}, perplexity {100 * (study.perplexity_ratio.value - 1):+.1f} %; {shown[study.non_inferior]}."


def _success_line(study: Study) -> str:
    before, after = study.flip_success("baseline"), study.flip_success("monotonic")
    change = reduction_percent(before, after)
    if change is None:
        words = "the baseline has none, so there is nothing to reduce"
    elif change == 0:
        words = "no change"
    else:
        tests = ", ".join(f"{test['p']:.2g}" for test in study.flip_mcnemar().values())
        words = f"{abs(change):.1f} % {'lower' if change > 0 else 'higher'}, relatively (exact McNemar, p by seed: {tests})"
    return f"HotFlip success: {100 * before:.1f} % of the texts for the baseline, {100 * after:.1f} % for the monotonic model; {words}."


def _finding_lines(study: Study) -> list[str]:
    findings = key_findings(study)
    certificates = study.certificates.values()
    holds = all(stored["ffn_monotone"] for stored in certificates)
    lines = [
        _quality_line(study),
        f"HotFlip: rise differs by {interval(study.flip_difference())} nats (monotonic minus baseline); more robust: "
        f"{findings['most_robust_hotflip']}.",
        _success_line(study),
        f"Trigger: rise differs by {interval(study.trigger_difference())} nats; more robust: {findings['most_robust_uat']}; "
        f"the unit is the search, {len(study.seeds)} for each model.",
        f"Certificate: the feed-forward sublayers {'are' if holds else 'are NOT'} monotone in the weights that run.",
    ]
    reasons = sorted({reason for stored in certificates for reason in stored["reasons"]})
    lines += [f"  {reason}" for reason in reasons]
    if any(stored["vacuous"] for stored in certificates):
        lines.append(
            "  This order is vacuous behind a mean-subtracting LayerNorm: an unconstrained model with the same activation can be "
            "rewritten to pass the same test with the same function, so the certificate by itself promises no robustness "
            "(docs/METHOD.md)."
        )
    gap = np.array(list(study.per_seed_ratio("monotonic", "baseline").values()))
    if len(gap) > 1:
        lines.append(f"Spread over {len(gap)} seeds of the perplexity ratio: {gap.min():.3f} to {gap.max():.3f}.")
    return lines
