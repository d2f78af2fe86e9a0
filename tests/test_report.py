"""The report of a finished run: numbers by hand from its records, words that follow from edited records, files that open."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from configs.schema import Experiment
from tests.extended_records import plain
from utils.report import quality, robustness, triggers
from utils.report.attack_figures import figures
from utils.report.figures import write_figures
from utils.report.findings import key_findings, non_inferior
from utils.report.numbers import Number
from utils.report.page import write_page
from utils.report.study import MODELS, Study
from utils.report.summary import final_results, summary_text
from utils.report.table import write_tables
from utils.report.tables import tables
from utils.run.artifacts import read_json, write_json
from utils.run.errors import InputError

pytestmark = pytest.mark.integration
SECTIONS = ["TRAINING SUMMARY", "PERPLEXITY EVALUATION", "ADVERSARIAL ROBUSTNESS", "KEY FINDINGS", "PAPER INTEGRATION (Table 7)"]
MADE = ["perplexity", "perplexity_by_subset", "comparisons", "attacks", "hotflip", "uat", "transfer", "training", "budget"]


@pytest.fixture(scope="module")
def inputs(finished_records: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return plain(finished_records, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def study(tiny: Experiment, inputs: dict[str, Path]) -> Study:
    return Study.load(tiny, {42: inputs})


@pytest.fixture
def real(tiny: Experiment, finished_records: dict[str, Path]) -> Study:
    """As the stage has it."""
    return Study.load(tiny, {42: finished_records})


def test_seeds_of_different_text_are_not_summed_up(tiny: Experiment, inputs: dict[str, Path], tmp_path: Path) -> None:
    stored = read_json(inputs["setup"])
    write_json(tmp_path / "setup.json", stored | {"source": stored["source"] | {"fallback_because": "the hub was away"}})
    with pytest.raises(InputError, match=r"seeds 42 and 7 were made from different text \(setup_complete\.json, source\)"):
        Study.load(tiny, {42: inputs, 7: inputs | {"setup": tmp_path / "setup.json"}})


def of(frame: pd.DataFrame, model: str, column: str) -> list[Any]:
    return frame[frame["model"] == model][column].tolist()


def with_losses(study: Study, gap: float) -> Study:
    """Monotonic's loss of every document is the baseline's plus `gap` nats per token, and a little that differs."""
    documents = study.documents.copy()
    ours = documents["model"] == "monotonic"
    tokens = documents.loc[ours, "tokens"].to_numpy()
    noise = 1e-3 * np.cos(np.arange(len(tokens))) if gap else 0.0
    documents.loc[ours, "nll"] = np.array(of(documents, "baseline", "nll")) + (gap + noise) * tokens
    return replace(study, documents=documents)


def with_rises(study: Study, baseline: list[float], monotonic: list[float]) -> Study:
    flips = study.flips.copy()
    for model, rises in (("baseline", baseline), ("monotonic", monotonic)):
        flips.loc[(flips["model"] == model) & (flips["attack"] == "hotflip"), "rise"] = rises
    return replace(study, flips=flips)


def with_trigger_gap(study: Study, gap: float) -> Study:
    """Every text's rise under the own trigger is larger by `gap` on the monotonic model."""
    triggers = study.triggers.copy()
    for number, text in enumerate(triggers["text"].unique()):
        for model, rise in (("baseline", 0.3), ("monotonic", 0.3 + gap + 0.001 * number * (gap != 0))):
            mine = (triggers["text"] == text) & (triggers["model"] == model)
            clean = triggers.loc[mine & (triggers["trigger"] == "clean"), "nll"].item()
            triggers.loc[mine & (triggers["trigger"] == model), "nll"] = clean + rise
    return replace(study, triggers=triggers)


def with_three_searches(study: Study, gap: float) -> Study:
    """Three seeds whose searches differ a little, and nothing else."""
    seeds = {42: 0.0, 43: 0.01, 44: -0.01}
    made = [with_trigger_gap(study, gap + shift).triggers.assign(seed=seed) for seed, shift in seeds.items()]
    same = {
        name: pd.concat([getattr(study, name).assign(seed=seed) for seed in seeds], ignore_index=True)
        for name in ("documents", "flips", "steps")
    }
    return replace(study, json=dict.fromkeys(seeds, study.json[42]), triggers=pd.concat(made, ignore_index=True), **same)


