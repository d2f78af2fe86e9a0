"""Universal triggers: the search finds what is planted, races its candidates, spends its allowance, and resumes to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import UAT
from tests.tiny_models import VOCABULARY, Planted, blind_model, deaf_model, random_ids, random_model, slow_nll
from utils.attacks import edits, scoring
from utils.attacks.controls import random_trigger
from utils.attacks.round_trip import RoundTrip
from utils.attacks.scoring import Scorer, allowed_tokens
from utils.attacks.uat import TriggerSearch, chosen, surviving_share, with_trigger
from utils.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("no_sync")
TEXT, LENGTH = 6, 3
ALLOWED = allowed_tokens(VOCABULARY, np.arange(1, VOCABULARY), torch.device("cpu"))


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
            "race_share": 0.5,
        }
        | settings
    )


def texts(count: int, seed: int) -> Tensor:
    return random_ids(count, TEXT, seed)[:, 1:]


def searched(model: PreTrainedModel, path: Path, search: Tensor | None = None, **settings: Any) -> dict[str, Any]:
    """All restarts, each with a state of its own, without interruption."""
    engine = TriggerSearch(Scorer(model, "fp32"), spec(**settings), 0, ALLOWED)
    return every_restart(engine, texts(4, 0) if search is None else search, texts(3, 1) if search is None else search, path)


def every_restart(engine: TriggerSearch, search: Tensor, select: Tensor, path: Path, step: Any = lambda: None) -> dict[str, Any]:
    restarts = range(engine.spec.restarts + 1)
    return chosen([engine.run(number, search, select, path.with_name(f"{path.stem}-{number}.json"), step) for number in restarts])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


def slow_mean(model: PreTrainedModel, trigger: list[int], batch: Tensor) -> float:
    return float(np.mean([slow_nll(model, [0, *trigger, *text], TEXT) for text in batch.tolist()]))


def test_a_planted_trigger_is_found_within_one_sweep(tmp_path: Path) -> None:
    planted = Planted({0: 11, 2: 12})
    found = searched(planted.model, tmp_path / "state.json", torch.full((2, TEXT), Planted.VICTIM), sweeps=1, restarts=1, candidates=4)
    assert (found["trigger"][0], found["trigger"][2]) == (11, 12)
    assert found["search_nll"] == pytest.approx(planted.nll(2), abs=1e-4)
    assert found["select_nll"] == pytest.approx(planted.nll(2), abs=1e-4)


def test_after_a_sweep_without_a_gain_the_next_candidates_have_their_turn(tmp_path: Path) -> None:
    """The decoy ranks first and does nothing; the key ranks second, and is a candidate only in the second sweep."""
    planted = Planted({1: 13})
    victims = torch.full((2, TEXT), Planted.VICTIM)
    found = searched(planted.model, tmp_path / "state.json", victims, sweeps=3, candidates=1, beam=1, restarts=1)
    assert found["trigger"][1] == 13
    assert found["by_sweep"] == pytest.approx([planted.nll(0), planted.nll(0), planted.nll(1), planted.nll(1)], abs=1e-4)


def test_a_deaf_model_has_no_trigger(tmp_path: Path) -> None:
    """No start is improved, with gradient or without, and the loss is that without a trigger."""
    model = deaf_model()
    found = searched(model, tmp_path / "state.json")
    starts = [random_trigger(0, number, LENGTH, np.arange(1, VOCABULARY), "start") for number in range(2)]
    assert [each["trigger"] for each in found["restarts"]] == starts
    assert found["query_greedy"]["trigger"] == starts[0]
    engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
    assert torch.equal(engine.nll([], texts(5, 2)), engine.nll(found["trigger"], texts(5, 2)))


def test_a_blind_model_feels_the_last_trigger_token_alone(tmp_path: Path) -> None:
    """Only the text's first token stands next to the trigger; the others' losses do not change at all."""
    model = blind_model()
    found = searched(model, tmp_path / "state.json", beam=1)
    for number, each in enumerate(found["restarts"]):
        assert each["trigger"][:-1] == random_trigger(0, number, LENGTH, np.arange(1, VOCABULARY), "start")[:-1]
    engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
    losses = [engine.scorer.token_nll(with_trigger(0, trigger, texts(5, 2)), TEXT) for trigger in ([], found["trigger"])]
    assert torch.equal(losses[0][:, 1:], losses[1][:, 1:])


def test_a_position_with_all_candidates_gets_its_best_token(tmp_path: Path) -> None:
    """Brute force by plain transformers over a trigger of one token."""
    for seed in range(3):
        model = random_model(seed)
        found = searched(model, tmp_path / f"{seed}.json", trigger_length=1, candidates=VOCABULARY, sweeps=1, restarts=1, race_share=1.0)
        losses = {token: slow_mean(model, [token], texts(4, 0)) for token in range(1, VOCABULARY)}
        assert found["trigger"] == [max(losses, key=losses.__getitem__)]
        assert found["search_nll"] == pytest.approx(max(losses.values()), rel=1e-5)
        assert found["query_greedy"]["trigger"] == found["trigger"]


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
    path = tmp_path / "state.json"

    def stop() -> None:
        raise KeyboardInterrupt

    for _ in range(3 * 3 * LENGTH):
        engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
        with pytest.raises(KeyboardInterrupt):
            every_restart(engine, texts(4, 0), texts(3, 1), path, stop)
    assert searched(model, path) == straight
    for number in range(3):
        assert (tmp_path / f"state-{number}.json").read_bytes() == (tmp_path / f"straight-{number}.json").read_bytes()


def test_a_restart_does_not_depend_on_those_before_it(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes may have done them."""
    for module in (edits, scoring):
        monkeypatch.setattr(module, "LEAST_PREFIX", 1)
    straight = searched(model, tmp_path / "straight.json")
    for number, expected in enumerate((*straight["restarts"], straight["query_greedy"])):
        engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
        engine.scorer._seen = "keys and values of another one", []  # type: ignore[assignment]
        found = engine.run(number, texts(4, 0), texts(3, 1), tmp_path / f"{number}.json", lambda: None)
        assert {kind: found[kind] for kind in expected} == expected


