"""Every table of the report, from the study."""

from __future__ import annotations

from utils.report import quality, robustness, triggers
from utils.report.numbers import Number, P
from utils.report.provenance import budget_table, training_table
from utils.report.robustness import OWN, WORST
from utils.report.study import ARMS, Study
from utils.report.table import Cell, Table
from utils.statistics.estimate import Estimate


def tables(study: Study) -> list[Table]:
    """Every table of the report. What was not measured gives no table."""
    made = [
        perplexity_table(study),
        subset_table(study),
        comparison_table(study),
        attack_table(study),
        hotflip_table(study),
        trigger_table(study),
        transfer_table(study),
        flip_transfer_table(study),
        benchmark_table(study),
        training_table(study),
        budget_table(study),
        paper_table(study),
    ]
    return [table for table in made if table.rows]


def perplexity_table(study: Study) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": model,
            "nats_per_token": quality.loss(study, model),
            "perplexity": quality.perplexity_of(study, model),
            "ratio_to_baseline": quality.perplexity_ratio(study, model) if "baseline" in study.models else None,
        }
        for model in study.models
    ]
    return Table("perplexity", "Test perplexity", "Every token of every test document scored once; intervals over documents.", rows)


def subset_table(study: Study) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": model,
            "subset": subset,
            "nats_per_token": quality.loss(study, model, subset),
            "perplexity": quality.perplexity_of(study, model, subset),
        }
        for model in study.models
        for subset in study.subsets
    ]
    return Table("perplexity_by_subset", "Test perplexity by subset", "", rows)


def comparison_table(study: Study) -> Table:
    """Monotonic minus another model under each attack, with the tests of the declared family."""
    made = robustness.comparisons(study)
    corrected = robustness.adjusted(study, made)
    rows: list[dict[str, Cell]] = []
    for name, each in made.items():
        holm = corrected.get(name)
        source = each.p.sources
        family = ", ".join(corrected)
        rows.append(
            {
                "comparison": f"monotonic - {each.other}",
                "attack": each.attack,
                "rise_difference_nats": each.mean,
                "hodges_lehmann_nats": each.shift,
                "wilcoxon_p": each.p,
                "holm_p": None if holm is None else Number.of(Estimate(holm, None, None, each.p.count), P, f"Holm over {family}", *source),
                "success_difference": robustness.success_difference(study, "monotonic", each.other, each.attack),
            }
        )
    note = (
        f"Below zero the monotonic model rises less. {WORST}: the largest rise of a text over the attacks made on both models; {OWN}: "
        "the same without flips found on other models."
    )
    return Table("comparisons", "Robustness, paired by text", note, rows)


def attack_table(study: Study) -> Table:
    """Rise and success of every attack on every model."""
    common = robustness.ensemble(study, *(arm for arm in ARMS if arm in study.attacked))
    rows: list[dict[str, Cell]] = []
    for model in study.attacked:
        mine = robustness.kinds(study, model)
        over = [kind for kind in common if kind in mine]
        for attack in [*mine, *([WORST] if over else [])]:
            rise = robustness.rise(study, model, attack, over)
            rows.append(
                {"model": model, "attack": attack, "rise_nats": rise, "success_rate": robustness.success(study, model, attack, over)}
            )
    limit = study.config.hotflip.threshold_nats
    note = (
        f"Nats per untouched token; success: rise above {limit:g} nats. {WORST} over {', '.join(common)}. random: the best draw of "
        "each text; longer: a check of HotFlip with more candidates, on some of the texts."
    )
    return Table("attacks", "Every attack on every model", note, rows)


def hotflip_table(study: Study) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": model,
            "rise_nats": robustness.rise(study, model),
            "random_rise_nats": robustness.random_rise(study, model),
            "success_rate": robustness.success(study, model),
            "reference_criterion_success": robustness.reference_success(study, model),
        }
        for model in study.attacked
        if "hotflip" in robustness.kinds(study, model)
    ]
    note = "The reference's criterion (own loss up, flipped tokens scored) favours a model that is worse to begin with."
    return Table("hotflip", "HotFlip beside random flips", note, rows)


def trigger_table(study: Study) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": model,
            "rise_nats": triggers.trigger_rise(study, model, model),
            "rise_over_neutral_nats": triggers.trigger_rise(study, model, model, "neutral"),
            "neutral_rise_nats": triggers.trigger_rise(study, model, "neutral"),
            "random_rise_nats": triggers.trigger_rise(study, model, "random"),
        }
        for model in triggers.searched(study)
    ]
    note = "Rise of held-out texts; intervals over texts, for the one trigger found. Between models the search is the unit (findings)."
    return Table("uat", "Universal triggers", note, rows)


def transfer_table(study: Study) -> Table:
    """Held-out rise in nats per token: row = attacked model, column = model on which the trigger was searched."""
    sources = triggers.searched(study)
    rows: list[dict[str, Cell]] = [
        {"attacked": model} | {f"trigger_of_{source}": triggers.trigger_rise(study, model, source) for source in sources}
        for model in study.triggered
    ]
    return Table("transfer", "Triggers on other models", "Rise on the row's model of the trigger searched on the column's.", rows)


def flip_transfer_table(study: Study) -> Table:
    """Rise on the row's model of flips found on the column's; the diagonal is HotFlip's own."""
    rows: list[dict[str, Cell]] = []
    if "transfer" in set(study.flips["attack"]):
        columns = [model for model in study.attacked if model in set(study.flips["found_on"])]
        rows = [
            {"attacked": model} | {f"flips_of_{source}": robustness.transferred_rise(study, model, source) for source in columns}
            for model in study.attacked
        ]
    return Table("flip_transfer", "Flips on other models", "Rise on the row's model of the flips found on the column's.", rows)


def benchmark_table(study: Study) -> Table:
    models = [model for model in study.models if len(study.benchmarks) and model in set(study.benchmarks["model"])]
    rows: list[dict[str, Cell]] = [
        {"task": task, "metric": quality.in_words(metric)}
        | {model: quality.benchmark(study, task, metric, model) for model in models}
        | {"monotonic_minus_baseline": quality.benchmark(study, task, metric, "monotonic", "baseline")}
        for task, metric in quality.benchmark_tasks(study)
    ]
    return Table("benchmarks", "Benchmarks", "Means over items; the difference is paired by item.", rows)


def paper_table(study: Study) -> Table:
    """Perplexity, HotFlip and UAT of the two arms, in the shape of the paper's Table 7."""
    rows: list[dict[str, Cell]] = []
    for model in ARMS:
        flipped = "hotflip" in robustness.kinds(study, model)
        rows.append(
            {
                "model": model,
                "perplexity": quality.perplexity_of(study, model) if model in study.models else None,
                "hotflip_rise_nats": robustness.rise(study, model) if flipped else None,
                "hotflip_success_rate": robustness.success(study, model) if flipped else None,
                "hotflip_reference_criterion": robustness.reference_success(study, model) if flipped else None,
                "uat_rise_nats": triggers.trigger_rise(study, model, model) if model in triggers.searched(study) else None,
            }
        )
    return Table("table_7", "Table 7 of the paper", "Both arms; rises in nats per untouched token.", rows)
