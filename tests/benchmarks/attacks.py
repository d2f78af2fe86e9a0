"""The attack engine against what is published, in one run on one device.

`python -m tests.benchmarks.attacks --shape pythia-1.4b --wheels FOLDER --out FILE` on a GPU; `--shape tiny` shows on a CPU that it works.
Random weights unless --model names a folder of a GPT-NeoX model. Before any time is printed, engine and referee must agree on the very
candidates that are timed. A: suffix search on one text against nanoGCG 0.3 (FOLDER has its wheels; left out without), which runs in
fp16 as in its own example: in bf16 its losses, rounded to bf16, could not tell candidates apart. B: universal
prefix trigger against the one-candidate-at-a-time loop. C: ten exact flips against one-shot flips. D: hours of both stages at the
study's size. Exit code 1 if an exactness gate or a part fails, or on a GPU a goal is missed.
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
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from scipy import stats
from torch import Tensor

from configs.schema import HotFlip
from tests.benchmarks.attack_bench import GOALS, ROUNDS, SHAPES, Bench, matmul_rate, median, peak, seconds_of
from tests.benchmarks.attack_rivals import NanoGCG, one_at_a_time, one_shot
from tests.benchmarks.attack_study import part_d
from tests.benchmarks.attack_suffix import SuffixSearch, part_a, suffix_task
from utils.attacks import edits
from utils.attacks.hotflip import FlipSearch, replay
from utils.attacks.race import race
from utils.attacks.scoring import Scorer, first_order_candidates, in_format
from utils.attacks.uat import with_trigger
from utils.models.blocks import prepare_blocks

EXACT = {"fp32": 1e-4, "bf16": 0.05}  # nats per token that engine and referee may differ by, in the mean over the scored tokens


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


def part_b(bench: Bench, compiled: bool) -> None:
    shape, found = bench.shape, bench.found.setdefault("B", {})
    ids, place, candidates = trigger_position(bench)
    fast, half = bench.fast, in_format(bench.model, torch.bfloat16)
    few = {"port, fp32": max(2, len(candidates) // 10), "port, bf16": max(2, len(candidates) // 4)}
    places = torch.full((len(candidates), 1), place, device=bench.device)
    acts: dict[str, tuple[int, Callable[[], Any]]] = {
        "engine, all texts": (len(candidates), lambda: every_candidate(bench, fast, ids, place, candidates)),
        "engine, race": (len(candidates), lambda: race(fast, ids, places, candidates[:, None], shape.text)),
        "port, fp32": (few["port, fp32"], lambda: one_at_a_time(bench.model, ids, place, candidates[: few["port, fp32"]], shape.text)),
        "port, bf16": (few["port, bf16"], lambda: one_at_a_time(half, ids, place, candidates[: few["port, bf16"]], shape.text)),
    }
    if compiled:
        blocks = Scorer(bench.model, "bf16")
        prepare_blocks(blocks.network, True)
        acts["engine, all texts, compiled blocks"] = len(candidates), lambda: every_candidate(bench, blocks, ids, place, candidates)
    flops, rates, peaks = {}, {name: [] for name in acts}, {}
    for number in range(ROUNDS + 1):  # the first is to warm up
        for name, (count, act) in acts.items():
            peak()
            before = fast.work
            seconds = seconds_of(act)
            peaks[name] = peak()
            flops[name] = (fast.work - before).flops or count * row_flops(bench, name, ids)
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
    found["ratio_of_all_texts"] = statistics.median(rates["engine, all texts"]) / port
    found["ratio"] = statistics.median(rates["engine, race"]) / port
    found["share"] = statistics.median(shares["engine, all texts"])
    print(
        f"\nratio to the port in fp32: {found['ratio_of_all_texts']:.1f} with all texts, {found['ratio']:.1f} in a race (goal "
        f"{GOALS['B']}); share of the matrix-product rate {100 * found['share']:.0f} % (goal {100 * GOALS['B share']:.0f} %)",
        flush=True,
    )
    found["reached"] = found["ratio"] >= GOALS["B"] and found["share"] >= GOALS["B share"]


def row_flops(bench: Bench, name: str, ids: Tensor) -> int:
    """FLOP of one candidate over all texts where the engine `fast` did not count them: a port makes all logits, also of the last row."""
    rows = ids.numel() if name.startswith("port") else len(ids) * (ids.shape[1] - 1)
    scored = rows if name.startswith("port") else len(ids) * bench.shape.text
    return bench.fast.prices.scoring(len(ids), rows, scored).flops


def race_quality(bench: Bench, found: dict[str, Any]) -> None:
    """How often the race's winner is that of scoring everything, and how much loss it misses otherwise."""
    same, missed, gained = [], [], []
    for _ in range(4):
        ids, place, candidates = trigger_position(bench)
        means = every_candidate(bench, bench.fast, ids, place, candidates)
        numbers, _ = race(bench.fast, ids, torch.full_like(candidates, place)[:, None], candidates[:, None], bench.shape.text)
        winner = numbers[0]
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