def test_killed_before_the_state_was_written(model: PreTrainedModel, tmp_path: Path) -> None:
    """The work since the last state is done again from it."""
    straight = searched(model, tmp_path / "straight.json")
    engine = TriggerSearch(Scorer(model, "fp32"), spec(), 0, ALLOWED)
    path = tmp_path / "state.json"

    def keep_old() -> None:
        (tmp_path / "old.json").write_bytes(path.read_bytes())
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.run(0, texts(4, 0), texts(3, 1), path, keep_old)
    path.write_bytes((tmp_path / "old.json").read_bytes())
    found = engine.run(0, texts(4, 0), texts(3, 1), path, lambda: None)
    assert {kind: found[kind] for kind in straight["restarts"][0]} == straight["restarts"][0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_all_searches_cost_the_same(tmp_path: Path, share: float) -> None:
    """To the last sequence, also on a model that cannot be improved: a restart's start and selection; at each position the race and, but
    for the search without them, gradients for each text and trigger of the beam, which has one at the first position, then two."""
    raced = {0.5: 6 * 4 + 3 * 4 + 2 * 8, 1.0: 6 * 16}[share]
    positions, batch, spent = 2 * LENGTH, texts(16, 0), set()
    for name, model in {"one": random_model(0), "other": random_model(1), "deaf": deaf_model()}.items():
        found = searched(model, tmp_path / f"{name}.json", batch, race_share=share, sweeps=2)
        assert found["forwards"] == 3 * (16 + 16 + positions * raced)
        assert found["backwards"] == 2 * 16 * 2 * (1 + 2 * (positions - 1))
        assert found["evaluations"] == 3 * positions * 6
        spent.add(found["flops"])
    assert len(spent) == 1


def test_both_arms_start_from_the_same_triggers(tmp_path: Path) -> None:
    """Where nothing improves, what is left are the starts; they do not depend on the model."""
    arms = [searched(deaf_model(seed), tmp_path / f"{seed}.json") for seed in (0, 1)]
    triggers = [[each["trigger"] for each in arm["restarts"]] for arm in arms]
    assert triggers[0] == triggers[1]
    assert triggers[0][0] != triggers[0][1]
    assert arms[0]["query_greedy"]["trigger"] == triggers[0][0]
    assert arms[0]["search_nll"] != arms[1]["search_nll"]


def test_a_race_ends_with_exact_losses_on_all_texts(model: PreTrainedModel, tmp_path: Path) -> None:
    """Whatever was passed over on the way; and every trigger of the beam has its own loss."""
    engine = TriggerSearch(Scorer(model, "fp32"), spec(beam=3), 0, ALLOWED)
    path = tmp_path / "state.json"

    def look() -> None:
        beam = json.loads(path.read_text())["beam"]
        for each in beam:
            assert each["objective"] == pytest.approx(slow_mean(model, each["trigger"], texts(4, 0)), rel=1e-5)
        assert len({tuple(each["trigger"]) for each in beam}) == len(beam) == 3
        assert [each["objective"] for each in beam] == sorted((each["objective"] for each in beam), reverse=True)

    engine.run(0, texts(4, 0), texts(3, 1), path, look)


def test_a_race_keeps_the_winner_that_every_text_agrees_on(tmp_path: Path) -> None:
    planted = Planted({0: 11, 2: 12})
    victims = torch.full((16, TEXT), Planted.VICTIM)
    found = searched(planted.model, tmp_path / "state.json", victims, sweeps=1, restarts=1, candidates=8, race_share=0.25)
    assert (found["trigger"][0], found["trigger"][2]) == (11, 12)


def test_a_wider_beam_is_no_worse_on_average(tmp_path: Path) -> None:
    def reached(beam: int) -> float:
        paths = {seed: tmp_path / f"{beam}-{seed}.json" for seed in range(3)}
        return np.mean([searched(random_model(seed), path, beam=beam, restarts=1, sweeps=2)["search_nll"] for seed, path in paths.items()])

    assert reached(4) >= reached(1)


def cat_texts() -> tuple[RoundTrip, Tensor]:
    """Beginnings that merge with what stands in front of them: 't' in front of 'he cat' becomes 'the'."""
    words = RoundTrip(train_tokenizer(iter(["the cat and the hat " * 20]), 270))
    return words, torch.tensor([words.tokenizer.encode(text).ids[:TEXT] for text in ("he cats xyz q", "at hats wvu k", " cats ghj lm")])


@pytest.mark.parametrize("mode", ["ids", "text"])
def test_in_mode_text_every_trigger_can_be_typed(tmp_path: Path, mode: str) -> None:
    words, batch = cat_texts()
    allowed = allowed_tokens(270, np.arange(1, 270), torch.device("cpu"))
    engine = TriggerSearch(Scorer(random_model(vocabulary=270), "fp32"), spec(mode=mode, restarts=3), 0, allowed, words)
    found = every_restart(engine, batch, batch, tmp_path / "state.json")
    shares = [surviving_share(words, each["trigger"], batch.tolist()) for each in (*found["restarts"], found["query_greedy"])]
    assert (min(shares) == 1.0) == (mode == "text")
    assert found["search_nll"] > found["by_sweep"][0]


def test_share_of_texts_that_survive_the_way_through_text() -> None:
    tokenizer = train_tokenizer(iter(["the cat and the hat " * 20]), 270)
    ids = {word: tokenizer.encode(word).ids for word in ("the cat", "t", "he cat")}
    assert len(ids["t"]) == 1
    kept, merged = tokenizer.encode("\x07 cat").ids, ids["he cat"]
    assert tokenizer.encode("the cat").ids != [*ids["t"], *ids["he cat"]]
    assert surviving_share(RoundTrip(tokenizer), ids["t"], [kept, merged]) == 0.5
