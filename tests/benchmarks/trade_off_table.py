"""The table of tests/benchmarks/trade_off.py, from its JSON files alone: python -m tests.benchmarks.trade_off_table FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.statistics.estimate import Estimate, perplexity
from utils.statistics.resampling import mean, weighted_mean

INTERVAL = {"confidence": 0.95, "draws": 10_000}
Result = dict[str, Any]


def table(results: list[Result]) -> str:
    """Markdown: a row an arm, intervals over seeds and documents or texts."""
    failed = [f"{found['arm']}, seed {found['seed']}: {found['error'].splitlines()[-1]}" for found in results if "error" in found]
    by_arm: dict[str, dict[int, Result]] = {}
    for found in results:
        if "error" not in found:
            by_arm.setdefault(found["arm"], {})[found["seed"]] = found
    rows = [_row(arm, seeds, by_arm) for arm, seeds in by_arm.items()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "".join(f"\n\nfailed: {line}" for line in failed)


def _row(arm: str, seeds: dict[int, Result], by_arm: dict[str, dict[int, Result]]) -> dict[str, str]:
    first = next(iter(seeds.values()))
    row = {"arm": arm, "seeds": str(len(seeds)), "test perplexity": f"{perplexity(_nll(seeds).value):.2f}"}
    controls = by_arm.get(first["control"], {})
    paired = {seed: (found, controls[seed]) for seed, found in seeds.items() if seed in controls}
    if paired and first["control"] != arm:
        row["ratio to its control"] = _written(_difference(paired).map(perplexity), 4)
        row["by seed"] = ", ".join(f"{perplexity(_difference({seed: pair}).value):.3f}" for seed, pair in paired.items())
    row["HotFlip rise"] = _written(_rise([_rises(found["flips"]) for found in seeds.values()]), 3)
    if all("longer" in found for found in seeds.values()):
        row["of ten times the candidates'"] = _share([(found["flips"], found["longer"]) for found in seeds.values()])
    row["trigger rise"] = ", ".join(f"{found['trigger']['attacked'] - found['trigger']['clean']:.2f}" for found in seeds.values())
    met = [[relative > 0.15 for _, _, relative in found["flips"].values()] for found in seeds.values()]
    row["reference's criterion"] = f"{100 * np.mean(met):.0f} %"
    if paired and first["control"] != arm:
        row["rise minus control"] = _against([(found["flips"], control["flips"]) for found, control in paired.values()])
        for kind in ("noise", "earlier"):
            both = [(found["flips"], found[kind]) for found in seeds.values() if kind in found]
            row[f"minus {kind}"] = _against(both) if both else _reason(first["matched"][kind])
        row["order kept (control)"] = " ".join(_mean(seeds, "order", "kept", who) for who in ("arm", "control"))
        row["certificate"] = _certificate(first["certificate"])
        row["converted ppl"] = f"{perplexity(first['nll_converted']):.3g}"
        row["skipped"] = ", ".join(str(found["history"]["skipped_steps"]) for found in seeds.values())
    return row


def _nll(seeds: dict[int, Result]) -> Estimate:
    frames = [pd.DataFrame(found["documents"], index=["nll", "tokens"]).T for found in seeds.values()]
    return weighted_mean([frame["nll"] for frame in frames], frames[0]["tokens"], **INTERVAL)


def _difference(paired: dict[int, tuple[Result, Result]]) -> Estimate:
    """Nats per token, arm minus control, by document."""
    frames = [[pd.DataFrame(side["documents"], index=["nll", "tokens"]).T for side in pair] for pair in paired.values()]
    return weighted_mean([mine["nll"] - other["nll"] for mine, other in frames], frames[0][0]["tokens"], **INTERVAL)


def _rises(flips: dict[str, list[float]]) -> pd.Series:
    return pd.Series({text: after - before for text, (before, after, _) in flips.items()})


def _rise(series: list[pd.Series]) -> Estimate:
    return mean(np.stack(series), **INTERVAL)


def _against(pairs: list[tuple[dict[str, list[float]], dict[str, list[float]]]]) -> str:
    return _written(_rise([_rises(mine) - _rises(other) for mine, other in pairs]), 3)


def _share(pairs: list[tuple[dict[str, list[float]], dict[str, list[float]]]]) -> str:
    """What the search found, as a share of what ten times its candidates find on the same texts, over all seeds."""
    found = sum(_rises(mine)[list(longer)].sum() for mine, longer in pairs)
    return f"{100 * found / sum(_rises(longer).sum() for _, longer in pairs):.1f} %"


def _written(estimate: Estimate, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _reason(facts: str) -> str:
    return facts.split(":")[0]


def _mean(seeds: dict[int, Result], *path: str) -> str:
    values = []
    for found in seeds.values():
        value: Any = found
        for key in path:
            value = value[key]
        values.append(value)
    share = float(np.mean(values))
    return f"({100 * share:.1f} %)" if path[-1] == "control" else f"{100 * share:.1f} %"


def _certificate(facts: dict[str, Any]) -> str:
    if not facts["constraint_holds"]:
        return "broken"
    held = "monotone" if facts["ffn_monotone"] else "not monotone"
    return f"{held}{', vacuous' if facts['vacuous'] else ''}, margin {facts['smallest_margin']:.1g}"


if __name__ == "__main__":
    print(table([json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))]))
