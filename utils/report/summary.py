"""final_results.json and experiment_summary.txt: the reference's fields and sections, with intervals, controls and seeds."""

from __future__ import annotations

from typing import Any

from utils.report import quality, robustness, triggers
from utils.report.findings import findings, flags, key_findings
from utils.report.robustness import WORST
from utils.report.study import ARMS, Study
from utils.report.table import shown_cell
from utils.report.tables import paper_table
from utils.run.environment import code_revision, now


def final_results(study: Study) -> dict[str, Any]:
    """The reference's fields and ours."""
    return {
        "experiment_info": {
            "seed": study.seeds[0],
            "seeds": study.seeds,
            "model_name": study.config.model.name,
            "run_name": study.config.run_name,
            "timestamp": now(),
            "code_revision": code_revision(),
            "text": next(iter(study.stored("setup").values()))["source"],
            "loss_unit": "nats per token",
            "confidence": study.config.report.confidence,
            "absent": study.absent,
        },
        "training_summary": {arm: {seed: _training(stored) for seed, stored in study.stored(f"{arm}_history").items()} for arm in ARMS},
        "evaluation_summary": {f"{model}_pythia": _evaluation(study, model) for model in study.models}
        | {"unigram_perplexity": unigram_perplexity(study)},
        "attack_summary": {
            "uat": {f"{model}_pythia": _triggers(study, model) for model in triggers.searched(study)},
            "hotflip": {f"{model}_pythia": _flips(study, model) for model in flipped(study)},
        },
        "certificate": {seed: _certificate(stored) for seed, stored in study.stored("monotonic_certificate").items()},
        "key_findings": key_findings(study),
    }


def flipped(study: Study) -> list[str]:
    """Models attacked by HotFlip."""
    return [model for model in study.attacked if "hotflip" in robustness.kinds(study, model)]


def unigram_perplexity(study: Study) -> float:
    return float(next(iter(study.stored("evaluation_results").values()))["metadata"]["unigram_perplexity"])


def _training(history: dict[str, Any]) -> dict[str, Any]:
    keys = ("best_val_perplexity", "best_val_nll", "best_step", "training_time_seconds", "training_time_hours", "training_tokens")
    return {key: history[key] for key in keys}


def _evaluation(study: Study, model: str) -> dict[str, Any]:
    return {"loss": quality.loss(study, model).as_dict(), "perplexity": quality.perplexity_of(study, model).as_dict()}


def _triggers(study: Study, model: str) -> dict[str, Any]:
    return {
        "nll_increase": triggers.trigger_rise(study, model, model).as_dict(),
        "increase_over_neutral": triggers.trigger_rise(study, model, model, "neutral").as_dict(),
        "neutral_increase": triggers.trigger_rise(study, model, "neutral").as_dict(),
        "random_increase": triggers.trigger_rise(study, model, "random").as_dict(),
    }


def _flips(study: Study, model: str) -> dict[str, Any]:
    return {
        "rise": robustness.rise(study, model).as_dict(),
        "random_rise": robustness.random_rise(study, model).as_dict(),
        "success_rate": robustness.success(study, model).value,
        "reference_criterion_success_rate": robustness.reference_success(study, model).value,
        "rise_by_attack": {kind: robustness.rise(study, model, kind).as_dict() for kind in robustness.kinds(study, model)},
    }


def _certificate(stored: dict[str, Any]) -> dict[str, Any]:
    keys = ("constraint_holds", "ffn_monotone", "vacuous", "order", "covers", "scope", "dtype", "minimum", "negative_entries", "reasons")
    return {key: stored[key] for key in keys}


def summary_text(study: Study) -> str:
    """The reference's five sections, in nats and with intervals, and the flags."""
    sections = {
        "TRAINING SUMMARY": _training_lines(study),
        "PERPLEXITY EVALUATION": _perplexity_lines(study),
        "ADVERSARIAL ROBUSTNESS": _robustness_lines(study),
        "KEY FINDINGS": [finding.text for finding in findings(study)],
        "PAPER INTEGRATION (Table 7)": _paper_lines(study),
    }
    if raised := flags(study):
        sections["FLAGS"] = [flag.text for flag in raised]
    body = [line for title, lines in sections.items() for line in ("", title, "-" * len(title), *lines)]
    return "\n".join([*head(study), *body]) + "\n"