def with_seeds(study: Study) -> Study:
    """A second seed whose monotonic model is worse by half a nat per token, and which resists less."""
    documents, flips, triggers, steps = (frame.assign(seed=43) for frame in (study.documents, study.flips, study.triggers, study.steps))
    ours = documents["model"] == "monotonic"
    documents.loc[ours, "nll"] += 0.5 * documents.loc[ours, "tokens"]
    flips["rise"] += 1.0
    frames = [
        pd.concat(pair, ignore_index=True)
        for pair in ((study.documents, documents), (study.flips, flips), (study.triggers, triggers), (study.steps, steps))
    ]
    names = ("documents", "flips", "triggers", "steps")
    return replace(study, json={42: study.json[42], 43: study.json[42]}, **dict(zip(names, frames, strict=True)))


def with_one(study: Study) -> Study:
    """One document, one attacked text."""
    return replace(
        study,
        documents=study.documents[study.documents["document"] == study.documents["document"].iloc[0]],
        flips=study.flips[study.flips["text"] == study.flips["text"].iloc[0]],
        triggers=study.triggers[study.triggers["text"] == study.triggers["text"].iloc[0]],
    )


def findings(study: Study) -> list[str]:
    text = summary_text(study)
    return text[text.index("KEY FINDINGS") : text.index("PAPER INTEGRATION")].splitlines()[2:]


def finding(study: Study, start: str) -> str:
    (line,) = (line for line in findings(study) if line.startswith(start))
    return line


def test_losses_by_hand(study: Study, inputs: dict[str, Path]) -> None:
    """Sums over the stored lines, without pandas."""
    rows = [json.loads(line) for line in inputs["evaluation_records"].read_text().splitlines()]
    for model in MODELS:
        mine = [row for row in rows if row["model"] == model]
        expected = sum(row["nll"] for row in mine) / sum(row["tokens"] for row in mine)
        assert quality.loss(study, model).value == pytest.approx(expected)
        stored = study.json[42]["evaluation_results"]["pile_test"][f"{model}_pythia"]
        assert stored["loss"] == pytest.approx(expected)
    gap = quality.loss(study, "monotonic").value - quality.loss(study, "baseline").value
    assert quality.loss_difference(study, "monotonic", "baseline").value == pytest.approx(gap)
    assert quality.perplexity_ratio(study).value == pytest.approx(math.exp(gap))
    assert quality.ratio_by_seed(study, "monotonic", "baseline") == {42: pytest.approx(math.exp(gap))}


def test_rises_by_hand(study: Study, inputs: dict[str, Path], tiny: Experiment) -> None:
    flips = [json.loads(line) for line in inputs["hotflip_records"].read_text().splitlines()]
    behind = [json.loads(line) for line in inputs["uat_records"].read_text().splitlines()]
    for model in study.attacked:
        mine = [row for row in flips if row["model"] == model]
        rises = [row["nll"][-1] - row["nll"][0] for row in mine]
        assert robustness.rise(study, model).value == pytest.approx(np.mean(rises))
        assert robustness.random_rise(study, model).value == pytest.approx(np.mean([np.mean(r["random_nll"]) - r["nll"][0] for r in mine]))
        assert robustness.success(study, model).value == np.mean([rise > tiny.hotflip.threshold_nats for rise in rises])
        relative = [row["reference_attacked"] / row["reference_clean"] - 1 for row in mine]
        assert robustness.reference_success(study, model).value == np.mean([each > tiny.hotflip.reference_threshold for each in relative])
        losses = {kind: [row["nll"] for row in behind if (row["model"], row["trigger"]) == (model, kind)] for kind in ("clean", model)}
        assert triggers.trigger_rise(study, model, model).value == pytest.approx(np.mean(losses[model]) - np.mean(losses["clean"]))
        drawn = [row["nll"] for row in behind if row["model"] == model and row["trigger"].startswith("random_")]
        assert triggers.trigger_rise(study, model, "random").value == pytest.approx(np.mean(drawn) - np.mean(losses["clean"]))


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (-0.1, "the monotonic model is better than the baseline, perplexity -9.5 %; non-inferior at a margin of 0.0677 nats."),
        (0.03, "the monotonic model is worse than the baseline, perplexity +3.0 %; non-inferior at a margin of 0.0677 nats."),
        (0.5, "the monotonic model is worse than the baseline, perplexity +64.9 %; not shown to be non-inferior at a margin"),
        (0.0, "the monotonic model and the baseline are not distinguishable, perplexity +0.0 %; non-inferior at a margin"),
    ],
)
def test_quality_in_words(study: Study, gap: float, words: str) -> None:
    assert finding(with_losses(study, gap), "Quality: ").startswith(f"Quality: {words}")


