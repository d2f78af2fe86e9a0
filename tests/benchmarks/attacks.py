"""The attack engine against what is published, in one run on one device.

`python -m tests.benchmarks.attacks --shape pythia-1.4b --wheels FOLDER --out FILE` on a GPU; `--shape tiny` shows on a CPU that it works.
Random weights unless --model names a folder of a GPT-NeoX model. Before any time is printed, engine and referee must agree on the very
candidates that are timed. A: suffix search on one text against nanoGCG 0.3 (FOLDER has its wheels; left out without). B: universal
prefix trigger against the one-candidate-at-a-time loop. C: ten exact flips against one-shot flips. Exit code 1 if an exactness gate or
a part fails, or on a GPU a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from configs.schema import HotFlip
from tests.benchmarks.attack_rivals import NanoGCG, one_at_a_time, one_shot
from utils.attacks.hotflip import attack_batch
from utils.attacks.race import best_edit
from utils.attacks.referee import Referee
from utils.attacks.scoring import Scorer, first_order_candidates, in_format
from utils.attacks.uat import with_trigger
from utils.attacks.work import Prices
from utils.data.tokenizer import END_OF_TEXT, train_tokenizer
from utils.models.loading import load_model

EXACT = {"fp32": 1e-4, "bf16": 0.03}  # nats per token that engine and referee may differ by, in the mean over the scored tokens
GOALS = {"A": 1.5, "B": 20.0, "B share": 0.5, "C": 3.0}
ROUNDS = 3
SPREAD = 0.02  # of random weights


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    vocabulary: int
    prefix: int
    suffix: int
    target: int
    search_width: int
    topk: int
    steps: int
    trigger: int
    texts: int
    text: int
    candidates: int
    attacked: int
    flips: int
    flip_candidates: int
    long: int  # tokens of a text in the one-shot attack's own settings
    matmul: int


SHAPES = {
    "pythia-1.4b": Shape(24, 2048, 16, 50304, 256, 20, 64, 512, 256, 25, 10, 32, 128, 100, 8, 10, 64, 2048, 8192),
    "tiny": Shape(2, 64, 2, 1024, 48, 6, 12, 32, 32, 3, 3, 6, 24, 10, 2, 2, 6, 96, 256),
}


class Bench:
    """One model on one device, its tokenizer, and what was found so far."""

    def __init__(self, shape: str, folder: Path | None) -> None:
        self.shape = SHAPES[shape]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = filled_tokenizer(self.shape.vocabulary)
        self.model = (load_model(folder, self.device) if folder else self._random()).requires_grad_(False)
        self.fast, self.exact, self.referee = Scorer(self.model, "bf16"), Scorer(self.model, "fp32"), Referee(self.model)
        self.allowed = torch.tensor(printable(self.tokenizer, self.model.config.vocab_size), device=self.device)
        self.random = torch.Generator(self.device).manual_seed(0)
        self.found: dict[str, Any] = {}

    def _random(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=self.shape.vocabulary,
            hidden_size=self.shape.width,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            intermediate_size=4 * self.shape.width,
            max_position_embeddings=2048,
            initializer_range=SPREAD,
        )
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def ids(self, count: int, length: int) -> Tensor:
        """(count, length) random printable ids."""
        pool = self.allowed.nonzero().flatten()
        return pool[torch.randint(len(pool), (count, length), device=self.device, generator=self.random)]

    def timed(self, act: Callable[[], Any]) -> float:
        sync()
        began = time.perf_counter()
        act()
        sync()
        return time.perf_counter() - began


def filled_tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocabulary` entries: a few thousand learnt from this repository's text, the rest random joins of those."""
    root = Path(__file__).parents[2]
    texts = (path.read_text(encoding="utf-8") for folder in ("docs", "utils") for path in sorted((root / folder).rglob("*.[mp][dy]")))
    state = json.loads(train_tokenizer(texts, min(4096, vocabulary // 2)).to_str())
    entries, merges = state["model"]["vocab"], state["model"]["merges"]
    begins = [word for word in entries if word[0] == "Ġ" and word[1:].isalpha() and word.isprintable()]
    ends = [word for word in entries if word.isascii() and word.isalpha()]
    random = np.random.default_rng(0)
    while len(entries) < vocabulary:
        pair = [str(random.choice(begins)), str(random.choice(ends))]
        if "".join(pair) not in entries:
            entries["".join(pair)] = len(entries)
            merges.append(pair)
    return Tokenizer.from_str(json.dumps(state))


def printable(tokenizer: Tokenizer, rows: int) -> list[bool]:
    """Which rows of the model a search may write: nanoGCG's rule, printable ASCII and nothing special."""
    words = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())]
    fine = [word.isascii() and word.isprintable() and word != END_OF_TEXT for word in words]
    return (fine + [False] * rows)[:rows]


def surviving(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """(N,) whether each of ids (N, L), decoded and encoded again, is the same: nanoGCG's filter, all rows in one call."""
    rows = ids.tolist()
    again = tokenizer.encode_batch_fast(tokenizer.decode_batch(rows, skip_special_tokens=False), add_special_tokens=False)
    return torch.tensor([one.ids == row for one, row in zip(again, rows, strict=True)], device=ids.device)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of large bf16 products of random matrices, median of five rounds of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for number in range(6):
        sync()
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        sync()
        if number:
            rates.append(10 * 2 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def median(values: list[float], digits: int = 1) -> str:
    """Median with range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# A: a suffix on one text, its target's loss made small


class SuffixSearch:
    """GCG's rule (Zou et al. 2023) on the engine: one gradient, `search_width` single replacements drawn evenly from the `topk` best
    tokens of every position, those that survive retokenising scored, the best taken even if worse. Unlike nanoGCG's, no two are equal."""

    def __init__(self, bench: Bench, prefix: list[int], start: list[int], target: list[int], filtered: bool = True) -> None:
        self.bench, self.scorer, self.filtered = bench, bench.fast, filtered
        self.ids = torch.tensor([[*prefix, *start, *target]], device=bench.device)
        self.edited, self.scored = slice(len(prefix), len(prefix) + len(start)), len(target)

    def step(self) -> tuple[Tensor, int]:
        """(loss of the new suffix, candidates scored)"""
        places, tokens = self.candidates()
        nll = self.scorer.edited_nll(self.ids, torch.zeros_like(places[:, 0]), places, tokens, self.scored)
        best = nll.argmin()
        self.ids = self.ids.scatter(1, places[best][None], tokens[best][None])
        return nll[best], len(nll)

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
    search = SuffixSearch(bench, task["prefix"], task["start"], task["target"])
    ours: dict[str, list[float]] = {"filter": [], "no filter": []}
    theirs: dict[str, list[float]] = {"filter": [], "no filter": []}
    for _ in range(3):
        search.step()
    batch = nano_batch(bench, nano) if nano else 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    curves = []
    for seed in range(ROUNDS):
        for kind, steps in (("filter", shape.steps), ("no filter", 5)):
            search = SuffixSearch(bench, task["prefix"], task["start"], task["target"], filtered=kind == "filter")
            rate, curve = follow(search, steps)
            ours[kind].append(rate)
            if kind == "filter":
                curves.append({"ours": curve})
            if nano:
                run = nano("run", steps=steps, batch_size=batch, seed=seed, filter_ids=kind == "filter")
                distinct = run["distinct"] or [shape.search_width] * steps
                theirs[kind].append(sum(distinct[1:]) / sum(run["seconds"][1:]))
                if kind == "filter":
                    curves[-1]["nanogcg"] = nano_curve(bench, task, run)
                    found["nanogcg_peak_gib"] = run["peak_memory_gib"]
    found |= {"ours": ours, "nanogcg": theirs, "batch_size": batch, "curves": curves}
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "-"
    print(f"\n### A. Suffix, {shape.prefix} + {shape.suffix} + {shape.target} tokens, width {shape.search_width}, topk {shape.topk}\n")
    print("| distinct valid candidates per second | with retokenising filter | without | peak memory |\n|---|---|---|---|")
    print(f"| engine, bf16 | {median(ours['filter'], 0)} | {median(ours['no filter'], 0)} | {peak} |")
    if nano:
        their_peak = f"{found['nanogcg_peak_gib']:.1f} GiB" if torch.cuda.is_available() else "-"
        print(
            f"| nanoGCG 0.3.0, bf16, batch size {batch} | {median(theirs['filter'], 0)} | {median(theirs['no filter'], 0)} | {their_peak} |"
        )
        found["ratio"] = statistics.median(ours["filter"]) / statistics.median(theirs["filter"])
        lower = [at_equal_flops(curve) for curve in curves]
        found["loss_at_equal_flops"] = lower
        print(
            f"\nratio {found['ratio']:.2f}, goal {GOALS['A']}; best loss by the referee at nanoGCG's FLOP (ours, theirs): "
            + ", ".join(f"({mine:.4f}, {its:.4f})" for mine, its in lower),
            flush=True,
        )
        found["reached"] = found["ratio"] >= GOALS["A"] and statistics.mean(mine - its for mine, its in lower) <= 0


def follow(search: SuffixSearch, steps: int) -> tuple[float, list[tuple[int, float]]]:
    """Candidates per second without the first step, and (FLOP so far, best loss so far by the referee). For the curve it takes more
    steps than are timed: ours cost fewer FLOP."""
    states, before, scored = [search.ids], search.scorer.work.flops, 0
    flops = [0]
    search.step()
    states.append(search.ids)
    flops.append(search.scorer.work.flops - before)
    began, ended = 0.0, 0.0
    sync()
    began = time.perf_counter()
    for number in range(1, 2 * steps):
        if number == steps:
            sync()
            ended = time.perf_counter()
        _, count = search.step()
        scored += count if number < steps else 0
        states.append(search.ids)
        flops.append(search.scorer.work.flops - before)
    losses = search.bench.referee.nll(torch.cat(states), search.scored).cummin(dim=0).values.tolist()
    return scored / (ended - began), list(zip(flops, losses, strict=True))


def nano_batch(bench: Bench, nano: NanoGCG) -> int:
    """The batch size that nanoGCG is fastest with."""
    sizes = [bench.shape.search_width // part for part in (1, 2, 4, 8)]
    seconds = {size: statistics.median(nano("run", steps=5, batch_size=size, seed=9)["seconds"][1:]) for size in sizes}
    print("nanoGCG, seconds per step by batch size:", {size: round(taken, 3) for size, taken in seconds.items()}, flush=True)
    bench.found["A"]["nanogcg_seconds_by_batch"] = seconds
    return min(seconds, key=seconds.__getitem__)


def nano_curve(bench: Bench, task: dict[str, list[int]], run: dict[str, Any]) -> list[tuple[int, float]]:
    """As `follow`'s: rows of the suffix and behind it, all of which nanoGCG puts through the unembedding."""
    rows, prices = len(task["start"]) + len(task["target"]), Prices.of(bench.model)
    suffixes = [task["start"], *(bench.tokenizer.encode(string, add_special_tokens=False).ids for string in run["strings"])]
    ids = torch.tensor([[*task["prefix"], *suffix, *task["target"]] for suffix in suffixes], device=bench.device)
    losses = bench.referee.nll(ids, len(task["target"])).cummin(dim=0).values.tolist()
    gradient = prices.gradient(1, rows, rows).flops
    costs = np.cumsum([0, *(gradient + prices.scoring(n, n * rows, n * rows).flops for n in run["scored"])]).tolist()
    return list(zip(costs, losses, strict=True))


def at_equal_flops(curve: dict[str, list[tuple[int, float]]]) -> tuple[float, float]:
    """Best loss of both within the FLOP that both have spent."""
    common = min(curve["ours"][-1][0], curve["nanogcg"][-1][0])
    ours, theirs = (min(loss for flops, loss in curve[side] if flops <= common) for side in ("ours", "nanogcg"))
    return ours, theirs


# B: a trigger before many texts, their loss made large


def trigger_position(bench: Bench) -> tuple[Tensor, int, Tensor]:
    """ids (M, 1 + L + S) of the texts behind a trigger, a place in its middle, candidates (K,) for it."""
    shape = bench.shape
    ids = with_trigger(0, bench.ids(1, shape.trigger)[0].tolist(), bench.ids(shape.texts, shape.text))
    place = 1 + shape.trigger // 2
    slope = bench.fast.gradient(ids, shape.text, slice(place, place + 1)).sum(dim=0)
    return ids, place, first_order_candidates(bench.fast, slope, ids[0, place : place + 1], bench.allowed[None], shape.candidates)[:, 1]


def every_candidate(bench: Bench, scorer: Scorer, ids: Tensor, place: int, candidates: Tensor) -> Tensor:
    """(K,) mean loss of all texts."""
    which = torch.arange(len(ids), device=ids.device).repeat(len(candidates))
    tokens = candidates.repeat_interleave(len(ids))[:, None]
    nll = scorer.edited_nll(ids, which, torch.full_like(tokens, place), tokens, bench.shape.text)
    return nll.view(len(candidates), -1).mean(dim=1)


def part_b(bench: Bench) -> None:
    shape, found = bench.shape, bench.found.setdefault("B", {})
    ids, place, candidates = trigger_position(bench)
    fast, half = bench.fast, in_format(bench.model, torch.bfloat16)
    few = {"port, fp32": max(2, len(candidates) // 10), "port, bf16": max(2, len(candidates) // 4)}
    places = torch.full((len(candidates), 1), place, device=bench.device)
    acts: dict[str, tuple[int, Callable[[], Any]]] = {
        "engine, all texts": (len(candidates), lambda: every_candidate(bench, fast, ids, place, candidates)),
        "engine, race": (len(candidates), lambda: best_edit(fast, ids, places, candidates[:, None], shape.text)),
        "port, fp32": (few["port, fp32"], lambda: one_at_a_time(bench.model, ids, place, candidates[: few["port, fp32"]], shape.text)),
        "port, bf16": (few["port, bf16"], lambda: one_at_a_time(half, ids, place, candidates[: few["port, bf16"]], shape.text)),
    }
    flops, rates, peaks = {}, {name: [] for name in acts}, {}
    for number in range(ROUNDS + 1):  # the first is to warm up
        for name, (count, act) in acts.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            before = fast.work
            seconds = bench.timed(act)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            flops[name] = (fast.work - before).flops or count * fast.prices.scoring(1, ids.numel(), ids.numel()).flops
            if number:
                rates[name].append(count / seconds)
    matmul = matmul_rate(bench.device, shape.matmul)
    shares = {name: [flops[name] * rate / acts[name][0] / matmul for rate in each] for name, each in rates.items()}
    found |= {"rates": rates, "share_of_matmul": shares, "matmul_flops_per_second": matmul, "peak_gib": peaks}
    print(f"\n### B. Trigger of {shape.trigger}, {len(ids)} texts of {shape.text} tokens, {len(candidates)} candidates at a position\n")
    print(f"bf16 matrix product of {shape.matmul}: {matmul / 1e12:.1f} TFLOP/s\n")
    print("| | candidates decided per second | share of matrix-product rate | times port in fp32 | peak GiB |\n|---|---|---|---|---|")
    port = statistics.median(rates["port, fp32"])
    for name, each in rates.items():
        share = median([100 * one for one in shares[name]])
        print(f"| {name} | {median(each)} | {share} % | {statistics.median(each) / port:.1f} | {peaks[name]:.1f} |")
    race_quality(bench, found)
    best = max(statistics.median(rates[name]) for name in ("engine, all texts", "engine, race"))
    found["ratio"], found["share"] = best / port, statistics.median(shares["engine, all texts"])
    found["reached"] = found["ratio"] >= GOALS["B"] and found["share"] >= GOALS["B share"]


def race_quality(bench: Bench, found: dict[str, Any]) -> None:
    """How often the race's winner is that of scoring everything, and how much loss it misses otherwise."""
    same, missed, gained = [], [], []
    for _ in range(4):
        ids, place, candidates = trigger_position(bench)
        means = every_candidate(bench, bench.fast, ids, place, candidates)
        winner, _ = best_edit(bench.fast, ids, torch.full_like(candidates, place)[:, None], candidates[:, None], bench.shape.text)
        same.append(int(winner) == int(means.argmax()))
        missed.append(float(means.max() - means[winner]))
        gained.append(float(means.max() - means.mean()))
    found["race"] = {"same_winner": same, "missed_nats": missed, "best_over_mean_nats": gained}
    print(
        f"\nrace: {sum(same)} of {len(same)} winners as with all texts; misses {statistics.mean(missed):.5f} nats "
        f"of the {statistics.mean(gained):.5f} that the best candidate is above the mean one",
        flush=True,
    )


# C: ten flips in a text


def part_c(bench: Bench) -> None:
    shape, found = bench.shape, bench.found.setdefault("C", {})
    half = min(shape.text, 128)
    spec = HotFlip(
        texts=shape.attacked,
        prefix_tokens=half,
        scored_tokens=half,
        flips=shape.flips,
        candidates=shape.flip_candidates,
        batch_size=shape.attacked,
    )
    texts, long = bench.ids(shape.attacked, 1 + 2 * half), bench.ids(2, shape.long)
    acts: dict[str, tuple[int, Callable[[], Any]]] = {
        f"engine, {shape.flips} exact flips of {shape.flip_candidates} candidates, {2 * half} tokens, bf16": (
            len(texts),
            lambda: attack_batch(bench.fast, texts, spec, bench.allowed),
        ),
        f"one-shot, {2 * half} tokens, fp32": (len(texts), lambda: [one_shot(bench.model, text[None], shape.flips) for text in texts]),
        f"one-shot on its own settings, {shape.long} tokens, fp32": (
            len(long),
            lambda: [one_shot(bench.model, text[None], shape.flips) for text in long],
        ),
    }
    engine, short, own = acts
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    before = bench.fast.work
    attacks = attack_batch(bench.fast, texts, spec, bench.allowed)
    flops = (bench.fast.work - before).flops / len(texts)
    bench.model.requires_grad_(True)
    for number in range(ROUNDS + 1):
        for name, (count, act) in acts.items():
            taken = bench.timed(act)
            if number:
                seconds[name].append(taken / count)
    bench.model.requires_grad_(False)
    bench.model.zero_grad(set_to_none=True)
    rise = quality_of_flips(bench, texts, attacks, spec)
    matmul = matmul_rate(bench.device, shape.matmul)
    found |= {"seconds_per_text": seconds, "rise": rise, "flop_per_text": flops}
    found["share_of_matmul"] = flops / statistics.median(seconds[engine]) / matmul
    found["ratio"] = statistics.median(seconds[engine]) / statistics.median(seconds[own])
    found["reached"] = found["ratio"] <= GOALS["C"]
    print("\n### C. Flips\n\n| | seconds per text |\n|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {median(each, 3)} |")
    print(
        f"\nengine / one-shot: {statistics.median(seconds[engine]) / statistics.median(seconds[short]):.1f} on the same texts, "
        f"{found['ratio']:.2f} on its own settings (goal at most {GOALS['C']}); engine at {100 * found['share_of_matmul']:.1f} % of the "
        f"matrix-product rate; rise by the referee, nats per untouched token: engine {rise['engine']:.4f}, one-shot {rise['one_shot']:.4f}",
        flush=True,
    )


def quality_of_flips(bench: Bench, texts: Tensor, attacks: list[Any], spec: HotFlip) -> dict[str, float]:
    """Mean rise of the untouched second half: of the exact flips, and of one-shot flips confined to the first half."""
    clean = bench.referee.nll(texts, spec.scored_tokens)
    flipped = bench.referee.nll(torch.stack([attack.states[-1] for attack in attacks]), spec.scored_tokens)
    slopes = bench.fast.gradient(texts, spec.scored_tokens, slice(1, 1 + spec.prefix_tokens))
    at_once = texts.clone()
    for text, slope in zip(at_once, slopes, strict=True):
        places = slope.norm(dim=1).topk(spec.flips).indices
        text[1 + places] = (slope[places] @ bench.fast.embeddings.T).masked_fill(~bench.allowed, -torch.inf).argmax(dim=1)
    return {
        "engine": float((flipped - clean).mean()),
        "one_shot": float((bench.referee.nll(at_once, spec.scored_tokens) - clean).mean()),
    }


# The gate, and all of it


def gate(bench: Bench, nano: NanoGCG | None, task: dict[str, list[int]]) -> bool:
    """Engine and referee on the candidates of all three parts; nanoGCG's model against the referee."""
    shape = bench.shape
    search = SuffixSearch(bench, task["prefix"], task["start"], task["target"])
    places, tokens = search.candidates()
    ids, place, candidates = trigger_position(bench)
    half = min(shape.text, 128)
    text = bench.ids(2, 1 + 2 * half)
    flips = torch.randint(1, 1 + half, (96, 1), device=bench.device, generator=bench.random)
    sets = {
        "A": (search.ids, torch.zeros_like(places[:96, 0]), places[:96], tokens[:96], shape.target),
        "B": (
            ids,
            torch.arange(len(ids), device=ids.device).repeat(3),
            torch.full((3 * len(ids), 1), place, device=ids.device),
            candidates[:3].repeat_interleave(len(ids))[:, None],
            shape.text,
        ),
        "C": (text, torch.arange(96, device=ids.device) % 2, flips, bench.ids(96, 1), half),
    }
    fine = True
    for name, (texts, which, where, what, scored) in sets.items():
        exact = bench.referee.nll(texts[which].scatter(1, where, what), scored)
        for engine in (bench.exact, bench.fast):
            bench.fast.gradient(texts, scored, slice(0, None))  # its keys and values are what the search reuses
            nll = engine.edited_nll(texts, which, where, what, scored)
            off, rank = float((nll - exact).abs().max()), float(stats.spearmanr(nll.cpu(), exact.cpu()).statistic)
            agrees = off <= EXACT[engine.precision]
            fine &= agrees
            cached = engine.work.cached_rows > 0
            print(
                f"gate {name}: engine in {engine.precision} and referee differ by at most {off:.1e} nats per token over {len(nll)} candidates,"
                f" rank correlation {rank:.4f}, prefix used so far: {cached}: {'agrees' if agrees else 'FAILS'}",
                flush=True,
            )
            bench.found.setdefault("gate", {})[f"{name} {engine.precision}"] = {"largest_difference": off, "rank_correlation": rank}
    if nano:
        texts = search.ids.repeat(len(places), 1).scatter(1, places, tokens)[:64]
        off = float(
            (torch.tensor(nano("losses", ids=texts.tolist(), scored=shape.target)) - bench.referee.nll(texts, shape.target).cpu())
            .abs()
            .max()
        )
        agrees = off <= EXACT["bf16"]
        fine &= agrees
        print(f"gate A: nanoGCG's model in bf16 and referee differ by at most {off:.1e}: {'agrees' if agrees else 'FAILS'}", flush=True)
        bench.found["gate"]["nanogcg"] = {"largest_difference": off}
    return fine


@contextmanager
def rival(wheels: Path | None, bench: Bench, task: dict[str, list[int]]) -> Iterator[NanoGCG | None]:
    """nanoGCG's process, or None without wheels or if it does not start."""
    if wheels is None:
        print("nanoGCG is left out: --wheels names no folder", flush=True)
        yield None
        return
    texts = {name: bench.tokenizer.decode(ids, skip_special_tokens=False) for name, ids in task.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            nano = NanoGCG(wheels, Path(folder), bench.model, bench.tokenizer, texts)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            yield None
            return
        print(f"nanoGCG 0.3.0 with {nano.versions}", flush=True)
        try:
            yield nano
        finally:
            nano.close()


def part(bench: Bench, name: str, act: Callable[[], None], out: Path | None) -> None:
    """Run one part; what goes wrong in it is printed and recorded, and the next part runs all the same."""
    began = time.perf_counter()
    try:
        act()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        bench.found.setdefault(name, {})["error"] = repr(error)
    bench.found.setdefault(name, {})["part_seconds"] = time.perf_counter() - began
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if out:
        out.write_text(json.dumps(bench.found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", type=Path, help="folder of a GPT-NeoX model of that shape, in place of random weights")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels of nanoGCG 0.3.0 and of what it needs, for this Python")
    parser.add_argument("--only", choices=("A", "B", "C"), help="one part alone")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    began = time.perf_counter()
    bench = Bench(options.shape, options.model)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    bench.found["setting"] = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": options.shape,
        "model": options.model.name if options.model else "random weights",
    }
    print(json.dumps(bench.found["setting"]), flush=True)
    task = suffix_task(bench)
    wanted = [options.only] if options.only else ["A", "B", "C"]
    with rival(options.wheels if "A" in wanted else None, bench, task) as nano:
        part(bench, "gate", lambda: bench.found.setdefault("gate", {}).update(agrees=gate(bench, nano, task)), options.out)
        if not bench.found["gate"].get("agrees"):
            raise SystemExit("no times: engine and referee do not agree")
        acts = {"A": lambda: part_a(bench, nano, task), "B": lambda: part_b(bench), "C": lambda: part_c(bench)}
        for name in wanted:
            part(bench, name, acts[name], options.out)
    print(f"\n{time.perf_counter() - began:.0f} s in all", flush=True)
    failed = [name for name in wanted if "error" in bench.found[name]]
    missed = [name for name in wanted if not bench.found[name].get("reached", True)]
    print(f"goals missed: {missed or 'none'}; parts that failed: {failed or 'none'}")
    sys.exit(1 if failed or (missed and torch.cuda.is_available()) else 0)


if __name__ == "__main__":
    main()
