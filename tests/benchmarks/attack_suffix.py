"""Part A of the attack benchmark: a suffix on one text, its target's loss made small, against nanoGCG."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.attack_bench import GOALS, ROUNDS, Bench, median, now, peak, surviving
from tests.benchmarks.attack_rivals import NanoGCG
from utils.attacks.work import Prices

Curve = list[tuple[int, float]]  # FLOP so far, best loss so far by the referee


class SuffixSearch:
    """GCG's rule (Zou et al. 2023) on the engine: one gradient, `search_width` single replacements drawn evenly from the `topk` best
    tokens of every position, those that survive retokenising scored, the best taken even if worse. Unlike nanoGCG's, no two are equal."""

    def __init__(self, bench: Bench, prefix: list[int], start: list[int], target: list[int], filtered: bool = True) -> None:
        self.bench, self.scorer, self.filtered = bench, bench.fast, filtered
        self.ids = torch.tensor([[*prefix, *start, *target]], device=bench.device)
        self.edited, self.scored = slice(len(prefix), len(prefix) + len(start)), len(target)

    def step(self) -> int:
        """Candidates scored."""
        places, tokens = self.candidates()
        nll = self.scorer.edited_nll(self.ids, torch.zeros_like(places[:, 0]), places, tokens, self.scored)
        best = nll.argmin()
        self.ids = self.ids.scatter(1, places[best][None], tokens[best][None])
        return len(nll)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """places and tokens (K, 1), distinct."""
        shape, bench = self.bench.shape, self.bench
        slope = self.scorer.gradient(self.ids, self.scored, self.edited)[0]
        gains = (slope @ self.scorer.embeddings.T).masked_fill(~bench.allowed, torch.inf)
        pool = gains.topk(shape.topk, dim=1, largest=False).indices  # (L, topk)
        chosen = torch.randperm(pool.numel(), device=bench.device, generator=bench.random)[: shape.search_width]
        places, tokens = chosen[:, None] // shape.topk, pool.flatten()[chosen][:, None]
        if self.filtered:
            suffixes = self.ids[0, self.edited].repeat(len(places), 1).scatter_(1, places, tokens)
            stays = surviving(bench.tokenizer, suffixes)
            places, tokens = places[stays], tokens[stays]
        return places + self.edited.start, tokens