@pytest.mark.parametrize(("gap", "more_robust"), [(-0.2, "monotonic"), (0.2, "baseline"), (0.0, "not distinguishable")])
def test_more_robust_follows_from_the_records(study: Study, gap: float, more_robust: str) -> None:
    """The reference printed a constant."""
    flips = with_rises(study, [0.30, 0.31, 0.35, 0.29, 0.33, 0.30], [each + gap for each in (0.30, 0.31, 0.35, 0.29, 0.33, 0.30)])
    assert finding(flips, "HotFlip: rise").endswith(f"more robust: {more_robust}.")
    assert key_findings(flips)["most_robust_hotflip"] == more_robust
    searches = with_three_searches(study, gap)
    assert f"more robust: {more_robust}; the unit is the search, 3 for each model." in finding(searches, "Trigger: ")
    assert key_findings(searches)["most_robust_uat"] == more_robust


def test_one_search_decides_nothing(study: Study) -> None:
    """However many texts agree: a second search may find a better trigger."""
    one = with_trigger_gap(study, -0.2)
    assert key_findings(one)["most_robust_uat"] == "not distinguishable (too few for an interval)"
    assert key_findings(one)["uat_rise_difference"]["value"] == pytest.approx(-0.2, abs=0.01)


HIGH, LOW = 0.5, 0.01


@pytest.mark.parametrize(
    ("baseline", "monotonic", "percent", "words"),
    [
        (
            4,
            3,
            25.0,
            "of the texts for the baseline, 50.0 % for the monotonic model; 25.0 % lower, relatively (exact McNemar, p by seed: 1).",
        ),
        (
            2,
            3,
            -50.0,
            "of the texts for the baseline, 50.0 % for the monotonic model; 50.0 % higher, relatively (exact McNemar, p by seed: 1).",
        ),
        (3, 3, 0.0, "50.0 % of the texts for the baseline, 50.0 % for the monotonic model; no change."),
        (0, 2, None, "33.3 % for the monotonic model; the baseline has none, so there is nothing to reduce."),
    ],
)
def test_success_in_words(study: Study, baseline: int, monotonic: int, percent: float | None, words: str) -> None:
    """Also where the baseline has no success: the reference divided by it."""
    made = with_rises(study, [HIGH] * baseline + [LOW] * (6 - baseline), [HIGH] * monotonic + [LOW] * (6 - monotonic))
    assert finding(made, "HotFlip success: ").endswith(words)
    found = key_findings(made)["hotflip_reduction_percent"]
    assert found is None if percent is None else found == pytest.approx(percent)


def test_mcnemar_pairs_by_text(study: Study) -> None:
    made = with_rises(study, [HIGH] * 5 + [LOW], [LOW] * 4 + [HIGH] * 2)
    assert robustness.mcnemar_by_seed(made) == {42: {"only_first": 4, "only_second": 1, "p": pytest.approx(12 / 32)}}
    shuffled = replace(made, flips=made.flips.sample(frac=1, random_state=1))
    assert robustness.mcnemar_by_seed(shuffled) == robustness.mcnemar_by_seed(made)


def test_one_document_gives_no_interval_and_says_so(study: Study, tmp_path: Path) -> None:
    one = with_one(study)
    assert non_inferior(one) is None
    quality = finding(one, "Quality: ")
    assert "are not distinguishable (too few for an interval), perplexity " in quality
    assert quality.endswith("non-inferiority at a margin of 0.0677 nats stays open.")
    assert finding(one, "HotFlip: ").endswith("more robust: not distinguishable (too few for an interval).")
    assert "[no interval from 1]" in summary_text(one)
    write_json(tmp_path / "final_results.json", final_results(one))
    write_tables(tables(one), tmp_path / "tables")
    assert all("None" not in path.read_text() and "nan" not in path.read_text().lower() for path in (tmp_path / "tables").iterdir())
    write_figures(figures(one), tmp_path / "figures")
    assert matplotlib.image.imread(tmp_path / "figures" / "perplexity.png").std() > 0.05