def exact_flips(bench: Bench, texts: Tensor, spec: HotFlip) -> Tensor:
    """texts (B, T) -> (B, T) with the flips that the search found."""
    found = FlipSearch(bench.fast, spec, bench.allowed).run(texts, [str(number) for number in range(len(texts))])
    return torch.stack([replay(text, attack.flips, spec.flips)[-1] for text, attack in zip(texts, found, strict=True)])


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
            lambda: exact_flips(bench, texts, spec),
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
    flipped = exact_flips(bench, texts, spec)
    flops = (bench.fast.work - before).flops / len(texts)
    bench.model.requires_grad_(True)
    for number in range(ROUNDS + 1):
        for name, (count, act) in acts.items():
            taken = seconds_of(act)
            if number:
                seconds[name].append(taken / count)
    bench.model.requires_grad_(False)
    bench.model.zero_grad(set_to_none=True)
    rise = quality_of_flips(bench, texts, flipped, spec)
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


def quality_of_flips(bench: Bench, texts: Tensor, flipped: Tensor, spec: HotFlip) -> dict[str, float]:
    """Mean rise of the untouched second half: of the exact flips, and of one-shot flips confined to the first half."""
    clean = bench.referee.nll(texts, spec.scored_tokens)
    slopes = bench.fast.gradient(texts, spec.scored_tokens, slice(1, 1 + spec.prefix_tokens))
    at_once = texts.clone()
    for text, slope in zip(at_once, slopes, strict=True):
        places = slope.norm(dim=1).topk(spec.flips).indices
        text[1 + places] = (slope[places] @ bench.fast.embeddings.T).masked_fill(~bench.allowed, -torch.inf).argmax(dim=1)
    return {
        "engine": float((bench.referee.nll(flipped, spec.scored_tokens) - clean).mean()),
        "one_shot": float((bench.referee.nll(at_once, spec.scored_tokens) - clean).mean()),
    }


# The gate, and all of it


def gate(bench: Bench, task: dict[str, list[int]]) -> bool:
    """Engine and referee on the candidates of all three parts, in both formats, with and without reused beginnings."""
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
    found = bench.found.setdefault("gate", {})
    for name, (texts, which, where, what, scored) in sets.items():
        exact = bench.referee.nll(texts[which].scatter(1, where, what), scored)
        for engine, reuse in ((bench.exact, True), (bench.exact, False), (bench.fast, True), (bench.fast, False)):
            with mock.patch.object(edits, "LEAST_PREFIX", edits.LEAST_PREFIX if reuse else 10**9):
                before = engine.work.cached_rows
                nll = engine.edited_nll(texts, which, where, what, scored)
            kind = f"{name}, engine in {engine.precision}, {engine.work.cached_rows - before} rows of prefixes reused"
            found[kind] = agreement(kind, nll, exact, EXACT[engine.precision])
    return all(each["agrees"] for each in found.values())


