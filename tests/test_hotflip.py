"""HotFlip: finds what is planted, finds nothing where there is nothing, and never touches what it scores."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Experiment, HotFlip
from tests.tiny_models import VOCABULARY, Planted, blind_model, deaf_model, random_ids, random_model, slow_nll
from utils.attacks.hotflip import Attack, attack_batch, attack_model, attack_rows, paired_tests, random_control, summarise
from utils.attacks.scoring import Scorer, allowed_tokens, first_order_candidates
from utils.data.attack_texts import Alphabet
from utils.models.loading import load_model
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop

PREFIX, SCORED = 8, 6
ALPHABET = Alphabet(0, VOCABULARY, (0,))
ALLOWED = allowed_tokens(VOCABULARY, ALPHABET.writable(), torch.device("cpu"))


def spec(**settings: Any) -> HotFlip:
    return HotFlip(
        **{"texts": 5, "prefix_tokens": PREFIX, "scored_tokens": SCORED, "flips": 3, "candidates": 6, "batch_size": 2, "random_draws": 3}
        | settings
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    return [
        {"id": f"attack-{number}", "subset": "prose", "ids": ids[1:]} for number, ids in enumerate(random_ids(5, PREFIX + SCORED).tolist())
    ]


def attacked(model: PreTrainedModel, ids: Tensor, **settings: Any) -> list[Attack]:
    return attack_batch(Scorer(model, "fp32"), ids, spec(**settings), ALLOWED)


def test_a_planted_weakness_is_found_within_the_budget() -> None:
    """Two keys, two flips: the exact rises, although the decoy has the largest first-order gain at both places."""
    planted = Planted({2: 11, 5: 12})
    ids = planted.texts(3, PREFIX, SCORED)
    for attack in attacked(planted.model, ids, flips=2, candidates=4):
        assert {(flip["position"], flip["new"]) for flip in attack.flips} == {(2, 11), (5, 12)}
        assert attack.nll == pytest.approx([planted.nll(keys) for keys in range(3)], abs=1e-4)


def test_the_decoy_would_win_without_exact_scores() -> None:
    planted = Planted({2: 11})
    scorer, ids = Scorer(planted.model, "fp32"), planted.texts(1, PREFIX, SCORED)
    slope = scorer.gradient(ids, SCORED, slice(1, 1 + PREFIX))[0]
    assert first_order_candidates(scorer, slope, ids[0, 1 : 1 + PREFIX], ALLOWED, 2).tolist() == [[2, Planted.DECOY], [2, 11]]
    (one_shot,) = attacked(planted.model, ids, flips=1, candidates=1)
    assert (one_shot.flips, one_shot.nll) == ([], [one_shot.nll[0]] * 2)


def test_a_spent_weakness_ends_the_attack() -> None:
    """One key and a budget of four: a single flip, and the curve goes on flat."""
    planted = Planted({2: 11})
    (attack,) = attacked(planted.model, planted.texts(1, PREFIX, SCORED), flips=4)
    assert len(attack.flips) == 1
    assert attack.nll == pytest.approx([planted.nll(0)] + 4 * [planted.nll(1)], abs=1e-4)
    assert attack.flips[0]["predicted"] == pytest.approx(planted.strength * (1 - 1 / VOCABULARY), rel=1e-4)


def test_a_deaf_model_is_not_attacked() -> None:
    """Its loss is the same for every text: no flip is accepted, and the random control is exactly zero."""
    ids = random_ids(3, PREFIX + SCORED)
    scorer = Scorer(deaf_model(), "fp32")
    for attack, row in zip(attack_batch(scorer, ids, spec(), ALLOWED), ids, strict=True):
        assert attack.flips == []
        assert len(set(attack.nll)) == 1
        assert random_control(scorer, row, "attack-0", spec(), ALLOWED) == [attack.nll[0]] * 3


def test_a_blind_model_is_attacked_next_to_the_scored_tokens_alone() -> None:
    ids = random_ids(3, PREFIX + SCORED)
    scorer = Scorer(blind_model(), "fp32")
    attacks = attack_batch(scorer, ids, spec(), ALLOWED)
    assert {flip["position"] for attack in attacks for flip in attack.flips} <= {PREFIX - 1}
    clean, after = scorer.token_nll(ids, SCORED), scorer.token_nll(torch.stack([attack.ids for attack in attacks]), SCORED)
    assert torch.equal(clean[:, 1:], after[:, 1:])


@pytest.mark.parametrize("seed", range(3))
def test_a_step_with_all_candidates_is_the_best_of_all_single_edits(seed: int) -> None:
    """Brute force by the plain forward of transformers, over every place and token."""
    model, prefix = random_model(seed), 3
    ids = random_ids(2, prefix + SCORED, seed)
    attacks = attacked(model, ids, prefix_tokens=prefix, flips=1, candidates=prefix * VOCABULARY)
    for attack, text in zip(attacks, ids.tolist(), strict=True):
        best = max(
            slow_nll(model, [*text[: 1 + place], token, *text[2 + place :]], SCORED)
            for place, token in itertools.product(range(prefix), range(1, VOCABULARY))
        )
        assert attack.nll[1] == pytest.approx(best, rel=1e-5)


def test_the_curve_never_falls_and_is_the_truth(model: PreTrainedModel) -> None:
    """Replaying the flips one by one by the plain forward gives the curve; scored tokens and end-of-text are as they were."""
    ids = random_ids(4, PREFIX + SCORED, seed=2)
    for attack, text in zip(attacked(model, ids, flips=5), ids.tolist(), strict=True):
        assert attack.nll == sorted(attack.nll)
        assert len(attack.nll) == 6
        replayed, curve = list(text), [slow_nll(model, text, SCORED)]
        for flip in attack.flips:
            assert replayed[1 + flip["position"]] == flip["old"] != flip["new"] != 0
            replayed[1 + flip["position"]] = flip["new"]
            curve.append(slow_nll(model, replayed, SCORED))
        assert attack.nll[: len(curve)] == pytest.approx(curve, rel=1e-5)
        assert attack.ids.tolist() == replayed
        assert replayed[0] == 0
        assert replayed[-SCORED:] == text[-SCORED:]
        assert len({flip["position"] for flip in attack.flips}) == len(attack.flips) > 0


def test_flips_do_more_than_chance(model: PreTrainedModel) -> None:
    ids = random_ids(4, PREFIX + SCORED, seed=2)
    scorer = Scorer(model, "fp32")
    for number, (attack, row) in enumerate(zip(attack_batch(scorer, ids, spec(), ALLOWED), ids, strict=True)):
        assert attack.nll[-1] > max(random_control(scorer, row, f"attack-{number}", spec(), ALLOWED))


def test_random_control_scores_the_drawn_texts(model: PreTrainedModel) -> None:
    """With all places flipped and one token allowed there is only one outcome."""
    (row,) = random_ids(1, PREFIX + SCORED)
    only = torch.zeros(VOCABULARY, dtype=torch.bool)
    only[9] = True
    found = random_control(Scorer(model, "fp32"), row, "attack-0", spec(flips=PREFIX), only)
    assert found == pytest.approx([slow_nll(model, [0, *[9] * PREFIX, *row.tolist()[-SCORED:]], SCORED)] * 3, rel=1e-5)


def test_batching_does_not_change_an_attack(model: PreTrainedModel) -> None:
    ids = random_ids(4, PREFIX + SCORED, seed=4)
    together = attacked(model, ids)
    alone = [attacked(model, row[None])[0] for row in ids]
    assert [attack.ids.tolist() for attack in together] == [attack.ids.tolist() for attack in alone]


def test_both_arms_get_the_same_budget() -> None:
    """Texts x (1 clean + flips x candidates) forwards and texts x flips backwards, whatever the model."""
    ids, spent = random_ids(3, PREFIX + SCORED, seed=2), []
    for seed in (0, 1):
        scorer = Scorer(random_model(seed), "fp32")
        attacks = attack_batch(scorer, ids, spec(), ALLOWED)
        assert not any(attack.stuck for attack in attacks)
        spent.append((scorer.forwards, scorer.backwards))
    assert spent == [(3 * (1 + 3 * 6), 3 * 3)] * 2


def test_reference_criterion_scores_the_flipped_tokens(model: PreTrainedModel, texts: list[dict[str, Any]]) -> None:
    rows = attack_rows(Scorer(model, "fp32"), "base", texts, 0, spec(), ALLOWED)
    for row, text in zip(rows, texts, strict=True):
        changed = [0, *text["ids"]]
        assert row["reference_clean"] == pytest.approx(slow_nll(model, changed, PREFIX + SCORED), rel=1e-5)
        for flip in row["flips"]:
            changed[1 + flip["position"]] = flip["new"]
        assert row["reference_attacked"] == pytest.approx(slow_nll(model, changed, PREFIX + SCORED), rel=1e-5)
        assert row["nll"][0] == pytest.approx(slow_nll(model, [0, *text["ids"]], SCORED), rel=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 400, 0.3, 0.55, 0.99, 1.0])
def test_interruption_changes_nothing(model: PreTrainedModel, texts: list[dict[str, Any]], tmp_path: Path, cut: float) -> None:
    """The file is cut anywhere, in the middle of a line or of a batch; what is done again is the same, byte for byte."""
    path = tmp_path / "records.jsonl"
    straight = attack_model(model, "base", texts, ALPHABET, spec(), "fp32", path, Stop())
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    assert attack_model(model, "base", texts, ALPHABET, spec(), "fp32", path, Stop()) == straight
    assert path.read_bytes() == data


def test_a_request_to_stop_is_heard_between_batches(model: PreTrainedModel, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    class After(Stop):
        """Asks to stop at the second look."""

        looks = 0

        def requested(self) -> bool:
            self.looks += 1
            self.reason = "signal SIGTERM" if self.looks == 2 else None
            return super().requested()

    path = tmp_path / "records.jsonl"
    with pytest.raises(StoppedInTime, match="signal SIGTERM"):
        attack_model(model, "base", texts, ALPHABET, spec(), "fp32", path, After())
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["attack-0", "attack-1"]
    assert len(attack_model(model, "base", texts, ALPHABET, spec(), "fp32", path, Stop())) == 5


def rows_of(rises: list[float], reference: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "nll": [2.0, 2.0 + rise / 2, 2.0 + rise],
            "flips": [{}, {}],
            "random_nll": [2.1, 2.3],
            "reference_clean": 4.0,
            "reference_attacked": 4.0 * ratio,
        }
        for rise, ratio in zip(rises, reference, strict=True)
    ]


def test_summary_by_hand() -> None:
    summary = summarise(rows_of([0.05, 0.2, 0.35], [1.1, 1.2, 1.3]), spec(flips=2, threshold_nats=0.1))
    assert summary["avg_degradation"] == pytest.approx(0.2)
    assert summary["std_degradation"] == pytest.approx(0.15)
    assert summary["success_rate"] == pytest.approx(2 / 3)
    assert (summary["avg_orig_loss"], summary["avg_attack_loss"]) == pytest.approx((2.0, 2.2))
    assert summary["random_degradation"] == pytest.approx(0.2)
    assert summary["rise_by_flips"] == pytest.approx([0.0, 0.1, 0.2])
    assert summary["reference_criterion"]["success_rate"] == pytest.approx(2 / 3)
    assert summary["reference_criterion"]["mean_relative_rise"] == pytest.approx(0.2)
    assert (summary["mean_flips"], summary["num_samples"], summary["num_oom_skipped"]) == (2.0, 3, 0)
    assert summarise(rows_of([0.2], [1.1]), spec(flips=2))["std_degradation"] == 0.0


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
    for name, (number, where) in models.items():
        mine = [row for row in rows if row["model"] == name]
        assert [row["text"] for row in mine] == list(texts)
        model = load_model(stage_folder(finished, number) / where)
        for row in mine:
            ids = [stored["alphabet"]["end_of_text"], *texts[row["text"]]]
            for flip in row["flips"]:
                ids[1 + flip["position"]] = flip["new"]
            assert row["nll"][-1] == pytest.approx(slow_nll(model, ids, tiny.hotflip.scored_tokens), rel=1e-4)
        facts = results["results"][f"{name}_pythia"]
        assert facts["avg_degradation"] == pytest.approx(np.mean([row["nll"][-1] - row["nll"][0] for row in mine]))
        assert facts["model_name"] == name


def test_paired_tests_against_scipy_and_by_hand() -> None:
    rises = {"baseline": [0.1, 0.5, 0.6, 0.7, 0.2], "monotonic": [0.1, 0.3, 0.1, 0.8, 0.1]}
    made = [{"model": name, "nll": [1.0, 1.0 + rise]} for name, values in rises.items() for rise in values]
    tests = paired_tests(made, "baseline", "monotonic", 0.4)
    assert tests["mean_difference"] == pytest.approx(-0.14)
    assert (tests["success_of_baseline_only"], tests["success_of_monotonic_only"], tests["mcnemar_p_value"]) == (2, 0, 0.5)
    assert tests["wilcoxon_p_value"] == pytest.approx(2 * 3 / 16)  # 3 of 16 sign patterns give a sum of positive ranks up to 1.5
    same = paired_tests([{"model": name, "nll": [1.0, 2.0]} for name in ("a", "b") for _ in range(3)], "a", "b", 0.4)
    assert (same["wilcoxon_p_value"], same["mcnemar_p_value"]) == (1.0, 1.0)
