"""hotflip_results.json by hand, from rows written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs.schema import HotFlip
from utils.attacks.flip_results import controls, flip_results, paired_tests, summarise, worst_case, worst_rises

SPEC = HotFlip(texts=3, prefix_tokens=8, scored_tokens=6, flips=2, candidates=6, threshold_nats=0.25, longer_texts=2)


def rows_of(attack: str, rises: list[float], **more: Any) -> list[dict[str, Any]]:
    """A first flip brings half of each rise; over all tokens it is a fifth of it, relatively."""
    return [
        {
            "attack": attack,
            "nll": [2.0, 2.0 + rise / 2, 2.0 + rise],
            "flips": [{"rank_correlation": 0.2}, {"rank_correlation": None}],
            "reference_clean": 4.0,
            "reference_attacked": 4.0 * (1 + rise / 5),
            "leak": 0.0,
            "forwards": 13,
            "backwards": 8,
            "evaluations": 12,
            "flops": 5,
            "wider_rounds": 0,
            "stuck": False,
            "survives_retokenisation": rise > 0.1,
        }
        | more
        for rise in rises
    ]


def one_model(rises: list[float]) -> dict[str, list[dict[str, Any]]]:
    own = rows_of("hotflip", rises, random_nll=[2.1, 2.3], zero_gradient=0.1)
    for row, correlation in zip(own, (0.3, None), strict=False):
        row["gradient"] = {"random_rank_correlation": correlation, "bf16_cosine": 0.9}
    return {
        "hotflip": own,
        "query_greedy": rows_of("query_greedy", [0.1, 0.1, 0.5]),
        "longer": rows_of("longer", [rise * 1.2 for rise in rises[:2]], leak=0.5),
        "transfer:other": rows_of("transfer:other", [0.4, 0.1, 0.1]),
    }


def test_summary() -> None:
    summary = summarise(one_model([0.05, 0.2, 0.35])["hotflip"], SPEC)
    assert summary["avg_degradation"] == pytest.approx(0.2)
    assert summary["std_degradation"] == pytest.approx(0.15)
    assert summary["success_rate"] == pytest.approx(1 / 3)
    assert (summary["avg_orig_loss"], summary["avg_attack_loss"]) == pytest.approx((2.0, 2.2))
    assert summary["random_degradation"] == pytest.approx(0.2)
    assert summary["rise_by_flips"] == pytest.approx([0.0, 0.1, 0.2])
    assert summary["success_by_flips"] == pytest.approx([0.0, 0.0, 1 / 3])
    assert (summary["last_flip_share"], summary["flat"]) == (pytest.approx(0.5), False)
    assert summary["survives_retokenisation"] == pytest.approx(2 / 3)
    assert summary["reference_criterion"]["success_rate"] == 0.0
    assert summary["reference_criterion"]["mean_relative_rise"] == pytest.approx(0.04)
    assert (summary["mean_flips"], summary["num_samples"], summary["num_oom_skipped"]) == (2.0, 3, 0)
    assert summarise(one_model([0.2])["hotflip"], SPEC)["std_degradation"] == 0.0


def test_a_curve_that_is_flat() -> None:
    rows = one_model([0.3])["hotflip"]
    rows[0]["nll"] = [2.0, 2.29, 2.3]
    assert summarise(rows, SPEC)["flat"]
    rows[0]["nll"] = [2.0, 2.0, 2.0]
    assert (summarise(rows, SPEC)["last_flip_share"], summarise(rows, SPEC)["flat"]) == (0.0, True)


def test_worst_case_is_text_by_text() -> None:
    """Of HotFlip 0.05 0.2 0.35, without gradient 0.1 0.1 0.5, transferred 0.4 0.1 0.1, the best random draw 0.3; `longer` is left out."""
    mine = one_model([0.05, 0.2, 0.35])
    assert worst_rises(mine) == pytest.approx([0.4, 0.3, 0.5])
    worst = worst_case(mine, SPEC)
    assert worst["rise"] == pytest.approx(0.4)
    assert worst["success_rate"] == 1.0
    assert worst["strongest"] == pytest.approx({"hotflip": 0, "query_greedy": 1 / 3, "transfer:other": 1 / 3, "random": 1 / 3})
    assert worst["reference_criterion"]["mean_relative_rise"] == pytest.approx((0.08 + 0.04 + 0.1) / 3)


def test_controls() -> None:
    facts = controls(one_model([0.05, 0.2, 0.35]))
    assert facts["longer"] == pytest.approx({"texts": 2, "rise": 0.15, "hotflip_rise": 0.125, "further_share": 0.2})
    assert facts["rank_correlation"] == pytest.approx({"candidates": 0.2, "random": 0.3})
    assert (facts["random_rise"], facts["query_greedy_rise"]) == pytest.approx((0.2, 0.7 / 3))
    assert (facts["zero_gradient_share"], facts["bf16_cosine"], facts["largest_leak"]) == pytest.approx((0.1, 0.9, 0.5))
    nothing = one_model([0.0, 0.0, 0.0])
    for row in nothing["hotflip"]:
        row["flips"] = []
        row.pop("gradient", None)
    facts = controls(nothing)
    assert facts["longer"]["further_share"] == 0.0
    assert (facts["rank_correlation"], facts["bf16_cosine"]) == ({"candidates": None, "random": None}, None)


def test_all_parts_name_the_models() -> None:
    rows = {name: one_model(rises) for name, rises in {"base": [0.1] * 3, "baseline": [0.3, 0.4, 0.5], "monotonic": [0.2] * 3}.items()}
    found = flip_results(rows, SPEC)
    names = ["base_pythia", "baseline_pythia", "monotonic_pythia"]
    assert all(list(found[part]) == names for part in ("results", "controls", "transfer"))
    assert found["transfer"]["base_pythia"] == {"other_pythia": pytest.approx(0.2)}
    assert found["budget"]["by_model"]["base_pythia"] == {"forwards": 39, "backwards": 24, "evaluations": 36, "flops": 15}
    assert list(found["statistical_tests"]) == ["baseline_vs_monotonic"]
    test = found["statistical_tests"]["baseline_vs_monotonic"]
    assert (test["mean_difference"], test["success_of_baseline_only"]) == (pytest.approx(-0.2), 3)
    assert test["worst_case"]["mean_difference"] == pytest.approx(np.mean([0.4, 0.3, 0.5]) - np.mean([0.4, 0.4, 0.5]))
    assert any(flag.startswith("base_pythia: a search without gradient raises") for flag in found["flags"])


def test_paired_tests_against_scipy_and_by_hand() -> None:
    baseline, monotonic = np.array([0.1, 0.5, 0.6, 0.7, 0.2]), np.array([0.1, 0.3, 0.1, 0.8, 0.1])
    tests = paired_tests(baseline, monotonic, ("baseline", "monotonic"), 0.4)
    assert tests["mean_difference"] == pytest.approx(-0.14)
    assert (tests["success_of_baseline_only"], tests["success_of_monotonic_only"], tests["mcnemar_p_value"]) == (2, 0, 0.5)
    assert tests["wilcoxon_p_value"] == pytest.approx(2 * 3 / 16)  # 3 of 16 sign patterns give a sum of positive ranks up to 1.5
    same = paired_tests(baseline, baseline, ("a", "b"), 0.4)
    assert (same["wilcoxon_p_value"], same["mcnemar_p_value"]) == (1.0, 1.0)