def test_one_seed_says_what_its_intervals_lack(study: Study) -> None:
    assert "One seed: the intervals do not contain the spread between trainings." in summary_text(study)
    assert not any(line.startswith("Spread") for line in findings(study))


def test_several_seeds(study: Study, tmp_path: Path) -> None:
    """Documents and seeds are resampled apart: the count stays that of the documents."""
    two = with_seeds(study)
    ratio = quality.perplexity_ratio(study).value
    assert quality.ratio_by_seed(two, "monotonic", "baseline") == {42: pytest.approx(ratio), 43: pytest.approx(ratio * math.exp(0.5))}
    assert quality.perplexity_ratio(two).value == pytest.approx(ratio * math.exp(0.25))
    assert quality.loss(two, "baseline").as_dict() == pytest.approx(quality.loss(study, "baseline").as_dict())  # seeds that agree
    assert robustness.rise(two, "baseline").count == robustness.rise(study, "baseline").count
    assert robustness.rise(two, "baseline").value == pytest.approx(robustness.rise(study, "baseline").value + 0.5)
    assert set(robustness.mcnemar_by_seed(two)) == {42, 43}
    text = summary_text(two)
    assert "One seed" not in text
    assert "seeds 42, 43" in text
    assert f"  by seed: 42: {ratio:.3f}, 43: {ratio * math.exp(0.5):.3f}" in text
    assert finding(two, "Spread") == f"Spread over 2 seeds of the perplexity ratio: {ratio:.3f} to {ratio * math.exp(0.5):.3f}."
    assert text.count("baseline   seed 4") == 2
    results = final_results(two)
    assert results["experiment_info"]["seeds"] == [42, 43]
    assert set(results["training_summary"]["monotonic"]) == {42, 43}
    write_tables(tables(two), tmp_path / "tables")
    assert pd.read_csv(tmp_path / "tables" / "perplexity.csv")["ratio_to_baseline"].iloc[-1] == pytest.approx(ratio * math.exp(0.25))


def test_certificate_in_words(study: Study) -> None:
    stored = study.json[42]["monotonic_certificate"]
    broken = {**stored, "ffn_monotone": False, "vacuous": False, "reasons": ["the activation GELU decreases"]}
    other = replace(study, json={42: {**study.json[42], "monotonic_certificate": broken}})
    assert finding(study, "Certificate") == "Certificate: the feed-forward sublayers are monotone in the weights that run."
    assert any("This order is vacuous" in line for line in findings(study))
    assert finding(other, "Certificate") == "Certificate: the feed-forward sublayers are NOT monotone in the weights that run."
    assert "  the activation GELU decreases" in findings(other)
    assert not any("vacuous" in line for line in findings(other))


@pytest.mark.parametrize("kind", ["derivative", "pairs_anywhere", "block"])
def test_a_certificate_that_falsifiers_refute_is_not_to_be_trusted(kind: str, study: Study) -> None:
    """What lies between the sublayers is promised by nobody."""
    stored = study.json[42]["monotonic_certificate"]
    tried = {**stored["falsifiers"], kind: {"tried": 256, "violated": 1, "deepest": 0.1}}
    refuted = replace(study, json={42: {**study.json[42], "monotonic_certificate": {**stored, "falsifiers": tried}}})
    said = [any("Falsifiers refute it" in line for line in findings(one)) for one in (study, refuted)]
    assert said == [False, kind != "block"]


def test_summary_has_the_reference_sections_in_order(real: Study, finished: Path) -> None:
    lines = summary_text(real).splitlines()
    titles = [line for line, under in pairwise(lines) if under and set(under) == {"-"}]
    assert titles == [*SECTIONS, "FLAGS"]
    stored = finished / "project" / "foundation_llm_final_results" / "tiny" / "experiment_summary.txt"
    assert stored.read_text() == summary_text(real)
    assert f"{quality.loss(real, 'baseline').count} test documents" in summary_text(real)


def test_final_results_have_the_reference_fields(study: Study) -> None:
    results = final_results(study)
    assert {"experiment_info", "training_summary", "evaluation_summary", "attack_summary", "key_findings"} <= set(results)
    assert {"seed", "model_name", "timestamp"} <= set(results["experiment_info"])
    assert set(results["training_summary"]) == {"baseline", "monotonic"}
    assert set(results["attack_summary"]) == {"uat", "hotflip"}
    assert {"perplexity_gap_percent", "hotflip_reduction_percent", "most_robust_hotflip"} <= set(results["key_findings"])
    gap = quality.loss(study, "monotonic").value - quality.loss(study, "baseline").value
    assert results["key_findings"]["perplexity_gap_percent"] == pytest.approx(100 * (math.exp(gap) - 1))


