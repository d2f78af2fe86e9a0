"""Rows of the attacks by flips: losses by the plain forward, replayed flips, resume to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import Experiment, HotFlip
from tests.tiny_models import VOCABULARY, deaf_model, random_ids, random_model, slow_nll
from utils.attacks import edits, scoring
from utils.attacks.flip_records import LONGER, SEARCHES, FlipAttacks, change_before_the_first_flip
from utils.attacks.round_trip import RoundTrip
from utils.data.attack_texts import Alphabet
from utils.data.tokenizer import train_tokenizer
from utils.models.loading import load_model
from utils.run.records import grouped

pytestmark = pytest.mark.usefixtures("no_sync")
PREFIX, SCORED, FLIPS = 8, 6, 3
ALPHABET = Alphabet(0, VOCABULARY, (0,))
WORDS = RoundTrip(train_tokenizer(iter(["to be or not to be"]), 270))  # ids below 40 are single characters to it
TEXTS: list[dict[str, Any]] = [
    {"id": f"attack-{number}", "subset": "prose", "ids": ids[1:]} for number, ids in enumerate(random_ids(5, PREFIX + SCORED).tolist())
]


def spec(**settings: Any) -> HotFlip:
    sizes = {"texts": 5, "prefix_tokens": PREFIX, "scored_tokens": SCORED, "flips": FLIPS, "candidates": 6, "longer_texts": 2}
    return HotFlip(**sizes | {"batch_size": 2, "random_draws": 3} | settings)


def attacks(model: PreTrainedModel, name: str = "base", **settings: Any) -> FlipAttacks:
    return FlipAttacks(model, name, TEXTS, ALPHABET, WORDS, spec(**settings), "fp32")


def searched(on: FlipAttacks, attack: str, folder: Path, texts: list[dict[str, Any]] = TEXTS, step: Any = lambda: None) -> list[Any]:
    """Rows of all groups of texts."""
    groups = [(folder / f"{on.name}.{attack}.{number}.json", group) for number, group in enumerate(grouped(texts, on.spec.batch_size))]
    return [row for begun, group in groups for row in on.search(attack, group, begun, step)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


def replayed(text: dict[str, Any], flips: list[dict[str, int]]) -> list[int]:
    ids = [0, *text["ids"]]
    for flip in flips:
        ids[1 + flip["position"]] = flip["new"]
    return ids


def test_losses_are_those_of_the_plain_forward(model: PreTrainedModel, tmp_path: Path) -> None:
    """After every flip on the untouched tokens; over all tokens, flipped ones included, for the reference's criterion."""
    rows = searched(attacks(model), "hotflip", tmp_path)
    assert [row["text"] for row in rows] == [text["id"] for text in TEXTS]
    for row, text in zip(rows, TEXTS, strict=True):
        assert row["nll"] == pytest.approx([slow_nll(model, replayed(text, row["flips"][:k]), SCORED) for k in range(FLIPS + 1)], rel=1e-5)
        assert row["reference_clean"] == pytest.approx(slow_nll(model, [0, *text["ids"]], PREFIX + SCORED), rel=1e-5)
        assert row["reference_attacked"] == pytest.approx(slow_nll(model, replayed(text, row["flips"]), PREFIX + SCORED), rel=1e-5)
        assert (row["forwards"], row["backwards"]) == (1 + row["evaluations"], 4 * FLIPS)
        assert row["leak"] == 0.0
        assert len(row["random_nll"]) == 3
    assert [row["text"] for row in rows if "gradient" in row] == ["attack-0", "attack-1"]


def test_other_attacks_have_what_makes_sense_for_them(model: PreTrainedModel, tmp_path: Path) -> None:
    on = attacks(model)
    query, own = searched(on, "query_greedy", tmp_path), searched(on, "hotflip", tmp_path)
    longer = searched(on, "longer", tmp_path, TEXTS[:2])
    assert {row["attack"] for row in query} == {"query_greedy"}
    assert all(row["backwards"] == 0 and not {"random_nll", "zero_gradient", "gradient"} & set(row) for row in query)
    assert all(row["evaluations"] >= LONGER * 6 * FLIPS for row in longer)
    assert np.mean([row["nll"][1] for row in longer]) >= np.mean([row["nll"][1] for row in own[:2]])


