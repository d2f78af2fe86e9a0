"""Universal triggers: the search finds what is planted, resumes to the bit, and reports on held-out texts' own tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import UAT, Experiment
from tests.tiny_models import VOCABULARY, Planted, blind_model, deaf_model, random_ids, random_model, slow_nll
from utils.attacks.controls import random_trigger
from utils.attacks.scoring import Scorer, allowed_tokens
from utils.attacks.uat import TriggerSearch, find_trigger, report_rows, summarise, surviving_share, with_trigger
from utils.data.attack_texts import Alphabet
from utils.data.tokenizer import load_tokenizer, train_tokenizer
from utils.models.loading import load_model
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop

TEXT, LENGTH = 6, 3
ALPHABET = Alphabet(0, VOCABULARY, (0,))
ALLOWED = allowed_tokens(VOCABULARY, ALPHABET.writable(), torch.device("cpu"))


def spec(**settings: Any) -> UAT:
    return UAT(
        **{
            "trigger_length": LENGTH,
            "text_tokens": TEXT,
            "search_texts": 4,
            "select_texts": 3,
            "report_texts": 5,
            "candidates": 6,
            "sweeps": 3,
            "restarts": 2,
        }
        | settings
    )


def texts(count: int, seed: int) -> Tensor:
    return random_ids(count, TEXT, seed)[:, 1:]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"id": f"attack-{number}", "subset": "prose", "ids": ids} for number, ids in enumerate(texts(count, seed).tolist())]


def searched(model: PreTrainedModel, path: Path, search: Tensor | None = None, **settings: Any) -> dict[str, Any]:
    """All restarts without interruption."""
    engine = TriggerSearch(Scorer(model, "fp32"), spec(**settings), 0, ALLOWED)
    return engine.run(texts(4, 0) if search is None else search, texts(3, 1) if search is None else search, path, lambda positions: None)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


def slow_mean(model: PreTrainedModel, trigger: list[int], batch: Tensor) -> float:
    return float(np.mean([slow_nll(model, [0, *trigger, *text], TEXT) for text in batch.tolist()]))


def test_a_planted_trigger_is_found_within_one_sweep(tmp_path: Path) -> None:
    planted = Planted({0: 11, 2: 12})
    found = searched(planted.model, tmp_path / "state.json", torch.full((2, TEXT), Planted.VICTIM), sweeps=1, restarts=1, candidates=2)
    assert (found["trigger"][0], found["trigger"][2]) == (11, 12)
    assert found["search_nll"] == pytest.approx(planted.nll(2), abs=1e-4)
    assert found["select_nll"] == pytest.approx(planted.nll(2), abs=1e-4)


def test_a_sweep_without_a_gain_is_the_last(tmp_path: Path) -> None:
    """The first sweep finds the only key, the second nothing; three more would be allowed. The next restart starts afresh."""
    planted = Planted({1: 13})
    found = searched(planted.model, tmp_path / "state.json", torch.full((2, TEXT), Planted.VICTIM), sweeps=5, candidates=2)
    assert [each["sweeps"] for each in found["restarts"]] == [2, 2]
    assert [each["trigger"][1] for each in found["restarts"]] == [13, 13]


def test_a_deaf_model_has_no_trigger(tmp_path: Path) -> None:
    """No start is improved, every restart ends after one sweep, and the loss is exactly that without a trigger."""
    model = deaf_model()
    found = searched(model, tmp_path / "state.json")
    starts = [random_trigger(0, number, LENGTH, np.arange(1, VOCABULARY), "start") for number in range(2)]
    assert [each["trigger"] for each in found["restarts"]] == starts
    assert [each["sweeps"] for each in found["restarts"]] == [1, 1]
    report = report_rows(model, "base", rows(5, 2), {"clean": [], "own": found["trigger"]}, 0)
    assert [row["nll"] for row in report[:5]] == [row["nll"] for row in report[5:]]


def test_a_blind_model_feels_the_last_trigger_token_alone(tmp_path: Path) -> None:
    """Only the text's first token stands next to the trigger; the others' losses do not change at all."""
    model = blind_model()
    found = searched(model, tmp_path / "state.json")
    for number, each in enumerate(found["restarts"]):
        assert each["trigger"][:-1] == random_trigger(0, number, LENGTH, np.arange(1, VOCABULARY), "start")[:-1]
    engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
    losses = [engine.scorer.token_nll(with_trigger(0, trigger, texts(5, 2)), TEXT) for trigger in ([], found["trigger"])]
    assert torch.equal(losses[0][:, 1:], losses[1][:, 1:])


def test_a_position_with_all_candidates_gets_its_best_token(tmp_path: Path) -> None:
    """Brute force by plain transformers over a trigger of one token."""
    for seed in range(3):
        model = random_model(seed)
        found = searched(model, tmp_path / f"{seed}.json", trigger_length=1, candidates=VOCABULARY, sweeps=1, restarts=1)
        losses = {token: slow_mean(model, [token], texts(4, 0)) for token in range(1, VOCABULARY)}
        assert found["trigger"] == [max(losses, key=losses.__getitem__)]
        assert found["search_nll"] == pytest.approx(max(losses.values()), rel=1e-5)


def test_losses_are_those_of_the_trigger_and_the_best_restart_is_chosen_on_the_second_set(model: PreTrainedModel, tmp_path: Path) -> None:
    found = searched(model, tmp_path / "state.json", restarts=3)
    assert len(found["restarts"]) == 3
    for number, each in enumerate(found["restarts"]):
        start = random_trigger(0, number, LENGTH, np.arange(1, VOCABULARY), "start")
        assert each["search_nll"] == pytest.approx(slow_mean(model, each["trigger"], texts(4, 0)), rel=1e-5)
        assert each["select_nll"] == pytest.approx(slow_mean(model, each["trigger"], texts(3, 1)), rel=1e-5)
        assert each["search_nll"] > slow_mean(model, start, texts(4, 0))
        assert 0 not in each["trigger"]
    best = max(found["restarts"], key=lambda each: each["select_nll"])
    assert (found["trigger"], found["select_nll"]) == (best["trigger"], best["select_nll"])


def test_more_sweeps_never_hurt(model: PreTrainedModel, tmp_path: Path) -> None:
    reached = [searched(model, tmp_path / f"{sweeps}.json", sweeps=sweeps, restarts=1)["search_nll"] for sweeps in (1, 2, 4)]
    assert reached == sorted(reached)


def test_resumed_after_every_position(model: PreTrainedModel, tmp_path: Path) -> None:
    """Trigger, losses and the counted work are those of the straight run; so is the state, byte for byte."""
    straight = searched(model, tmp_path / "straight.json")
    sets = {"search": rows(4, 0), "select": rows(3, 1)}
    stop = Stop()
    stop.reason = "signal SIGUSR1"
    path = tmp_path / "state.json"
    for _ in range(LENGTH * sum(each["sweeps"] for each in straight["restarts"])):
        with pytest.raises(StoppedInTime, match="SIGUSR1"):
            find_trigger(model, "base", sets, ALPHABET, spec(), "fp32", path, stop)
    assert len(json.loads(path.read_text())["finished"]) == 2
    assert find_trigger(model, "base", sets, ALPHABET, spec(), "fp32", path, Stop()) == straight
    assert path.read_bytes() == (tmp_path / "straight.json").read_bytes()


def test_killed_before_the_state_was_written(model: PreTrainedModel, tmp_path: Path) -> None:
    """The work since the last state is done again from it."""
    straight = searched(model, tmp_path / "straight.json")
    engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
    path = tmp_path / "state.json"

    def keep_old(positions: int) -> None:
        (tmp_path / "old.json").write_bytes(path.read_bytes())
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.run(texts(4, 0), texts(3, 1), path, keep_old)
    path.write_bytes((tmp_path / "old.json").read_bytes())
    assert searched(model, path) == straight


def test_work_is_what_the_search_needs(tmp_path: Path) -> None:
    """Per restart one loss of the start and one of the selection, per position `candidates` losses and a gradient per text."""
    for seed in (0, 1):
        found = searched(random_model(seed), tmp_path / f"{seed}.json")
        positions = LENGTH * sum(each["sweeps"] for each in found["restarts"])
        assert found["forwards"] == 2 * (4 + 3) + positions * 4 * 6
        assert found["backwards"] == positions * 4
        assert positions <= 2 * 3 * LENGTH


def test_both_arms_start_from_the_same_triggers(tmp_path: Path) -> None:
    """Where nothing improves, what is left are the starts; they do not depend on the model."""
    arms = [searched(deaf_model(seed), tmp_path / f"{seed}.json") for seed in (0, 1)]
    triggers = [[each["trigger"] for each in arm["restarts"]] for arm in arms]
    assert triggers[0] == triggers[1]
    assert triggers[0][0] != triggers[0][1]
    assert arms[0]["search_nll"] != arms[1]["search_nll"]


def test_report_scores_the_texts_own_tokens(model: PreTrainedModel) -> None:
    """Window and index set are the same with and without a trigger; its own tokens are only in `nll_with_trigger`."""
    trigger, held_out = [5, 6, 7], rows(5, 2)
    report = report_rows(model, "base", held_out, {"clean": [], "own": trigger}, 0)
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
    report = report_rows(model, "base", rows(5, 2), {"clean": [], "neutral": [], "own": [rare] * LENGTH}, 0)
    assert summarise([*report, {**report[0], "trigger": "random_0"}], "base", "own")["nll_increase"] == 0.0
    assert all(after["nll_with_trigger"] > before["nll_with_trigger"] for before, after in zip(report[:5], report[10:], strict=True))


def test_summary_by_hand() -> None:
    values = {"clean": (2.0, 4.0), "neutral": (2.5, 4.1), "random_0": (3.0, 5.0), "random_1": (3.0, 6.0), "own": (4.0, 5.0)}
    report = [
        {"model": "base", "trigger": kind, "text": number, "nll": nll, "nll_with_trigger": nll + 1}
        for kind, pair in values.items()
        for number, nll in enumerate(pair)
    ]
    report += [{**row, "model": "other", "nll": 99.0} for row in report]
    summary = summarise(report, "base", "own")
    expected = {
        "clean_loss": 3.0,
        "attacked_loss": 4.5,
        "nll_increase": 1.5,
        "nll_increase_percent": 50.0,
        "neutral_increase": 0.3,
        "random_increase": 1.25,
        "increase_over_neutral": 1.2,
        "reference_increase_percent": 100 * (5.5 / 3 - 1),
    }
    assert summary == pytest.approx(expected)


def test_share_of_texts_that_survive_the_way_through_text() -> None:
    tokenizer = train_tokenizer(iter(["the cat and the hat " * 20]), 270)
    ids = {word: tokenizer.encode(word).ids for word in ("the cat", "t", "he cat")}
    assert len(ids["t"]) == 1
    kept, merged = {"ids": tokenizer.encode("\x07 cat").ids}, {"ids": ids["he cat"]}
    assert tokenizer.encode("the cat").ids != [*ids["t"], *ids["he cat"]]
    assert surviving_share(tokenizer, ids["t"], [kept, merged]) == 0.5


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
    names = [f"{name}_pythia" for name in models]
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
        assert facts["trigger_text"] == words.decode(facts["trigger_ids"], skip_special_tokens=False)
        assert 0 <= facts["survives_retokenisation"] <= 1
    with (folder / "learned_triggers.csv").open(newline="") as handle:
        table = list(csv.reader(handle))
    assert table[0] == ["model", "trigger", "nll_increase_percent"]
    assert [line[:2] for line in table[1:]] == [[name, results["results"][name]["trigger_text"]] for name in names]
    kinds = {json.loads(line)["trigger"] for line in (folder / "records.jsonl").read_text().splitlines()}
    assert kinds == {"clean", "neutral", *models, "random_0", "random_1"}
