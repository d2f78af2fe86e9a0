"""Rows of the triggers on held-out texts: the texts' own tokens, every trigger, resume; and the stored results of a whole run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from configs.schema import UAT, Experiment
from tests.tiny_models import VOCABULARY, deaf_model, random_ids, random_model, slow_nll
from utils.attacks.controls import random_trigger
from utils.attacks.round_trip import RoundTrip
from utils.attacks.trigger_records import TriggerAttacks, common_triggers, own_triggers
from utils.data.attack_texts import Alphabet
from utils.data.tokenizer import load_tokenizer, train_tokenizer
from utils.models.loading import load_model

pytestmark = pytest.mark.usefixtures("no_sync")
TEXT, LENGTH = 6, 3
ALPHABET = Alphabet(0, VOCABULARY, (0,))
WORDS = RoundTrip(train_tokenizer(iter(["to be or\nnot to be"]), 270))
SPEC = UAT(
    trigger_length=LENGTH,
    text_tokens=TEXT,
    search_texts=4,
    select_texts=3,
    report_texts=5,
    candidates=4,
    sweeps=2,
    restarts=2,
    controls=2,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    ids = random_ids(count, TEXT, seed)[:, 1:].tolist()
    return [{"id": f"attack-{number}", "subset": "prose", "ids": row} for number, row in enumerate(ids)]


def attacks(model: PreTrainedModel) -> TriggerAttacks:
    sets = {"search": texts(4, 0), "select": texts(3, 1), "report": texts(5, 2)}
    return TriggerAttacks(model, "base", sets, ALPHABET, WORDS, SPEC, "fp32")


def reported(model: PreTrainedModel, triggers: dict[str, list[int]]) -> list[dict[str, Any]]:
    return [row for label, trigger in triggers.items() for row in attacks(model).report("report", label, trigger)]


def test_report_scores_the_texts_own_tokens(model: PreTrainedModel) -> None:
    """Window and index set are the same with and without a trigger; its own tokens are only in `nll_with_trigger`."""
    trigger, held_out = [5, 6, 7], texts(5, 2)
    report = reported(model, {"clean": [], "own": trigger})
    assert [(row["model"], row["trigger"], row["text"]) for row in report] == [
        ("base", kind, text["id"]) for kind in ("clean", "own") for text in held_out
    ]
    for row, text in zip(report, [*held_out, *held_out], strict=True):
        ids = [0, *(trigger if row["trigger"] == "own" else []), *text["ids"]]
        assert row["nll"] == pytest.approx(slow_nll(model, ids, TEXT), rel=1e-5)
        assert row["nll_with_trigger"] == pytest.approx(slow_nll(model, ids, len(ids) - 1), rel=1e-5)


def test_an_unlikely_trigger_does_not_count_as_damage() -> None:
    """A deaf model finds some tokens unlikely; that shows in the reference's measure and not in ours."""
    model = deaf_model()
    losses = {token: slow_nll(model, [0, token], 1) for token in range(1, VOCABULARY)}
    rare = max(losses, key=losses.__getitem__)
    report = reported(model, {"clean": [], "own": [rare] * LENGTH})
    for before, after in zip(report[:5], report[5:], strict=True):
        assert before["nll"] == after["nll"]
        assert after["nll_with_trigger"] > before["nll_with_trigger"]


def test_a_search_takes_its_own_sets_and_the_texts_of_the_report_none(model: PreTrainedModel, tmp_path: Path) -> None:
    found = attacks(model).search(0, tmp_path / "state.json", lambda: None)
    for kind, seed, count in (("search_nll", 0, 4), ("select_nll", 1, 3)):
        losses = [slow_nll(model, [0, *found["trigger"], *text["ids"]], TEXT) for text in texts(count, seed)]
        assert found[kind] == pytest.approx(np.mean(losses), rel=1e-5)


def test_triggers_have_the_names_of_what_they_are() -> None:
    search = {"trigger": [1, 2, 3], "restarts": [{"trigger": [4, 5, 6]}, {"trigger": [1, 2, 3]}], "query_greedy": {"trigger": [7, 8, 9]}}
    common = common_triggers({"base": search, "other": search}, WORDS, ALPHABET, SPEC)
    assert list(common) == ["clean", "neutral", "base", "other", "random_0", "random_1"]
    assert (common["clean"], common["base"]) == ([], [1, 2, 3])
    assert WORDS.tokenizer.decode(common["neutral"]) == "\n\n\n"
    assert common["random_1"] == random_trigger(0, 1, LENGTH, np.arange(1, VOCABULARY), "control")
    own = own_triggers("base", search)
    assert own == {"restart_0:base": [4, 5, 6], "restart_1:base": [1, 2, 3], "query_greedy:base": [7, 8, 9]}


@pytest.mark.integration
def test_stored_results_follow_from_the_stored_models(finished: Path, tiny: Experiment, stage_folder: Any) -> None:
    """The reference's fields, the transfer matrix, the CSV; and every reported loss again by plain transformers."""
    folder = stage_folder(finished, 5)
    results = json.loads((folder / "uat_results.json").read_text())
    assert set(results["attack_config"]) >= {"trigger_length", "num_iterations", "num_restarts", "num_opt_samples", "num_eval_samples"}
    stored = json.loads((stage_folder(finished, 0) / "attack_texts.json").read_text())
    held_out = [text["ids"] for text in stored["sets"]["report"]]
    words = load_tokenizer(stage_folder(finished, 0) / "tokenizer")
    models = {"base": (0, "base_model"), "baseline": (2, "best"), "monotonic": (3, "best")}
    names = list(results["results"])
    made = [kind for kind in ("noise", "earlier") if isinstance(results["matched"][kind], dict)]
    assert names == [f"{name}_pythia" for name in (*models, *made)]
    for name, (number, where) in models.items():
        facts, model = results["results"][f"{name}_pythia"], load_model(stage_folder(finished, number) / where)
        losses = [
            np.mean([slow_nll(model, [stored["alphabet"]["end_of_text"], *trigger, *ids], tiny.uat.text_tokens) for ids in held_out])
            for trigger in ([], facts["trigger_ids"])
        ]
        assert [facts["clean_loss"], facts["attacked_loss"]] == pytest.approx(losses, rel=1e-4)
        assert facts["nll_increase"] == pytest.approx(losses[1] - losses[0], abs=1e-3)
        assert list(facts["transfer_increase"]) == names
        assert facts["transfer_increase"][f"{name}_pythia"] == facts["nll_increase"]
        assert [results["transfer"][other][f"{name}_pythia"] for other in names] == list(facts["transfer_increase"].values())
        assert facts["trigger_text"] == words.decode(facts["trigger_ids"], skip_special_tokens=False)
        assert 0 <= facts["survives_retokenisation"] <= 1
    spent = list(results["budget"]["by_model"].values())
    assert all(each == spent[0] for each in spent)
    with (folder / "learned_triggers.csv").open(newline="") as handle:
        table = list(csv.reader(handle))
    assert table[0] == ["model", "trigger", "nll_increase_percent"]
    assert [line[:2] for line in table[1:]] == [[name, results["results"][name]["trigger_text"]] for name in names]
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    every = {"clean", "neutral", *models, *made, "random_0", "random_1"}
    for name in (*models, *made):
        own = {f"restart_{number}:{name}" for number in range(tiny.uat.restarts)} | {f"query_greedy:{name}"}
        assert {row["trigger"] for row in rows if row["model"] == name} == every | own
