"""uat_results.json by hand, from rows written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import UAT
from utils.attacks.round_trip import RoundTrip
from utils.attacks.trigger_results import controls, summarise, table_of, trigger_results, worst_case
from utils.data.tokenizer import train_tokenizer

WORDS = RoundTrip(train_tokenizer(iter(["to be or\nnot to be"]), 270))
SPEC = UAT(trigger_length=2, text_tokens=6, search_texts=4, select_texts=2, report_texts=2, candidates=4, sweeps=3, restarts=2)
VALUES = {
    "clean": (2.0, 4.0),
    "neutral": (2.5, 4.1),
    "random_0": (3.0, 5.0),
    "random_1": (3.0, 6.0),
    "base": (4.0, 5.0),
    "other": (3.0, 4.0),
    "restart_0:base": (4.0, 5.0),
    "restart_1:base": (3.0, 5.0),
    "query_greedy:base": (3.0, 4.5),
}
SEARCH: dict[str, Any] = {
    "trigger": [70, 71],
    "by_sweep": [3.0, 4.0, 4.9, 5.0],
    "restarts": [{}, {}],
    "forwards": 9,
    "backwards": 5,
    "evaluations": 7,
    "flops": 4,
}


def rows(model: str = "base", **changes: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "trigger": kind.replace("base", model) if ":" in kind else kind,
            "text": number,
            "nll": nll,
            "nll_with_trigger": nll + 1,
        }
        for kind, pair in (VALUES | changes).items()
        for number, nll in enumerate(pair)
    ]


def test_summary() -> None:
    report = [*rows(), *({**row, "model": "other", "nll": 99.0} for row in rows())]
    assert summarise(report, "base", "base") == pytest.approx(
        {
            "clean_loss": 3.0,
            "attacked_loss": 4.5,
            "nll_increase": 1.5,
            "nll_increase_percent": 50.0,
            "neutral_increase": 0.3,
            "random_increase": 1.25,
            "increase_over_neutral": 1.2,
            "reference_increase_percent": 100 * (5.5 / 3 - 1),
        }
    )


def test_the_worst_case_is_chosen_on_other_texts_than_it_is_reported_on() -> None:
    """On the report texts random_1 has the same loss as the own trigger; on the second set `other` is the strongest."""
    worst = worst_case(rows(), rows(other=(9.0, 9.0)), "base")
    assert (worst["trigger"], worst["attacked_loss"], worst["nll_increase"]) == ("other", 3.5, 0.5)
    assert worst["reference_increase_percent"] == pytest.approx(50.0)


def test_controls() -> None:
    facts = controls(rows(), "base", SEARCH)
    assert facts["query_greedy_increase"] == pytest.approx(0.75)
    assert facts["increase_by_restart"] == pytest.approx([1.5, 1.0])
    assert facts["last_sweep_share"] == pytest.approx(0.05)
    assert controls(rows(), "base", SEARCH | {"by_sweep": [3.0, 3.0]})["last_sweep_share"] == 0.0


def test_all_parts_name_the_models() -> None:
    report = [*rows(), *rows("other", base=(2.2, 4.2))]
    texts = [{"ids": WORDS.tokenizer.encode("to be").ids}]
    found = trigger_results(report, report, {"base": SEARCH, "other": SEARCH}, texts, WORDS, SPEC)
    assert all(list(found[part]) == ["base_pythia", "other_pythia"] for part in ("results", "controls", "transfer"))
    assert found["transfer"]["other_pythia"] == pytest.approx({"base_pythia": 0.2, "other_pythia": 0.5})
    assert found["results"]["base_pythia"]["transfer_increase"] == pytest.approx({"base_pythia": 1.5, "other_pythia": 0.2})
    assert found["budget"]["by_model"]["base_pythia"] == {"forwards": 9, "backwards": 5, "evaluations": 7, "flops": 4}
    allowed = {"searches": 3, "positions": 6, "candidates_per_position": 4, "gradients_per_position": SPEC.beam * SPEC.gradients * 4}
    assert found["budget"]["allowed_per_model"] == allowed
    assert any(flag.startswith("other_pythia: random triggers raise") for flag in found["flags"])
    assert table_of(found["results"]).splitlines()[1] == f'"base_pythia","{WORDS.tokenizer.decode([70, 71])}",50.0'