def suffix_task(bench: Bench) -> dict[str, list[int]]:
    """Ids of prefix, start and target whose texts encode to these ids again."""
    shape, tokenizer = bench.shape, bench.tokenizer
    text = tokenizer.encode((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")).ids

    def piece(begin: int, length: int) -> list[int]:
        pieces = (text[place : place + length] for place in range(begin, len(text) - length))
        return next(ids for ids in pieces if bool(surviving(tokenizer, torch.tensor([ids]))[0]))

    starts = ([token] * shape.suffix for token in range(300, 2000) if bench.allowed[token])
    start = next(ids for ids in starts if bool(surviving(tokenizer, torch.tensor([ids]))[0]))
    return {"prefix": piece(0, shape.prefix), "start": start, "target": piece(len(text) // 2, shape.target)}


def part_a(bench: Bench, nano: NanoGCG | None, task: dict[str, list[int]]) -> None:
    shape, found = bench.shape, bench.found.setdefault("A", {})
    sides = ("engine", "nanogcg") if nano else ("engine",)
    rates: dict[str, dict[str, list[float]]] = {side: {"filter": [], "no filter": []} for side in sides}
    curves: list[dict[str, Curve]] = []
    follow(bench, task, True, 3)  # to warm up
    batch = nano_batch(bench, nano) if nano else 0
    peak()
    for seed in range(ROUNDS):
        curves.append({})
        for kind, steps in (("filter", shape.steps), ("no filter", max(3, shape.steps // 4))):
            rate, curve = follow(bench, task, kind == "filter", steps)
            rates["engine"][kind].append(rate)
            if kind == "filter":
                curves[-1]["engine"] = curve
            if nano:
                run = nano("run", steps=steps, batch_size=batch, seed=seed, filter_ids=kind == "filter")
                scored = run["distinct"] or [shape.search_width] * steps
                rates["nanogcg"][kind].append(sum(scored[1:]) / sum(run["seconds"][1:]))
                if kind == "filter":
                    curves[-1]["nanogcg"] = nano_curve(bench, task, run)
                    found["nanogcg_peak_gib"] = run["peak_memory_gib"]
    found |= {"rates": rates, "batch_size": batch, "curves": curves, "engine_peak_gib": peak()}
    names = {"engine": "engine, bf16", "nanogcg": f"nanoGCG 0.3.0, {nano.format}, batch size {batch}" if nano else ""}
    print(f"\n### A. Suffix, {shape.prefix} + {shape.suffix} + {shape.target} tokens, width {shape.search_width}, topk {shape.topk}\n")
    print("| distinct valid candidates per second | with retokenising filter | without | peak GiB |\n|---|---|---|---|")
    for side, rate in rates.items():
        print(f"| {names[side]} | {median(rate['filter'], 0)} | {median(rate['no filter'], 0)} | {found[f'{side}_peak_gib']:.1f} |")
    if nano:
        compare(found)


def compare(found: dict[str, Any]) -> None:
    """Ratio of the rates, and losses where both have spent equal FLOP."""
    found["ratio"] = statistics.median(found["rates"]["engine"]["filter"]) / statistics.median(found["rates"]["nanogcg"]["filter"])
    losses = found["loss_at_equal_flop"] = [at_equal_flops(curve) for curve in found["curves"]]
    pairs = ", ".join(f"({ours:.4f}, {theirs:.4f})" for ours, theirs in losses)
    print(
        f"\nratio {found['ratio']:.2f}, goal {GOALS['A']}; start at {found['curves'][0]['engine'][0][1]:.4f} nats per token; best loss by"
    )
    print(f"the referee at equal FLOP, (engine, nanoGCG) of each seed: {pairs}", flush=True)
    found["reached"] = found["ratio"] >= GOALS["A"] and statistics.mean(ours - theirs for ours, theirs in losses) <= 0


def follow(bench: Bench, task: dict[str, list[int]], filtered: bool, steps: int) -> tuple[float, Curve]:
    """Candidates per second from the second step on, and the curve, for which it goes on to twice as many steps: ours cost fewer FLOP."""
    search = SuffixSearch(bench, task["prefix"], task["start"], task["target"], filtered)
    states, flops, scored, before = [search.ids], [0], 0, search.scorer.work.flops
    began = ended = 0.0
    for number in range(2 * steps):
        began = now() if number == 1 else began
        ended = now() if number == steps else ended
        count = search.step()
        scored += count if 1 <= number < steps else 0
        states.append(search.ids)
        flops.append(search.scorer.work.flops - before)
    losses = bench.referee.nll(torch.cat(states), search.scored).cummin(dim=0).values.tolist()
    return scored / (ended - began), list(zip(flops, losses, strict=True))


def nano_batch(bench: Bench, nano: NanoGCG) -> int:
    """The batch size that nanoGCG is fastest with."""
    sizes = [bench.shape.search_width // part for part in (1, 2, 4, 8)]
    seconds = {size: statistics.median(nano("run", steps=5, batch_size=size, seed=9)["seconds"][1:]) for size in sizes}
    print("nanoGCG, seconds per step by batch size:", {size: round(taken, 3) for size, taken in seconds.items()}, flush=True)
    bench.found["A"]["nanogcg_seconds_by_batch"] = seconds
    return min(seconds, key=seconds.__getitem__)


def nano_curve(bench: Bench, task: dict[str, list[int]], run: dict[str, Any]) -> Curve:
    """From the FLOP of rows of the suffix and behind it, all of which nanoGCG puts through the unembedding."""
    rows, prices = len(task["start"]) + len(task["target"]), Prices.of(bench.model)
    suffixes = [task["start"], *(bench.tokenizer.encode(string, add_special_tokens=False).ids for string in run["strings"])]
    ids = torch.tensor([[*task["prefix"], *suffix, *task["target"]] for suffix in suffixes], device=bench.device)
    losses = bench.referee.nll(ids, len(task["target"])).cummin(dim=0).values.tolist()
    gradient = prices.gradient(1, rows, rows).flops
    costs = np.cumsum([0, *(gradient + prices.scoring(n, n * rows, n * rows).flops for n in run["scored"])]).tolist()
    return list(zip(costs, losses, strict=True))


def at_equal_flops(curve: dict[str, Curve]) -> tuple[float, float]:
    """Best loss of both within the FLOP that both have spent."""
    common = min(curve["engine"][-1][0], curve["nanogcg"][-1][0])
    ours, theirs = (min(loss for flops, loss in curve[side] if flops <= common) for side in ("engine", "nanogcg"))
    return ours, theirs
