"""Part D of the attack benchmark: what stages 5 and 6 cost at the study's size, from measured pieces of them.

A group of texts through every attack by flips, and some positions of the trigger search; the rest is more of the same.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from configs.presets import load
from configs.schema import UAT, HotFlip
from tests.benchmarks.attack_bench import GOALS, Bench, seconds_of
from utils.attacks.flip_records import FlipAttacks
from utils.attacks.round_trip import RoundTrip
from utils.attacks.uat import SearchState, TriggerSearch
from utils.data.attack_texts import Alphabet
from utils.data.tokenizer import END_OF_TEXT

POSITIONS = 6  # of the trigger search that are timed, after one to warm up
MODELS = {"both arms": 2, "all five models": 5}


def part_d(bench: Bench, precision: str) -> None:
    """Hours of both stages for the two arms, and with the base and the controls of equal quality."""
    config = load(bench.shape.study, ["evaluate.benchmarks=[]"])  # so that the package for them is not needed
    flips, position = flip_seconds(bench, config.hotflip, precision), trigger_seconds(bench, config.uat)
    spec, uat = config.hotflip, config.uat
    groups, longer = math.ceil(spec.texts / spec.batch_size), math.ceil(spec.longer_texts / spec.batch_size)
    positions = (uat.restarts + 1) * uat.sweeps * uat.trigger_length
    each = {
        "hotflip": groups * flips["hotflip"],
        "query_greedy": groups * flips["query_greedy"],
        "longer": longer * flips["longer"],
        "transfer": groups * flips["transfer"],
        "trigger search": positions * position,
    }
    hours = {
        name: (models * (sum(each.values()) - each["transfer"]) + models * (models - 1) * each["transfer"]) / 3600
        for name, models in MODELS.items()
    }
    found = bench.found.setdefault("D", {})
    found |= {"seconds_per_group": flips, "seconds_per_position": position, "seconds_per_model": each, "hours": hours}
    found["reached"] = hours["both arms"] <= GOALS["D"]
    print(f"\n### D. Stages 5 and 6 at the size of {config.run_name}: seconds of one model\n\n| piece | measured | times | seconds |")
    print("|---|---|---|---|")
    for name, times in (("hotflip", groups), ("query_greedy", groups), ("longer", longer), ("transfer", groups)):
        print(f"| {name}, {spec.batch_size} texts | {flips[name]:.2f} | {times} | {each[name]:.0f} |")
    print(f"| a position of the trigger search | {position:.2f} | {positions} | {each['trigger search']:.0f} |")
    print(
        "\n" + ", ".join(f"{name}: {value:.2f} h" for name, value in hours.items()) + f" (goal for both arms: {GOALS['D']} h)", flush=True
    )


def flip_seconds(bench: Bench, spec: HotFlip, precision: str) -> dict[str, float]:
    """Of one group of texts, without loading the model; ten times the candidates on one flip alone, times the flips."""
    rows = bench.ids(spec.batch_size, spec.prefix_tokens + spec.scored_tokens).tolist()
    texts: list[dict[str, Any]] = [{"id": str(number), "subset": "random", "ids": ids} for number, ids in enumerate(rows)]
    whole = spec.model_copy(update={"longer_texts": 1})  # most groups hold no text whose gradient is looked at too
    few = spec.model_copy(update={"flips": 1, "longer_texts": spec.batch_size})
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        warm, on, one = (attacks(bench, texts, each, precision) for each in (few, whole, few))

        def search(model: FlipAttacks, attack: str) -> list[dict[str, Any]]:
            return model.search(attack, texts, Path(folder, f"{id(model)}.{attack}.json"), lambda: None)

        search(warm, "hotflip")
        found: list[list[dict[str, Any]]] = []
        taken["hotflip"] = seconds_of(lambda: found.append(search(on, "hotflip")))
        taken["query_greedy"] = seconds_of(lambda: search(on, "query_greedy"))
        taken["longer"] = spec.flips * seconds_of(lambda: search(one, "longer"))
        flips = {row["text"]: row["flips"] for row in found[0]}
        taken["transfer"] = seconds_of(lambda: on.transferred("another", flips, texts))
    return taken


def attacks(bench: Bench, texts: list[dict[str, Any]], spec: HotFlip, precision: str) -> FlipAttacks:
    alphabet = Alphabet.of(bench.tokenizer, bench.tokenizer.encode(END_OF_TEXT).ids[0])
    return FlipAttacks(bench.model, "random", texts, alphabet, RoundTrip(bench.tokenizer), spec, precision)


class Enough(Exception):
    """So many positions are timed."""


def trigger_seconds(bench: Bench, spec: UAT) -> float:
    """Of one position, mean of POSITIONS."""
    search, select = (bench.ids(count, spec.text_tokens) for count in (spec.search_texts, spec.select_texts))
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done >= limit:
            raise Enough

    def until_enough() -> None:
        try:
            TriggerSearch(bench.fast, spec, 0, bench.allowed).run(0, search, select, path, after_step)
        except Enough:
            return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "search.json")
        limit = 1
        until_enough()
        limit = 1 + POSITIONS
        taken = seconds_of(until_enough)
        state = SearchState.stored(path, 0)
    timed = state.steps - 1
    if timed != POSITIONS:
        raise RuntimeError(f"{timed} positions were searched, expected {POSITIONS}")
    return taken / POSITIONS