def gate_of_rival(bench: Bench, nano: NanoGCG, task: dict[str, list[int]]) -> bool:
    """nanoGCG's process against the referee: whether it has the same model and reads the same ids."""
    search = SuffixSearch(bench, task["prefix"], task["start"], task["target"])
    places, tokens = search.candidates()
    texts = search.ids.repeat(len(places), 1).scatter(1, places, tokens)[:64]
    theirs = torch.tensor(nano("losses", ids=texts.tolist(), scored=bench.shape.target))
    kind = f"A, nanoGCG's model in {nano.format}"
    found = agreement(kind, theirs, bench.referee.nll(texts, bench.shape.target), EXACT["bf16"])
    return bool(bench.found.setdefault("gate", {}).setdefault(kind, found)["agrees"])


def agreement(kind: str, nll: Tensor, exact: Tensor, bound: float) -> dict[str, Any]:
    nll, exact = nll.cpu(), exact.cpu()
    off, rank = float((nll - exact).abs().max()), float(stats.spearmanr(nll, exact).statistic)
    agrees = off <= bound
    print(
        f"gate {kind}: {len(nll)} candidates differ from the referee by at most {off:.1e} nats per token (bound {bound:.0e}), rank "
        f"correlation {rank:.4f}, spread of the candidates {float(exact.std()):.1e}: {'agrees' if agrees else 'FAILS'}",
        flush=True,
    )
    return {"largest_difference": off, "rank_correlation": rank, "agrees": agrees}


@contextmanager
def rival(wheels: Path | None, bench: Bench, task: dict[str, list[int]]) -> Iterator[NanoGCG | None]:
    """nanoGCG's process, or None without wheels or if it does not start."""
    if wheels is None:
        print("nanoGCG is left out: --wheels names no folder", flush=True)
        yield None
        return
    texts: dict[str, Any] = {name: bench.tokenizer.decode(ids, skip_special_tokens=False) for name, ids in task.items()}
    texts |= {"width": bench.shape.search_width, "topk": bench.shape.topk}
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


def suffix_part(bench: Bench, wheels: Path | None, task: dict[str, list[int]]) -> None:
    """Part A; without nanoGCG if its process does not start or is not at one with the referee, which then is an error of its own."""
    with rival(wheels, bench, task) as nano:
        agrees = nano is not None and gate_of_rival(bench, nano, task)
        part_a(bench, nano if agrees else None, task)
    if wheels is not None and not agrees:
        raise RuntimeError("nanoGCG was not measured: it did not start, or its model differs; see above")


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
    parser.add_argument("--compiled", action="store_true", help="measure part B with compiled blocks too; compilation takes minutes")
    parser.add_argument("--only", choices=("A", "B", "C", "D"), help="one part alone")
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
    wanted = [options.only] if options.only else ["A", "B", "C", "D"]
    agrees: list[bool] = []
    part(bench, "gate", lambda: agrees.append(gate(bench, task)), options.out)
    if agrees != [True]:
        raise SystemExit("no times: engine and referee do not agree")
    acts = {
        "A": lambda: suffix_part(bench, options.wheels, task),
        "B": lambda: part_b(bench, options.compiled),
        "C": lambda: part_c(bench),
        "D": lambda: part_d(bench, "bf16"),
    }
    for name in wanted:
        part(bench, name, acts[name], options.out)
    print(f"\n{time.perf_counter() - began:.0f} s in all", flush=True)
    failed = [name for name in wanted if "error" in bench.found[name]]
    missed = [name for name in wanted if not bench.found[name].get("reached", True)]
    print(f"goals missed: {missed or 'none'}; parts that failed: {failed or 'none'}")
    sys.exit(1 if failed or (missed and torch.cuda.is_available()) else 0)


if __name__ == "__main__":
    main()
