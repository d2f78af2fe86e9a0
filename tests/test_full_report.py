"""The report over three seeds with all controls and attacks: quantities by hand, words from edited records, what is absent, and the
source of every number."""

from __future__ import annotations

import csv
import fnmatch
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from configs.schema import Experiment
from tests.extended_records import HOSTILE, extended, plain
from utils.report import quality, robustness, triggers
from utils.report.attack_figures import figures
from utils.report.examples import examples, visible
from utils.report.figures import COLOURS, MARKERS, training_curves
from utils.report.findings import claim, findings, key_findings, tone
from utils.report.numbers import Source
from utils.report.page import tiles
from utils.report.provenance import budget_table
from utils.report.robustness import OWN, WORST
from utils.report.study import CONTROLS, Study
from utils.report.summary import final_results, summary_text
from utils.report.table import Table
from utils.report.tables import flip_transfer_table, tables
from utils.run.artifacts import read_json
from utils.run.records import read_rows
from utils.statistics.paired import holm, wilcoxon

pytestmark = pytest.mark.integration
SEEDS = (42, 43, 44)
EVERY = ("hotflip", "query_greedy", "transfer", "random")  # of the common budget
Inputs = dict[int, dict[str, Path]]


@pytest.fixture(scope="module")
def inputs(finished_records: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return extended(finished_records, tmp_path_factory.mktemp("records"), SEEDS)


@pytest.fixture
def study(tiny: Experiment, inputs: Inputs) -> Study:
    return Study.load(tiny, inputs)


@pytest.fixture
def rows(inputs: Inputs) -> list[dict[str, Any]]:
    return [row | {"seed": seed} for seed in SEEDS for row in read_rows(inputs[seed]["hotflip_records"])]


def worst_rise(rows: list[dict[str, Any]], seed: int, model: str, text: str, budget: int, left_out: str = "longer") -> float:
    """Without the attacks whose names begin with one of the words left out."""
    chosen = [row for row in rows if (row["seed"], row["model"], row["text"]) == (seed, model, text)]
    mine = [row for row in chosen if not row["attack"].startswith(tuple(left_out.split()))]
    searched = [row["nll"][min(budget, len(row["nll"]) - 1)] - row["nll"][0] for row in mine]
    return max(searched + [max(row["random_nll"]) - row["nll"][0] for row in mine if row["attack"] == "hotflip"])


def said(study: Study, start: str) -> str:
    (text,) = (finding.text for finding in findings(study) if finding.text.startswith(start))
    return text


def test_worst_case_by_hand(study: Study, rows: list[dict[str, Any]]) -> None:
    """The largest rise over the attacks of the common budget and random draws, text by text; averaged over texts and seeds."""
    texts, budget = sorted({row["text"] for row in rows}), study.config.hotflip.flips
    by_hand = {
        model: np.array([[worst_rise(rows, seed, model, text, budget) for text in texts] for seed in SEEDS])
        for model in ("baseline", "monotonic", *CONTROLS)
    }
    made = robustness.comparisons(study)
    for name, other in {WORST: "baseline", "noise": "noise", "earlier": "earlier"}.items():
        difference = by_hand["monotonic"] - by_hand[other]
        assert made[name].mean.value == pytest.approx(difference.mean())
        assert made[name].p.value == wilcoxon(difference.mean(axis=0))
        assert made[name].over == EVERY
    assert robustness.rise(study, "noise", WORST).value == pytest.approx(by_hand["noise"].mean())


def test_own_searches_by_hand(study: Study, rows: list[dict[str, Any]]) -> None:
    """The worst case without transfers; there is none where no transfer was tried."""
    texts, budget = sorted({row["text"] for row in rows}), study.config.hotflip.flips
    made = robustness.comparisons(study)
    for name, other in {WORST: "baseline", "noise": "noise", "earlier": "earlier"}.items():
        ours, theirs = (
            np.array([[worst_rise(rows, seed, model, text, budget, "longer transfer") for text in texts] for seed in SEEDS])
            for model in ("monotonic", other)
        )
        found = robustness.own(made, name)
        assert found is not None
        assert found.mean.value == pytest.approx((ours - theirs).mean())
        assert found.over == tuple(kind for kind in EVERY if kind != "transfer")
        assert found.mean.value == pytest.approx(robustness.rise(study, "monotonic", OWN).value - robustness.rise(study, other, OWN).value)
        assert key_findings(study)["own_searches_rise_difference"][name]["value"] == found.mean.value
    without = robustness.comparisons(replace(study, flips=study.flips[study.flips["attack"] != "transfer"]))
    assert WORST in without
    assert not [name for name in without if OWN in name]
    assert claim(without, WORST) == tone(without[WORST].mean)


@pytest.mark.parametrize(
    ("weak", "explained"),
    [
        (("noise", "earlier"), "The gain over the baseline is not shown to be more than what lower quality gives (noise, earlier)."),
        (("baseline",), "The gain over the baseline rests on flips found on other models, some of them its relatives."),
        ((), "The gain is larger than that of every quality-matched control."),
    ],
)
def test_a_gain_that_transfers_alone_make_is_none(weak: tuple[str, ...], explained: str, study: Study) -> None:
    """All models but the monotonic one rise by 0.2 more; those that are weak only under flips found on others."""
    flips = shifted(study, {}).flips
    more = (flips["model"] != "monotonic") & (~flips["model"].isin(weak) | (flips["attack"] == "transfer"))
    found = replace(study, flips=flips.assign(rise=0.3 + flips["text"].astype("category").cat.codes * 0.001 + 0.2 * more))
    assert said(found, "The gain") == explained
    made = robustness.comparisons(found)
    for name, other in {WORST: "baseline", "noise": "noise", "earlier": "earlier"}.items():
        assert made[name].mean.value == pytest.approx(-0.2)
        settled = "open" if other in weak else "good"
        assert claim(made, name) == settled
        assert {tile.tone for tile in tiles(found) if tile.title == f"Worst-case rise, monotonic − {other}"} == {settled}


def test_a_longer_attack_counts_at_the_common_budget(study: Study, rows: list[dict[str, Any]]) -> None:
    """Its records go on behind the budget, where every text rises by another 0.2 nats."""
    found = robustness.rise(study, "baseline", "longer").value
    beyond = np.mean([row["nll"][-1] - row["nll"][0] for row in rows if (row["model"], row["attack"]) == ("baseline", "longer")])
    assert beyond == pytest.approx(found + 0.2)


def test_the_longer_search_is_no_part_of_the_worst_case(study: Study) -> None:
    """It has more candidates, on some texts."""
    without = replace(study, flips=study.flips[study.flips["attack"] != "longer"])
    assert robustness.comparisons(without)[WORST] == robustness.comparisons(study)[WORST]
    assert robustness.comparisons(study)["longer"].mean.count == 3


def test_worst_cases_are_over_the_same_attacks(study: Study) -> None:
    """A control that was attacked by HotFlip alone is compared under HotFlip alone."""
    fewer = replace(study, flips=study.flips[(study.flips["model"] != "noise") | study.flips["attack"].isin(["hotflip", "random"])])
    made = robustness.comparisons(fewer)
    assert made["noise"].over == ("hotflip", "random")
    ours, theirs = (robustness.rise(study, model, WORST, ["hotflip", "random"]).value for model in ("monotonic", "noise"))
    assert made["noise"].mean.value == pytest.approx(ours - theirs)
    assert made[WORST].over == EVERY


def test_rows_without_attack_are_hotflips(tiny: Experiment, finished_records: dict[str, Path], tmp_path: Path) -> None:
    bare = Study.load(tiny, {42: plain(finished_records, tmp_path)})
    assert set(bare.flips["attack"]) == {"hotflip", "random"}
    assert "under the worst of hotflip, random for each text, rise differs" in said(bare, "Robustness: ")
    assert bare.absent == [
        "control noise (the baseline with weight noise, matched in quality): no attack records",
        "control earlier (an earlier checkpoint, matched in quality): no attack records",
        "attack query_greedy: no records",
        "attack transfer: no records",
        "attack longer: no records",
        "benchmarks: no records",
    ]
    assert all(f"  {line}" in summary_text(bare) for line in bare.absent)


def shifted(study: Study, shifts: dict[str, float]) -> Study:
    """Rises under every attack: 0.3 and a little that differs by text for each model, plus its shift."""
    flips = study.flips.copy()
    places = {text: place for place, text in enumerate(sorted(flips["text"].unique()))}
    wobble = flips["text"].map(places) * 0.001 * np.where(flips["model"] == "monotonic", 1.0, 0.5)
    flips["rise"] = 0.3 + wobble + flips["model"].map(shifts).fillna(0.0)
    return replace(study, flips=flips)


@pytest.mark.parametrize(
    ("shifts", "against", "explained"),
    [
        ({"monotonic": -0.1}, ("monotonic", "monotonic"), "The gain is larger than that of every quality-matched control."),
        (
            {"monotonic": -0.1, "earlier": -0.2},
            ("monotonic", "earlier"),
            "The gain over the baseline is not shown to be more than what lower quality gives (earlier).",
        ),
        (
            {"monotonic": -0.1, "noise": -0.2, "earlier": -0.2},
            ("noise", "earlier"),
            "The gain over the baseline is not shown to be more than what lower quality gives (noise, earlier).",
        ),
        ({"monotonic": 0.1}, ("noise", "earlier"), None),
    ],
)
def test_controls_decide_what_is_said_of_a_gain(
    shifts: dict[str, float], against: tuple[str, str], explained: str | None, study: Study
) -> None:
    made = shifted(study, shifts)
    for control, winner in zip(CONTROLS, against, strict=True):
        assert said(made, f"Against the quality-matched control {control}").endswith(f"more robust: {winner}.")
    texts = [finding.text for finding in findings(made) if finding.text.startswith("The gain")]
    assert texts == ([] if explained is None else [explained])
    winner = "monotonic" if shifts["monotonic"] < 0 else "baseline"
    assert said(made, "Robustness: ").endswith(f"more robust: {winner}.")
    assert final_results(made)["key_findings"]["most_robust_worst_case"] == winner


def test_one_control_missing_is_said(study: Study) -> None:
    made = shifted(study, {"monotonic": -0.1})
    made = replace(made, flips=made.flips[made.flips["model"] != "earlier"])
    assert said(made, "The gain").endswith("not settled, since earlier was not attacked.")


def test_a_control_that_one_seed_lacks_is_named_and_stops_nothing(study: Study) -> None:
    stored = dict(study.json[43])
    stored["uat_results"] = {
        **stored["uat_results"],
        "results": {k: v for k, v in stored["uat_results"]["results"].items() if "noise" not in k},
    }
    stored["hotflip_results"] = {**stored["hotflip_results"], "matched": {"noise": "not needed: as good"}}
    made = replace(study, json={**study.json, 43: stored})
    assert "seed 43 has no control noise: not needed: as good" in made.absent
    assert {row["model"] for row in budget_table(made).rows} == {row["model"] for row in budget_table(study).rows}
    alone = replace(made, documents=made.documents[made.documents["seed"] == 42])
    assert "One seed: the intervals do not contain the spread between trainings." in summary_text(alone)
    assert "One seed" not in summary_text(made)


def test_a_log_likelihood_is_not_called_a_perplexity() -> None:
    assert quality.in_words("perplexity,none") == "log-likelihood of an item, nats"
    assert quality.in_words("acc,none") == "acc,none"


def test_family_is_corrected_by_holm(study: Study) -> None:
    made = robustness.comparisons(study)
    expected = {name: made[name].p.value for name in ("worst_case", "noise", "earlier", "hotflip")}
    expected |= {f"success, seed {seed}": test["p"] for seed, test in robustness.mcnemar_by_seed(study).items()}
    assert robustness.adjusted(study, made) == holm(expected)
    report = study.config.report.model_copy(update={"family": ("noise",)})
    alone = replace(study, config=study.config.model_copy(update={"report": report}))
    assert robustness.adjusted(alone, made) == {"noise": made["noise"].p.value}


def test_restarts_are_searches(study: Study, inputs: Inputs) -> None:
    """One seed with three restarts: three searches by hand. Three seeds: the chosen trigger of each. Two restarts: no interval."""
    one = replace(study, triggers=study.triggers[study.triggers["seed"] == 42])
    stored = read_rows(inputs[42]["uat_records"])
    losses = {(row["model"], row["trigger"], row["text"]): row["nll"] for row in stored}
    texts = sorted({text for _, _, text in losses})

    def rise(model: str, trigger: str) -> float:
        return float(np.mean([losses[model, trigger, text] - losses[model, "clean", text] for text in texts]))

    differences = [rise("monotonic", f"restart_{n}:monotonic") - rise("baseline", f"restart_{n}:baseline") for n in range(3)]
    found = triggers.trigger_difference(one)
    assert found is not None and (found.count, found.value) == (3, pytest.approx(np.mean(differences)))
    assert found.low is not None and "unit: restart" in found.how
    chosen = triggers.trigger_difference(study)
    assert chosen is not None and chosen.count == 3 and "chosen trigger of a seed" in chosen.how
    two = triggers.trigger_difference(replace(one, triggers=one.triggers[~one.triggers["trigger"].str.startswith("restart_2")]))
    assert two is not None and (two.count, two.low) == (2, None)


def test_the_search_without_gradient_is_no_restart(study: Study) -> None:
    """Its records name the model too."""
    kept = study.triggers[~study.triggers["trigger"].str.startswith("query_greedy")]
    assert len(kept) < len(study.triggers)
    for seeds in (SEEDS, (42,)):
        one, other = (frame[frame["seed"].isin(seeds)] for frame in (study.triggers, kept))
        assert triggers.trigger_difference(replace(study, triggers=one)) == triggers.trigger_difference(replace(study, triggers=other))


def test_models_that_were_not_attacked_are_named(study: Study) -> None:
    """Neither arm has to be there."""
    bare = replace(
        study,
        flips=study.flips[study.flips["model"] != "baseline"],
        triggers=study.triggers[study.triggers["model"] != "monotonic"],
        documents=study.documents[study.documents["model"] != "monotonic"],
    )
    assert said(bare, "Robustness") == "Robustness: no attack was made on both the baseline and the monotonic model."
    assert said(bare, "Trigger") == "Trigger: baseline and monotonic were not both attacked."
    assert said(bare, "Quality") == "Quality: baseline and monotonic are not both in the records."
    results = final_results(bare)["key_findings"]
    assert results["most_robust_hotflip"] is None and results["perplexity_ratio"] is None
    assert {table.name for table in tables(bare)} >= {"perplexity", "attacks", "uat"}
    assert summary_text(bare)
    for figure in figures(bare).values():
        plt.close(figure)


def test_a_seed_may_lack_stages(tiny: Experiment, inputs: Inputs) -> None:
    """Seed 43 has no triggers, seed 44 has nothing; both are named, and the rest is reported."""
    some = {name: path for name, path in inputs[43].items() if not name.startswith("uat")}
    partial = Study.load(tiny, {42: inputs[42], 43: some, 44: {}})
    assert partial.seeds == [42, 43]
    assert partial.absent[0].startswith("seed 43 has no uat_records, uat_results: its stage is not complete")
    assert partial.absent[1].startswith("seed 44 has no setup, ")
    assert set(quality.ratio_by_seed(partial)) == {42, 43}
    assert triggers.trigger_rise(partial, "monotonic", "monotonic").how.endswith("texts")
    assert robustness.rise(partial, "monotonic").how.endswith("and 2 seeds")
    assert "seed 44 has no setup" in summary_text(partial)
    assert "PARTIAL REPORT: of 3 seeds 43, 44 are not complete (see Absent)." in summary_text(partial).splitlines()
    assert "PARTIAL" not in summary_text(Study.load(tiny, inputs))
    assert final_results(partial)["experiment_info"]["absent"] == partial.absent


def test_flags_are_named_on_top_and_listed_at_the_end(study: Study) -> None:
    lines = summary_text(study).splitlines()
    assert lines[2].startswith("1 flag(s), listed at the end")
    assert lines[-3:] == ["FLAGS", "-----", f"Flag (stage 6, seed 42, 43, 44): gradients are <b>tiny</b> on {HOSTILE}"]
    assert final_results(study)["key_findings"]["flags"] == lines[-1:]
    quiet = replace(
        study, json={seed: {**stored, "hotflip_results": {**stored["hotflip_results"], "flags": []}} for seed, stored in study.json.items()}
    )
    assert "flag" not in summary_text(quiet).lower()


def test_flags_of_the_evaluation_are_among_them(study: Study) -> None:
    stored = study.json[42]["evaluation_results"] | {"rounding": {"base": {"flag": None}, "monotonic": {"flag": "bf16 moves the loss"}}}
    made = replace(study, json={**study.json, 42: {**study.json[42], "evaluation_results": stored}})
    assert "Flag (stage 4, seed 42): monotonic: bf16 moves the loss" in summary_text(made).splitlines()


def test_an_interval_of_a_share_stays_between_none_and_all(study: Study) -> None:
    hits = pd.DataFrame(True, index=study.seeds, columns=[f"text-{number}" for number in range(6)])
    hits.iloc[0] = [False, False, False, True, True, True]
    found = robustness._rate(study, hits, "hits", Source("hotflip_records", {}, ("nll",)))
    assert found.value == pytest.approx(15 / 18) and found.high == 1.0 and found.low is not None and 0.0 < found.low < found.value


def test_flip_transfer_by_hand(study: Study, rows: list[dict[str, Any]]) -> None:
    table = {row["attacked"]: row for row in flip_transfer_table(study).rows}
    mine = [row["nll"] for row in rows if (row["model"], row["attack"]) == ("monotonic", "transfer:baseline")]
    assert table["monotonic"]["flips_of_baseline"].value == pytest.approx(np.mean([nll[1] - nll[0] for nll in mine]))  # type: ignore[union-attr]
    assert table["baseline"]["flips_of_baseline"].value == pytest.approx(robustness.rise(study, "baseline").value)  # type: ignore[union-attr]


def test_benchmarks_are_paired_by_item(study: Study, inputs: Inputs) -> None:
    stored = [row | {"seed": seed} for seed in SEEDS for row in read_rows(inputs[seed]["benchmark_records"])]
    values = {(row["seed"], row["model"], row["task"], row["item"]): row["value"] for row in stored}
    items = sorted({item for _, _, task, item in values if task == "lambada"})
    gaps = [values[seed, "monotonic", "lambada", item] - values[seed, "baseline", "lambada", item] for seed in SEEDS for item in items]
    found = quality.benchmark(study, "lambada", "accuracy", "monotonic", "baseline")
    assert found is not None and found.value == pytest.approx(np.mean(gaps)) and found.count == len(items)
    assert quality.benchmark(study, "lambada", "accuracy", "converted") is None
    assert quality.benchmark_tasks(study) == [("hella_swag", "accuracy"), ("lambada", "accuracy")]  # pairs have no mean over items


# --- the source of every number


def recomputed(entry: dict[str, Any], folder: Path) -> float | None:
    """The mean of a rise, loss or share from the rows that the entry names, in plain Python; None for what is no such mean."""
    (source,) = entry["sources"]
    chosen = [
        row
        for seed in SEEDS
        for row in map(json.loads, (folder / f"seed_{seed}" / f"{source['artefact']}.jsonl").read_text().splitlines())
        if all(any(fnmatch.fnmatch(str(row[key]), str(each)) for each in values) for key, values in source["where"].items())
    ]
    assert chosen, source
    if source["fields"] == ["nll", "tokens"] and len(source["where"]["model"]) == 1:
        loss = sum(row["nll"] for row in chosen) / sum(row["tokens"] for row in chosen)
        return math.exp(loss) if entry["unit"] == "perplexity" else loss
    if source["fields"] == ["nll"] and source["where"].get("attack") == ["hotflip"] and len(source["where"]["model"]) == 1:
        rises = [row["nll"][-1] - row["nll"][0] for row in chosen]
        return float(np.mean(rises) if entry["unit"] == "nats per token" else np.mean([rise > 0.2857 for rise in rises]))
    if source["fields"] == ["value"] and len(source["where"]["model"]) == 1:
        return float(np.mean([row["value"] for row in chosen]))
    return None


def test_every_number_in_a_table_is_traced_to_rows(full_report: Path, tiny: Experiment) -> None:
    """Each numeric cell of each CSV file is in numbers.json, and what is a plain mean can be formed again from the rows named there."""
    assert tiny.hotflip.threshold_nats == 0.2857
    numbers, seen, formed = read_json(full_report / "numbers.json"), set(), 0
    for path in sorted((full_report / "tables").glob("*.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            columns = {column for column in row if f"{path.stem}/{words(path.stem, row)}/{column}" in numbers}
            seen |= {f"{path.stem}/{words(path.stem, row)}/{column}" for column in columns}
            for column, text in row.items():
                stem = column.removesuffix("_low").removesuffix("_high")
                entry = numbers.get(f"{path.stem}/{words(path.stem, row)}/{stem}")
                if text and entry is None:
                    assert not re.fullmatch(r"-?[\d.]+(e-?\d+)?", text) or column == "seed", (path.stem, column, text)
                elif text:
                    key = "value" if stem == column else column.removeprefix(f"{stem}_")
                    assert float(text) == pytest.approx(entry[key]), (path.stem, column)
    assert seen == set(numbers)
    for name, entry in numbers.items():
        assert entry["how"] and entry["unit"] and entry["sources"] and all(source["fields"] for source in entry["sources"]), name
        if entry["sources"][0]["artefact"].endswith("_records") and not name.startswith("budget/"):
            again = recomputed(entry, full_report / "records")
            assert again is None or again == pytest.approx(entry["value"]), name
            formed += again is not None
    assert formed > 40


def words(table: str, row: dict[str, str]) -> str:
    """How a row is called in numbers.json: its words."""
    named = {"perplexity_by_subset": 2, "comparisons": 2, "attacks": 2, "training": 2, "budget": 2, "benchmarks": 2}.get(table, 1)
    return ".".join(list(row.values())[:named])


def test_sources_name_files_of_every_seed(study: Study) -> None:
    assert len(study.traces["hotflip_records"]) == 3
    assert all(not path.startswith("/") for paths in study.traces.values() for path in paths)


# --- LaTeX and figures


def latex_rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.endswith(r"\\"):
            yield re.split(r"(?<!\\)&", line.removesuffix(r"\\"))


def test_latex_is_whole(full_report: Path) -> None:
    """Same number of cells in every row and in the column format; nothing unescaped; the environment is closed."""
    for path in sorted((full_report / "tables").glob("*.tex")):
        text = path.read_text()
        (layout,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
        assert text.count(r"\end{tabular}") == 1
        assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
        cells = list(latex_rows(text))
        assert len(cells) >= 2 and {len(row) for row in cells} == {len(layout)}
        assert not re.search(r"(?<!\\)[%#_$]", text.replace(layout, "")), path.name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed: LaTeX is checked by its structure alone")
def test_latex_compiles(full_report: Path, tmp_path: Path) -> None:
    inputs = "".join(rf"\input{{{path}}}\par " for path in sorted((full_report / "tables").glob("*.tex")))
    (tmp_path / "all.tex").write_text(rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}")
    done = subprocess.run(["pdflatex", "-halt-on-error", "all.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_restarts_are_marked_and_axes_of_steps_and_flips_are_whole(study: Study) -> None:
    drawn = figures(study)
    try:
        (axis,) = training_curves(study).axes
        marked = [line for line in axis.lines if line.get_linestyle() == ":"]
        assert {float(line.get_xdata()[0]) for line in marked} == {4.0}  # type: ignore[index]
        for name in ("training_curves", "validation_curves", "robustness"):
            drawn[name].canvas.draw()
            assert all(float(tick) == int(tick) for tick in drawn[name].axes[0].get_xticks()), name
        for name, figure in drawn.items():
            texts = [text for axis in figure.axes for text in (*axis.get_xticklabels(), axis.xaxis.label, axis.yaxis.label)]
            sizes = [text.get_fontsize() for text in texts]
            assert min(sizes) >= 8, name
            assert figure.axes[0].get_title() and figure.get_figwidth() <= 5.4
        assert set(drawn) >= {"success", "quality_robustness", "transfer", "flip_transfer", "attacks", "perplexity"}
    finally:
        plt.close("all")


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_arms_colours_differ_for_colour_blind_readers(kind: str) -> None:
    """Baseline against monotonic, and each against the controls."""

    def seen(name: str) -> np.ndarray:
        linear = np.power(to_rgb(COLOURS[name]), 2.2)
        return np.power(np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1), 1 / 2.2)

    for one, other in (("baseline", "monotonic"), ("baseline", "noise"), ("monotonic", "noise"), ("monotonic", "base")):
        assert np.linalg.norm(seen(one) - seen(other)) > 0.1, (one, other)
    assert len(set(MARKERS.values())) == len(MARKERS) == len(COLOURS)


# --- examples


def test_examples_show_what_was_changed(study: Study, inputs: Inputs, rows: list[dict[str, Any]]) -> None:
    shown = examples(study)
    kinds = [(model, kind) for model in ("baseline", "monotonic") for kind in ("worst", "typical") for _ in range(3)]
    assert [(each.model, each.kind) for each in shown] == kinds
    for each in shown:
        mine = [
            row
            for row in rows
            if (row["seed"], row["model"], row["text"], row["attack"]) == (each.seed, each.model, each.text, each.attack)
        ]
        (row,) = mine
        changed = {place for place, token in enumerate(each.tokens) if token.old is not None}
        assert changed == {flip["position"] for flip in row["flips"]}
        assert each.attack != "longer"
        scored = [place for place, token in enumerate(each.tokens) if token.scored]
        assert scored == list(range(study.config.hotflip.prefix_tokens, len(each.tokens)))
        assert each.attacked - each.clean == pytest.approx(row["nll"][min(study.config.hotflip.flips, len(row["nll"]) - 1)] - row["nll"][0])
    worst = [each for each in shown if (each.model, each.kind) == ("baseline", "worst")]
    rises = [each.attacked - each.clean for each in worst]
    assert rises == sorted(rises, reverse=True)
    budget = study.config.hotflip.flips
    assert rises[0] == pytest.approx(max(worst_rise(rows, seed, "baseline", row["text"], budget) for seed in SEEDS for row in rows))
    assert any(HOSTILE in token.text for each in shown for token in each.tokens)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\u202eb", r"a\u202eb"), ("\x00", r"\u0000"), ("a\nb", "a\u23ce\nb"), ("größe <b>", "größe <b>"), ("\u2028", r"\u2028")],
)
def test_hidden_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_no_examples_without_a_tokenizer(tiny: Experiment, inputs: Inputs) -> None:
    bare = {seed: {name: path for name, path in paths.items() if name != "tokenizer"} for seed, paths in inputs.items()}
    assert examples(Study.load(tiny, bare)) == []


def test_a_table_without_an_interval_keeps_its_columns(study: Study) -> None:
    """CSV columns depend on the table, not on the data."""
    (perplexity,) = (table for table in tables(study) if table.name == "perplexity")
    single = replace(study, documents=study.documents[study.documents["document"] == 0])
    (other,) = (table for table in tables(single) if table.name == "perplexity")
    assert list(perplexity.frame().columns) == list(other.frame().columns)
    assert Table("empty", "", "", []).columns == []