def head(study: Study) -> list[str]:
    """What a reader must know before the first number: seeds, units, fallback, flags, what is absent."""
    lines = [
        f"Experiment {study.config.run_name}: {study.config.model.name}, seeds {', '.join(map(str, study.seeds))}",
        f"Losses are nats per token; brackets are {100 * study.config.report.confidence:g} % bootstrap intervals over documents or texts"
        + (" and seeds." if study.measured > 1 else "."),
    ]
    if study.measured <= 1:
        lines.append("One seed: the intervals do not contain the spread between trainings.")
    if reason := next(iter(study.stored("setup").values()))["source"]["fallback_because"]:
        lines.append(f"FALLBACK TEXT was used (data.fallback), as the configured text could not be had: {reason}")
    if raised := flags(study):
        lines.append(f"{len(raised)} flag(s), listed at the end: what the stages found suspicious about themselves.")
    if study.lacking:
        lines.append(f"PARTIAL REPORT: of {len(study.files)} seeds {', '.join(map(str, study.lacking))} are not complete (see Absent).")
    if study.absent:
        lines += ["Absent:", *(f"  {line}" for line in study.absent)]
    return lines


def _training_lines(study: Study) -> list[str]:
    lines = []
    for arm in ARMS:
        for seed, history in study.stored(f"{arm}_history").items():
            lines.append(
                f"{arm:<10} seed {seed}: best validation {history['best_val_nll']:.4f} nats (perplexity "
                f"{history['best_val_perplexity']:.2f}) at step {history['best_step']}; {history['training_tokens']:,} tokens"
            )
            lines.append(f"{'':<10} training time {history['training_time_seconds']:.1f} s, {len(history['resumed_at_steps'])} resume(s)")
    return lines


def _perplexity_lines(study: Study) -> list[str]:
    lines = [f"{model:<10} perplexity {quality.perplexity_of(study, model).text()}" for model in study.models]
    documents = quality.loss(study, study.models[0]).count
    lines.append(
        f"{'unigram':<10} perplexity {unigram_perplexity(study):.2f}   (training frequencies on the same {documents} test documents)"
    )
    if set(ARMS) <= set(study.models):
        lines.append(f"monotonic / baseline: {quality.perplexity_ratio(study).text()}   (primary endpoint)")
    if len(ratios := quality.ratio_by_seed(study)) > 1:
        lines.append("  by seed: " + ", ".join(f"{seed}: {ratio:.3f}" for seed, ratio in ratios.items()))
    return lines


def _robustness_lines(study: Study) -> list[str]:
    flips, threshold = study.config.hotflip, study.config.hotflip.threshold_nats
    lines = [f"HotFlip, {flips.flips} exact flips, rise on {flips.scored_tokens} untouched tokens (random flips beside it)"]
    for model in flipped(study):
        lines.append(
            f"  {model:<10} {robustness.rise(study, model).text()}   random {robustness.random_rise(study, model).text()}   "
            f"success (rise > {threshold:g} nats) {robustness.success(study, model).text(bare=True)}"
        )
    lines += _worst_lines(study)
    lines.append("Universal trigger, rise on held-out texts (against no trigger; neutral and random triggers beside it)")
    for model in triggers.searched(study):
        neutral, random = (triggers.trigger_rise(study, model, kind).text(bare=True) for kind in ("neutral", "random"))
        over = triggers.trigger_rise(study, model, model, "neutral").text()
        lines.append(
            f"  {model:<10} {triggers.trigger_rise(study, model, model).text()}   neutral {neutral}   random {random}   over neutral {over}"
        )
    reference = ", ".join(f"{model} {robustness.reference_success(study, model).text(bare=True)}" for model in flipped(study))
    lines.append(
        f"The reference's own criterion (own loss up by {100 * flips.reference_threshold:g} %, flipped tokens scored): {reference}"
    )
    lines.append("  It favours a model that is worse to begin with; it is printed for comparison only.")
    return lines


def _worst_lines(study: Study) -> list[str]:
    """Nothing where HotFlip is the only attack."""
    made = robustness.comparisons(study).get(WORST)
    if made is None or len(made.over) < 2:
        return []
    lines = [f"Worst case for each text over {', '.join(made.over)}"]
    for model in study.attacked:
        if over := [kind for kind in made.over if kind in robustness.kinds(study, model)]:
            fewer = "" if len(over) == len(made.over) else f"   ({', '.join(over)} alone)"
            lines.append(f"  {model:<10} {robustness.rise(study, model, WORST, over).text()}{fewer}")
    return lines


def _paper_lines(study: Study) -> list[str]:
    table = paper_table(study)
    cells = [table.columns, *([shown_cell(row[column]) for column in table.columns] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
