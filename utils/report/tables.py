"""CSV and LaTeX (booktabs) tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from utils.report.statistics import Estimate, perplexity
from utils.report.study import ATTACKED, MODELS, Study
from utils.run.artifacts import published


def write_tables(study: Study, folder: Path) -> None:
    """Write every table as <name>.csv (numbers at full precision) and <name>.tex (rounded)."""
    tables = {
        "perplexity": perplexity_table(study),
        "perplexity_by_subset": subset_table(study),
        "hotflip": hotflip_table(study),
        "uat": trigger_table(study),
        "transfer": transfer_table(study),
        "table_7": paper_table(study),
    }
    with published(folder) as aside:
        aside.mkdir()
        for name, table in tables.items():
            table.to_csv(aside / f"{name}.csv", index=False)
            named = table.rename(columns=lambda column: column.replace("_", " "))
            latex = named.to_latex(index=False, float_format="%.3f", na_rep="--", escape=True)
            (aside / f"{name}.tex").write_text(latex, encoding="utf-8")


def bounds(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def perplexity_table(study: Study) -> pd.DataFrame:
    rows = []
    for model in MODELS:
        loss = study.nll(model)
        against = study.nll_difference(model, "baseline")
        rows.append(
            {"model": model, **bounds("nats_per_token", loss), "perplexity": perplexity(loss.value)}
            | bounds("ratio_to_baseline", against.map(perplexity))
        )
    return pd.DataFrame(rows)


def subset_table(study: Study) -> pd.DataFrame:
    subsets = sorted(study.documents["subset"].unique())
    rows = []
    for model in MODELS:
        for subset in subsets:
            loss = study.nll(model, subset)
            rows.append({"model": model, "subset": subset, **bounds("nats_per_token", loss), "perplexity": perplexity(loss.value)})
    return pd.DataFrame(rows)


def hotflip_table(study: Study) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": model,
            **bounds("rise_nats", study.flip_rise(model)),
            **bounds("random_rise_nats", study.flip_rise(model, "random_rise")),
            "success_rate": study.flip_success(model),
            "reference_criterion_success": study.reference_success(model),
        }
        for model in ATTACKED
    )


def trigger_table(study: Study) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": model,
            **bounds("rise_nats", study.trigger_rise(model, model)),
            **bounds("rise_over_neutral_nats", study.trigger_rise(model, model, "neutral")),
            "neutral_rise_nats": study.trigger_rise(model, "neutral").value,
            "random_rise_nats": study.trigger_rise(model, "random").value,
        }
        for model in ATTACKED
    )


def transfer_table(study: Study) -> pd.DataFrame:
    """Held-out rise in nats per token: row = attacked model, column = model on which the trigger was searched."""
    return pd.DataFrame(
        {"attacked": model} | {f"trigger_of_{source}": study.trigger_rise(model, source).value for source in ATTACKED} for model in ATTACKED
    )


def paper_table(study: Study) -> pd.DataFrame:
    """Perplexity, HotFlip and UAT of the two arms, in the shape of the paper's Table 7."""
    return pd.DataFrame(
        {
            "model": model,
            "perplexity": perplexity(study.nll(model).value),
            "hotflip_rise_nats": study.flip_rise(model).value,
            "hotflip_success_rate": study.flip_success(model),
            "hotflip_reference_criterion": study.reference_success(model),
            "uat_rise_nats": study.trigger_rise(model, model).value,
        }
        for model in ("baseline", "monotonic")
    )