def test_results_are_strict_json_even_for_a_ruined_model(study: Study, tmp_path: Path) -> None:
    """A loss of 2,000 nats per token would be an infinite perplexity."""
    for number, made in enumerate((study, with_losses(study, 2000.0), with_rises(study, [0.0] * 6, [0.0] * 6))):
        path = tmp_path / f"{number}.json"
        write_json(path, final_results(made))
        stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        assert stored["key_findings"]["perplexity_ratio"]["value"] > 0


def test_number_in_words() -> None:
    assert Number(1.0344, 1.02, 1.049, 12, "ratio").text() == "1.034 [1.020, 1.049]"
    assert Number(1.0344, 1.02, 1.049, 12, "ratio").text(bare=True) == "1.034"
    assert Number(1.0, None, None, 1, "perplexity").text() == "1.00 [no interval from 1]"
    assert Number(0.125, 0.1, 0.2, 8, "share").text() == "12.5 % [10.0, 20.0]"
    assert [Number(value, None, None, 1, unit).text() for value, unit in ((0.00123, "p"), (1234.0, "count"))] == ["0.0012", "1,234"]


def test_csv_holds_full_precision_and_latex_is_booktabs(study: Study, tmp_path: Path) -> None:
    write_tables(tables(study), tmp_path / "tables")
    names = {path.stem for path in (tmp_path / "tables").iterdir()}
    assert names == {
        "perplexity",
        "perplexity_by_subset",
        "comparisons",
        "attacks",
        "hotflip",
        "uat",
        "transfer",
        "training",
        "budget",
        "table_7",
    }
    for name in names:
        latex = (tmp_path / "tables" / f"{name}.tex").read_text()
        assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        assert "_" not in latex.replace(r"\_", "")
    table = pd.read_csv(tmp_path / "tables" / "hotflip.csv").set_index("model")
    estimate = robustness.rise(study, "monotonic")
    assert table.loc["monotonic", ["rise_nats", "rise_nats_low", "rise_nats_high"]].tolist() == [
        estimate.value,
        estimate.low,
        estimate.high,
    ]
    transfer = pd.read_csv(tmp_path / "tables" / "transfer.csv").set_index("attacked")
    assert transfer.loc["monotonic", "trigger_of_baseline"] == triggers.trigger_rise(study, "monotonic", "baseline").value


def test_latex_escapes_names(study: Study, tmp_path: Path) -> None:
    odd = replace(study, documents=study.documents.assign(subset="50% of R&D_texts #1"))
    write_tables(tables(odd), tmp_path / "tables")
    assert r"50\% of R\&D\_texts \#1" in (tmp_path / "tables" / "perplexity_by_subset.tex").read_text()
    assert "50% of R&D_texts #1" in (tmp_path / "tables" / "perplexity_by_subset.csv").read_text()


def test_figures_open_and_show_something(finished: Path) -> None:
    folder = finished / "project" / "foundation_llm_final_results" / "tiny" / "figures"
    for name in ("training_curves", "robustness", "perplexity"):
        image = matplotlib.image.imread(folder / f"{name}.png")
        assert min(image.shape[:2]) > 400
        assert image[..., :3].std() > 0.05
        drawn = np.round(255 * image[..., :3]).astype(int)
        assert all((drawn == colour).all(axis=-1).sum() > 50 for colour in ((0, 114, 178), (213, 94, 0)))
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_files_are_the_same_bytes_each_time(real: Study, finished: Path, tmp_path: Path) -> None:
    """Made again in this process and by the stage: tables, PNG, PDF and SVG; and the page from these."""
    stored = finished / "project" / "foundation_llm_final_results" / "tiny"
    write_tables(tables(real), tmp_path / "tables")
    write_figures(figures(real), tmp_path / "figures")
    for kind in ("tables", "figures"):
        made = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
        assert made == {path.name: path.read_bytes() for path in (stored / kind).iterdir()}
    write_page(real, tables(real), tmp_path / "figures", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == (stored / "report.html").read_bytes()
