"""Records as the attack and evaluation stages write them at their fullest, made from those of a finished run: more seeds, controls,
attacks, restarts, benchmarks, flags, and hostile names."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.run.artifacts import read_json, write_json
from utils.run.records import read_rows, write_rows

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
OUTSIDE = ("http://example.invalid/x.png", "//example.invalid/y.js")
LONGER = ("attack-0", "attack-1", "attack-2")  # texts of the longer search
MODELS = ("base", "baseline", "monotonic")
KINDS = ("clean", "neutral", "random_", *MODELS)
KEPT = ("seed", "attack_config", "results", "statistical_tests", "loss_unit")
COPIES = {"noise": "baseline", "earlier": "base"}  # whose rows stand for a control's
FILES = {"hotflip_records": "jsonl", "uat_records": "jsonl", "evaluation_records": "jsonl"}


def plain(inputs: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The least that the stages ever wrote: HotFlip on three models in rows without the column `attack`, one search of triggers, no
    flags, controls or benchmarks."""
    flips = [row for row in read_rows(inputs["hotflip_records"]) if row.get("attack", "hotflip") == "hotflip" and row["model"] in MODELS]
    behind = [row for row in read_rows(inputs["uat_records"]) if row["model"] in MODELS and row["trigger"].startswith(KINDS)]
    rows = {
        "hotflip_records": [{key: value for key, value in row.items() if key != "attack"} for row in flips],
        "uat_records": [row for row in behind if ":" not in row["trigger"]],
    }
    for name, kept in rows.items():
        write_rows(folder / f"{name}.jsonl", kept)
    for name in ("hotflip_results", "uat_results"):
        write_json(folder / f"{name}.json", {key: value for key, value in read_json(inputs[name]).items() if key in KEPT})
    named = {name: folder / f"{name}.jsonl" for name in rows} | {
        name: folder / f"{name}.json" for name in ("hotflip_results", "uat_results")
    }
    return {name: path for name, path in inputs.items() if name != "benchmark_records"} | named


def extended(inputs: dict[str, Path], folder: Path, seeds: Sequence[int] = (42, 43, 44)) -> dict[int, dict[str, Path]]:
    """Inputs of stage 7 for every seed, written below `folder`."""
    inputs = plain(inputs, folder / "plain")
    return {seed: _of_seed(inputs, folder / f"seed_{seed}", seed) for seed in seeds}


def _of_seed(inputs: dict[str, Path], folder: Path, seed: int) -> dict[str, Path]:
    chance = random.Random(seed)
    paths = {name: folder / f"{name}.{kind}" for name, kind in FILES.items()}
    write_rows(paths["hotflip_records"], _flips(read_rows(inputs["hotflip_records"]), chance))
    write_rows(paths["uat_records"], _triggers(read_rows(inputs["uat_records"]), chance))
    write_rows(paths["evaluation_records"], _moved(read_rows(inputs["evaluation_records"]), chance))
    paths["benchmark_records"] = folder / "benchmark_records.jsonl"
    write_rows(paths["benchmark_records"], _benchmarks(chance))
    for name, change in {
        "hotflip_results": {
            "flags": [f"gradients are <b>tiny</b> on {HOSTILE}"],
            "controls": {"noise": {"sigma": 0.01}},
            "budget": {"x": 1},
        },
        "uat_results": {"flags": [], "controls": {}},
        "evaluation_results": {"generation": {"monotonic": [HOSTILE, *OUTSIDE]}, "rounding": {"base": {"flag": None}}},
        "baseline_history": {"resumed_at_steps": [4]},
    }.items():
        paths[name] = folder / f"{name}.json"
        write_json(paths[name], read_json(inputs[name]) | change)
    return inputs | paths | _hostile_texts(inputs, folder)


def _flips(rows: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """HotFlip on all models and controls; query-greedy finds less, a longer search (of some texts) more, transfers little."""
    made = []
    for row in [*rows, *(row | {"model": name} for name, of in COPIES.items() for row in rows if row["model"] == of)]:
        shift = {"monotonic": 0.7, "noise": 0.95, "earlier": 0.9}.get(row["model"], 1.0) * (1 + 0.05 * chance.gauss(0, 1))
        curve = [row["nll"][0] + shift * (each - row["nll"][0]) for each in row["nll"]]
        shares = {"hotflip": 1.0, "query_greedy": 0.8} | ({"longer": 1.5} if row["text"] in LONGER else {})
        for attack, share in shares.items():
            scaled = [curve[0] + share * (each - curve[0]) for each in curve]
            longer = [*scaled, scaled[-1] + 0.2] if attack == "longer" else scaled
            made.append(row | {"attack": attack, "nll": longer, "forwards": 10, "backwards": 4})
        for source in sorted({*MODELS} - {row["model"]}):
            made.append(
                {key: row[key] for key in ("model", "text", "subset")}
                | {"attack": f"transfer:{source}", "nll": [curve[0], curve[0] + 0.3 * (curve[-1] - curve[0])]}
            )
    return made


def _triggers(rows: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    made = [row | {"nll": row["nll"] + 0.01 * chance.gauss(0, 1)} for row in rows]
    for model in MODELS:
        own = [row for row in rows if row["model"] == row["trigger"] == model]
        for restart in range(3):
            moved = 0.02 * chance.gauss(0, 1)
            made += [row | {"trigger": f"restart_{restart}:{model}", "nll": row["nll"] + moved} for row in own]
        made += [row | {"trigger": f"query_greedy:{model}", "nll": row["nll"] + 5.0} for row in own]
    return made


def _moved(rows: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """Another training: every model but the base a little off."""
    shifts = {"converted": 0.0, "baseline": 0.01 * chance.gauss(0, 1), "monotonic": 0.01 * chance.gauss(0, 1)}
    return [row | {"nll": row["nll"] + shifts.get(row["model"], 0.0) * row["tokens"]} for row in rows]


def _benchmarks(chance: random.Random) -> list[dict[str, Any]]:
    levels = {"base": 0.5, "baseline": 0.55, "monotonic": 0.5}
    tasks = ("lambada", "hella_swag")
    return [
        {"model": model, "task": task, "item": f"{task}-{item}", "metric": "accuracy", "value": float(chance.random() < level)}
        for model, level in levels.items()
        for task in tasks
        for item in range(40)
    ] + [{"model": model, "task": "wikitext", "item": 0, "metric": "word_perplexity", "value": [-10.0, 3.0]} for model in levels]


def _hostile_texts(inputs: dict[str, Path], folder: Path) -> dict[str, Path]:
    """A tokenizer in which two ids are markup and a trick of direction, and attacked texts that contain them."""
    stored = json.loads((inputs["tokenizer"] / "tokenizer.json").read_text())
    words = {HOSTILE: 60_000, "\u202e<b>": 60_001}
    stored["model"]["vocab"] |= {"".join(_bytes_as_text(word)): number for word, number in words.items()}
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(stored))
    texts = read_json(inputs["attack_texts"])
    for text in texts["sets"]["hotflip"]:
        text["ids"][:2] = words.values()
    write_json(folder / "attack_texts.json", texts)
    return {"tokenizer": folder / "tokenizer", "attack_texts": folder / "attack_texts.json"}


def _bytes_as_text(word: str) -> Iterator[str]:
    """How a byte-level tokenizer writes a token: printable bytes as themselves, the others from U+0100 on (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    yield from (chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in word.encode())
