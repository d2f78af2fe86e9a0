"""hotflip_results.json from the rows: figures of each model, worst case over attacks, controls, transfer, budget, tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import HotFlip
from utils.attacks.flags import ENOUGH, flip_flags
from utils.attacks.hotflip import WIDER
from utils.run.records import Row
from utils.statistics.paired import mcnemar, wilcoxon

UNIT = "nats per untouched token"
Rises = NDArray[np.floating]
ByAttack = Mapping[str, Sequence[Row]]  # rows of one model, by attack, texts in the same order


def rises(rows: Sequence[Row]) -> Rises:
    """(texts,) rise after the last flip."""
    return np.array([row["nll"][-1] - row["nll"][0] for row in rows])


def relative_rises(rows: Sequence[Row]) -> Rises:
    """(texts,) as the reference counts: all tokens, flipped ones included, relative to the model's own clean loss."""
    return np.array([row["reference_attacked"] / row["reference_clean"] - 1 for row in rows])


def summarise(rows: Sequence[Row], spec: HotFlip) -> dict[str, Any]:
    """Figures of HotFlip on one model; the reference's fields hold untouched-token losses."""
    own, reference = rises(rows), relative_rises(rows)
    curves = np.array([row["nll"] for row in rows])
    curves = curves - curves[:, :1]
    mean = curves.mean(axis=0)
    last = float((mean[-1] - mean[-2]) / mean[-1]) if mean[-1] > 0 else 0.0
    return {
        "avg_degradation": float(own.mean()),
        "std_degradation": float(own.std(ddof=1)) if len(rows) > 1 else 0.0,
        "success_rate": float((own > spec.threshold_nats).mean()),
        "avg_orig_loss": float(np.mean([row["nll"][0] for row in rows])),
        "avg_attack_loss": float(np.mean([row["nll"][-1] for row in rows])),
        "random_degradation": float(np.mean([np.mean(row["random_nll"]) - row["nll"][0] for row in rows])),
        "rise_by_flips": mean.tolist(),
        "success_by_flips": (curves > spec.threshold_nats).mean(axis=0).tolist(),
        "last_flip_share": last,
        "flat": last <= ENOUGH,
        "mean_flips": float(np.mean([len(row["flips"]) for row in rows])),
        "survives_retokenisation": float(np.mean([row["survives_retokenisation"] for row in rows])),
        "reference_criterion": _reference(reference, spec),
        "num_samples": len(rows),
        "num_oom_skipped": 0,
    }


def _reference(relative: Rises, spec: HotFlip) -> dict[str, Any]:
    return {
        "success_rate": float((relative > spec.reference_threshold).mean()),
        "mean_relative_rise": float(relative.mean()),
        "note": "all tokens scored, flipped ones included, relative to the model's own clean loss; favours worse models",
    }


def _ensemble(rows: ByAttack) -> dict[str, Rises]:
    """{attack: (texts,) rises} of the attacks that ran on all texts with the common budget; of random flips the best draw."""
    every = {attack: rises(found) for attack, found in rows.items() if attack != "longer"}
    return every | {"random": np.array([max(row["random_nll"]) - row["nll"][0] for row in rows["hotflip"]])}


def worst_rises(rows: ByAttack) -> Rises:
    """(texts,) the largest rise that any attack reached on each text."""
    return np.max(list(_ensemble(rows).values()), axis=0)


def worst_case(rows: ByAttack, spec: HotFlip) -> dict[str, Any]:
    """The headline: text by text the strongest of all attacks, and the share of texts on which each is that."""
    every = _ensemble(rows)
    found, strongest = worst_rises(rows), np.argmax(list(every.values()), axis=0)
    relative = np.max([relative_rises(some) for attack, some in rows.items() if attack != "longer"], axis=0)
    return {
        "rise": float(found.mean()),
        "success_rate": float((found > spec.threshold_nats).mean()),
        "strongest": {attack: float((strongest == number).mean()) for number, attack in enumerate(every)},
        "reference_criterion": _reference(relative, spec),
    }


