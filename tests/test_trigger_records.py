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
from utils.attacks.trigger_records import common_triggers, find_trigger, own_triggers, report_rows
from utils.data.attack_texts import Alphabet
from utils.data.tokenizer import load_tokenizer, train_tokenizer
from utils.models.loading import load_model
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop

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


def reported(model: PreTrainedModel, triggers: dict[str, list[int]], path: Path) -> list[dict[str, Any]]:
    return report_rows(model, "base", texts(5, 2), triggers, 0, path, lambda: None)


def test_report_scores_the_texts_own_tokens(model: PreTrainedModel, tmp_path: Path) -> None:
    """Window and index set are the same with and without a trigger; its own tokens are only in `nll_with_trigger`."""
    trigger, held_out = [5, 6, 7], texts(5, 2)
    report = reported(model, {"clean": [], "own": trigger}, tmp_path / "rows.jsonl")
    assert [(row["model"], row["trigger"], row["text"]) for row in report] == [
        ("base", kind, text["id"]) for kind in ("clean", "own") for text in held_out
    ]
    for row, text in zip(report, [*held_out, *held_out], strict=True):
        ids = [0, *(trigger if row["trigger"] == "own" else []), *text["ids"]]
        assert row["nll"] == pytest.approx(slow_nll(model, ids, TEXT), rel=1e-5)
        assert row["nll_with_trigger"] == pytest.approx(slow_nll(model, ids, len(ids) - 1), rel=1e-5)


def test_an_unlikely_trigger_does_not_count_as_damage(tmp_path: Path) -> None:
    """A deaf model finds some tokens unlikely; that shows in the reference's measure and not in ours."""
    model = deaf_model()
    losses = {token: slow_nll(model, [0, token], 1) for token in range(1, VOCABULARY)}
    rare = max(losses, key=losses.__getitem__)
    report = reported(model, {"clean": [], "own": [rare] * LENGTH}, tmp_path / "rows.jsonl")
    for before, after in zip(report[:5], report[5:], strict=True):
        assert before["nll"] == after["nll"]
        assert after["nll_with_trigger"] > before["nll_with_trigger"]


@pytest.mark.parametrize("cut", [0, 0.4, 0.99])
def test_report_goes_on_where_it_was_cut(model: PreTrainedModel, tmp_path: Path, cut: float) -> None:
    path = tmp_path / "rows.jsonl"
    triggers = {"clean": [], "one": [1, 2, 3], "two": [4, 5, 6]}
    straight = reported(model, triggers, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    assert reported(model, triggers, path) == straight
    assert path.read_bytes() == data


def test_search_stops_and_goes_on(model: PreTrainedModel, tmp_path: Path) -> None:
    """A position at a time, with a request to stop after each; the end is that of the straight search."""
    sets = {"search": texts(4, 0), "select": texts(3, 1)}

    def find(path: Path, stop: Stop) -> dict[str, Any]:
        return find_trigger(model, "base", sets, ALPHABET, WORDS, SPEC, "fp32", path, stop)

    straight, stop = find(tmp_path / "straight.json", Stop()), Stop()
    stop.reason = "signal SIGUSR1"
    for _ in range(3 * 2 * LENGTH):
        with pytest.raises(StoppedInTime, match="SIGUSR1"):
            find(tmp_path / "cut.json", stop)
    assert find(tmp_path / "cut.json", Stop()) == straight
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "straight.json").read_bytes()


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