def test_transferred_flips_are_replayed_as_ids(model: PreTrainedModel, tmp_path: Path) -> None:
    other = random_model(1)
    rows = searched(attacks(model), "hotflip", tmp_path)
    moved = attacks(other, name="other").transferred("base", {row["text"]: row["flips"] for row in rows}, TEXTS)
    for row, source, text in zip(moved, rows, TEXTS, strict=True):
        assert (row["model"], row["attack"], row["text"]) == ("other", "transfer:base", text["id"])
        assert row["nll"] == pytest.approx([slow_nll(other, replayed(text, source["flips"][:k]), SCORED) for k in (0, FLIPS)], rel=1e-5)
        assert not {"flips", "forwards", "random_nll"} & set(row)


def test_transfer_to_the_same_weights_is_the_attack(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = searched(attacks(model), "hotflip", tmp_path)
    moved = attacks(model, name="twin").transferred("base", {row["text"]: row["flips"] for row in rows}, TEXTS)
    for again, row in zip(moved, rows, strict=True):
        assert again["nll"] == pytest.approx([row["nll"][0], row["nll"][-1]], rel=1e-5)


def test_a_deaf_model_shows_exactly_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    on = attacks(deaf_model())
    flips = {row["text"]: row["flips"] for row in searched(attacks(model, name="other"), "hotflip", tmp_path)}
    found = {attack: searched(on, attack, tmp_path) for attack in SEARCHES}
    for row in (*chain(*found.values()), *on.transferred("other", flips, TEXTS)):
        assert set(row["nll"]) == {row["nll"][0]}
        assert row.get("stuck", True)
    facts = found["hotflip"][0]
    assert (facts["zero_gradient"], facts["gradient"]) == (1.0, {"random_rank_correlation": None, "bf16_cosine": None})


def test_what_a_flip_must_not_change() -> None:
    """Position 2 is token 3; columns are those of tokens 1, 2, 3, ..."""
    change = torch.tensor([0.0, 0.25, 9.0, 9.0])
    assert change_before_the_first_flip(change, [{"position": 3}, {"position": 2}]) == 0.25
    assert change_before_the_first_flip(change, [{"position": 0}]) == 0.0
    assert change_before_the_first_flip(change, []) == 0.0


def test_a_model_that_looks_ahead_leaks(tmp_path: Path) -> None:
    """Embeddings are mixed over the whole text in front of the first block."""
    model = random_model()

    def mix(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> Any:
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"] + kwargs["inputs_embeds"].mean(dim=1, keepdim=True)}

    model.base_model.register_forward_pre_hook(mix, with_kwargs=True)
    assert max(row["leak"] for row in searched(attacks(model), "hotflip", tmp_path)) > 0.01


def contents(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(state.iterdir())}


class Cut(Exception):
    """What ends a process between two flips."""


@pytest.mark.parametrize("kind", SEARCHES)
def test_cut_after_every_flip(model: PreTrainedModel, tmp_path: Path, kind: str) -> None:
    """Rows and what is kept equal those of the straight run, to the byte; no flip is searched twice."""
    for folder in ("straight", "cut"):
        (tmp_path / folder).mkdir()
    straight = searched(attacks(model), kind, tmp_path / "straight")
    starts = 0
    while True:
        starts += 1
        on, flips = attacks(model), iter(range(1))

        def step(flips: Iterator[int] = flips) -> None:
            if next(flips, None) is None:
                raise Cut

        try:
            assert searched(on, kind, tmp_path / "cut", step=step) == straight
            break
        except Cut:
            assert on.scorers["fp32"].backwards <= 2 * 2 * 4 + 4
    assert starts > FLIPS
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight")


def test_a_search_does_not_depend_on_what_its_model_did_before(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values that an earlier search has left behind are not looked at: other processes would not have them."""
    for module in (edits, scoring):
        monkeypatch.setattr(module, "LEAST_PREFIX", 1)
    straight = attacks(model).search("query_greedy", TEXTS[:2], tmp_path / "begun.json", lambda: None)
    (tmp_path / "begun.json").unlink()
    on = attacks(model)
    ids = on._ids(TEXTS[:2])
    on.scorers["fp32"].gradient(ids, SCORED, slice(1, 1 + PREFIX))
    seen, pairs = on.scorers["fp32"]._seen  # type: ignore[misc]
    assert torch.equal(seen, ids)
    for keys, values in pairs:
        keys.zero_()
        values.zero_()
    assert on.search("query_greedy", TEXTS[:2], tmp_path / "begun.json", lambda: None) == straight


def test_steps_are_flips_of_texts(model: PreTrainedModel, tmp_path: Path) -> None:
    """A text that is given up has no more to make; a search among more candidates counts for as many."""
    begun = tmp_path / "begun.json"
    made: list[int] = []
    for on, attack in ((attacks(model), "hotflip"), (attacks(model), "longer"), (attacks(deaf_model()), "hotflip")):
        begun.unlink(missing_ok=True)
        on.search(attack, TEXTS[:2], begun, lambda: made.append(json.loads(begun.read_text())["steps"]))
    assert made == [2, 4, 6, 20, 40, 60, 6]


def byte_texts(*texts: str) -> tuple[RoundTrip, list[dict[str, Any]]]:
    words = RoundTrip(train_tokenizer(iter(["the cat and the hat " * 20]), 270))
    return words, [{"id": text, "subset": "prose", "ids": words.tokenizer.encode(text).ids} for text in texts]


@pytest.mark.parametrize("mode", ["ids", "text"])
@pytest.mark.parametrize("kind", ["hotflip", "query_greedy"])
def test_in_mode_text_every_flipped_text_can_be_typed(tmp_path: Path, mode: str, kind: str) -> None:
    """Over the vocabulary of a small tokenizer, in which neighbours merge easily; in mode 'ids' that is counted and not avoided."""
    words, texts = byte_texts("xq zv that hat cat wy pl", "kj qx hand that tan wy pl")
    texts = [{**text, "ids": text["ids"][:14]} for text in texts]
    model = random_model(vocabulary=270)
    settings = spec(texts=2, candidates=10, mode=mode)
    on = FlipAttacks(model, "base", texts, Alphabet(0, 270, (0,)), words, settings, "fp32")
    rows = on.search(kind, texts, tmp_path / "begun.json", lambda: None)
    for row, text in zip(rows, texts, strict=True):
        ids = replayed(text, row["flips"])[1:]
        comes_back = words.tokenizer.encode(words.tokenizer.decode(ids)).ids == ids
        assert row["survives_retokenisation"] == comes_back
        assert row["flips"]
        assert comes_back or mode == "ids"
    assert all(row["survives_retokenisation"] for row in rows) == (mode == "text")


@pytest.mark.integration
def test_stored_results_follow_from_the_stored_models(finished: Path, tiny: Experiment, stage_folder: Any) -> None:
    """The reference's fields; and every attacked text, replayed by plain transformers on the stored model, has the loss reported."""
    folder = stage_folder(finished, 6)
    results = json.loads((folder / "hotflip_results.json").read_text())
    assert set(results["attack_config"]) >= {"num_flips", "num_samples", "success_threshold"}
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    stored = json.loads((stage_folder(finished, 0) / "attack_texts.json").read_text())
    texts = {text["id"]: text["ids"] for text in stored["sets"]["hotflip"]}
    models = {"base": (0, "base_model"), "baseline": (2, "best"), "monotonic": (3, "best")}
    attacked = {row["model"] for row in rows}
    assert attacked >= set(models)
    for kind in ("noise", "earlier"):
        assert (kind in attacked) == isinstance(results["matched"][kind], dict)
    flips = {(row["model"], row["text"]): row["flips"] for row in rows if row["attack"] == "hotflip"}
    for name, (number, where) in models.items():
        mine = [row for row in rows if row["model"] == name]
        kinds = {"hotflip", "query_greedy", "longer", *(f"transfer:{source}" for source in attacked if source != name)}
        assert {row["attack"] for row in mine} == kinds
        model = load_model(stage_folder(finished, number) / where)
        for row in mine:
            edits = flips[row["attack"].partition(":")[2], row["text"]] if row["attack"].startswith("transfer") else row["flips"]
            ids = [stored["alphabet"]["end_of_text"], *texts[row["text"]]]
            for flip in edits:
                ids[1 + flip["position"]] = flip["new"]
            assert row["nll"][-1] == pytest.approx(slow_nll(model, ids, tiny.hotflip.scored_tokens), rel=1e-4)
        own = [row for row in mine if row["attack"] == "hotflip"]
        assert [row["text"] for row in own] == list(texts)
        facts = results["results"][f"{name}_pythia"]
        assert facts["avg_degradation"] == pytest.approx(np.mean([row["nll"][-1] - row["nll"][0] for row in own]))
        assert facts["model_name"] == name
        assert facts["worst_case"]["rise"] >= facts["avg_degradation"]
