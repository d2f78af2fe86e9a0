"""A base model is compared with what others published of it."""

from __future__ import annotations

import pytest
import yaml

from configs.presets import load
from tests.fake_stages import ROOT
from utils.evaluation.published import VALUES, compared

NAME = "EleutherAI/pythia-1.4b"
KNOWN = yaml.safe_load(VALUES.read_text())


def results(perplexity: float, lambada: float, limit: int = 0) -> dict:
    base = {"perplexity": perplexity, "bits_per_byte": 0.7, "reference_protocol": {"perplexity": 6.8}}
    scores = {"lambada_openai": {"perplexity": {"value": lambada}, "acc": {"value": 0.62}}}
    return {"pile_test": {"base_pythia": base}, "benchmarks": {"models": {"base": scores}, "limit": limit}}


def test_what_lies_outside_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["quantity"]: entry["within"] for entry in compared(NAME, results(8.3, 6.1))}
    assert found == {
        "LAMBADA (OpenAI), perplexity, zero-shot": True,
        "LAMBADA (OpenAI), accuracy, zero-shot": True,
        "the Pile, perplexity by document": False,
        "the Pile, bits per byte": True,
        "the Pile, perplexity by the reference's protocol": True,
    }
    assert "the Pile, perplexity by document: 8.3, OUTSIDE what is published (6.53 to 8.26)" in capsys.readouterr().out


def test_a_part_of_the_items_is_not_compared() -> None:
    assert [entry["at"][0] for entry in compared(NAME, results(7.0, 99.0, limit=10))] == 3 * ["pile_test"]


def test_of_another_model_nothing_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert compared("neox-tiny", results(7.0, 6.0)) == [] and compared(NAME, {"benchmarks": {}, "pile_test": {}}) == []
    assert capsys.readouterr().out == ""


def test_every_value_has_a_range_around_it_and_a_source() -> None:
    for entries in KNOWN.values():
        for entry in entries:
            assert entry["low"] < entry["value"] < entry["high"] and entry["source"] and entry["basis"]


def test_the_study_runs_the_benchmarks_of_which_values_are_known() -> None:
    study = load(str(ROOT / "configs/pythia-1.4b.yaml"))
    assert {entry["at"][3] for entry in KNOWN[study.model.name] if entry["at"][0] == "benchmarks"} <= set(study.evaluate.benchmarks)
    assert len(study.evaluate.benchmarks) == 7