def controls(rows: ByAttack) -> dict[str, Any]:
    """What could show that HotFlip is weak or its gradient masked; rises in nats per untouched token."""
    own, longer = rows["hotflip"], rows["longer"]
    short, more = float(rises(own[: len(longer)]).mean()), float(rises(longer).mean())
    sampled = [row["gradient"] for row in own if "gradient" in row]
    return {
        "random_rise": float(np.mean([np.mean(row["random_nll"]) - row["nll"][0] for row in own])),
        "query_greedy_rise": float(rises(rows["query_greedy"]).mean()),
        "longer": {
            "texts": len(longer),
            "rise": more,
            "hotflip_rise": short,
            "further_share": more / short - 1 if short > 0 else float(more > 0),
        },
        "rank_correlation": {
            "candidates": _mean(flip["rank_correlation"] for row in own for flip in row["flips"]),
            "random": _mean(facts["random_rank_correlation"] for facts in sampled),
        },
        "zero_gradient_share": float(np.mean([row["zero_gradient"] for row in own])),
        "bf16_cosine": _mean(facts["bf16_cosine"] for facts in sampled),
        "largest_leak": max(row["leak"] for some in rows.values() for row in some),
        "wider_rounds": sum(row["wider_rounds"] for row in own),
        "texts_given_up": sum(row["stuck"] for row in own),
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def spent(rows: Sequence[Row]) -> dict[str, int]:
    """Work of a search over all texts: sequences scored, sequences differentiated, candidates, floating-point operations."""
    return {kind: sum(row[kind] for row in rows) for kind in ("forwards", "backwards", "evaluations", "flops")}


def paired_tests(one: Rises, other: Rises, names: tuple[str, str], threshold: float) -> dict[str, Any]:
    """Rises of `other` minus `one` on the same texts: Wilcoxon signed-rank, and exact McNemar on success at the threshold."""
    difference = other - one
    success = mcnemar((one > threshold).tolist(), (other > threshold).tolist())
    return {
        "mean_difference": float(difference.mean()),
        "wilcoxon_p_value": wilcoxon(difference),
        f"success_of_{names[0]}_only": success["only_first"],
        f"success_of_{names[1]}_only": success["only_second"],
        "mcnemar_p_value": success["p"],
    }


def flip_results(rows: Mapping[str, ByAttack], spec: HotFlip) -> dict[str, Any]:
    """Everything that follows from the rows {model: {attack: rows}}."""
    label = {model: f"{model}_pythia" for model in rows}
    results = {
        label[model]: {**summarise(mine["hotflip"], spec), "worst_case": worst_case(mine, spec), "model_name": model}
        for model, mine in rows.items()
    }
    doubts = {label[model]: controls(mine) for model, mine in rows.items()}
    transfer = {
        label[model]: {
            f"{attack.removeprefix('transfer:')}_pythia": float(rises(found).mean())
            for attack, found in mine.items()
            if attack.startswith("transfer:")
        }
        for model, mine in rows.items()
    }
    allowed = {"flips": spec.flips, "candidates_per_flip": spec.candidates, "wider_candidates": WIDER * spec.candidates}
    allowed |= {"gradients_per_flip": spec.gradients}
    budget = {"allowed_per_text": allowed, "by_model": {label[model]: spent(mine["hotflip"]) for model, mine in rows.items()}}
    tests = {f"{other}_vs_monotonic": _tests(rows, other, spec) for other in rows if other not in ("base", "monotonic")}
    return {
        "results": results,
        "statistical_tests": tests,
        "controls": doubts,
        "transfer": transfer,
        "budget": budget,
        "flags": flip_flags(results, doubts, transfer, budget),
        "loss_unit": UNIT,
    }


def _tests(rows: Mapping[str, ByAttack], other: str, spec: HotFlip) -> dict[str, Any]:
    names = (other, "monotonic")
    hotflip, worst = (
        paired_tests(of(rows[other]), of(rows["monotonic"]), names, spec.threshold_nats)
        for of in (lambda mine: rises(mine["hotflip"]), worst_rises)
    )
    return hotflip | {"worst_case": worst}
