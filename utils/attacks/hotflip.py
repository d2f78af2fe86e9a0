"""HotFlip on a causal LM: greedy token flips, each chosen by exact re-scoring, the gradient taken anew after every flip.

A text is a prefix, whose tokens may be flipped, and a continuation, which alone is scored and never touched. The scored
index set is therefore one and the same for the clean and the attacked text and for every model (Ebrahimi et al. 2018,
arXiv 1712.06751, scored the attacked input of a classifier; scoring flipped tokens of an LM would reward rare tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Experiment, HotFlip
from utils.attacks.controls import random_flips
from utils.attacks.scoring import ADMITTED, Scorer, allowed_tokens, first_order_candidates
from utils.data.attack_texts import Alphabet, read_attack_texts
from utils.models.loading import device_of, load_model
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.records import Records, Row, grouped, read_rows, write_rows

UNIT = "nats per untouched token"


@dataclass
class Attack:
    """One text under attack. `nll[k]` is the mean over the untouched tokens after k flips, nats per token."""

    ids: Tensor  # (1 + prefix + scored,), end-of-text first
    nll: list[float]
    flips: list[dict[str, Any]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # ids after 0, 1, ... flips
    evaluations: int = 0  # candidates scored
    stuck: bool = False


def attack_batch(scorer: Scorer, ids: Tensor, spec: HotFlip, allowed: Tensor) -> list[Attack]:
    """Attack the texts ids (B, 1 + prefix + scored). A text stops early when no candidate raises its loss."""
    clean = scorer.nll(ids, spec.scored_tokens).tolist()
    attacks = [Attack(row.clone(), [nll], states=[row]) for row, nll in zip(ids, clean, strict=True)]
    for _ in range(spec.flips):
        live = [attack for attack in attacks if not attack.stuck]
        if not live:
            break
        _flip_each(scorer, live, spec, allowed)
    for attack in attacks:
        attack.nll += [attack.nll[-1]] * (spec.flips + 1 - len(attack.nll))
        attack.states += [attack.states[-1]] * (spec.flips + 1 - len(attack.states))
    return attacks


def _flip_each(scorer: Scorer, attacks: Sequence[Attack], spec: HotFlip, allowed: Tensor) -> None:
    """Give every text its best flip among the first-order candidates, all candidates of all texts scored together."""
    editable = slice(1, 1 + spec.prefix_tokens)
    slopes = scorer.gradient(torch.stack([attack.ids for attack in attacks]), spec.scored_tokens, editable)
    proposals = [_proposals(scorer, attack, slope, spec, allowed) for attack, slope in zip(attacks, slopes, strict=True)]
    counts = [len(places) for places in proposals]
    places, tokens = torch.cat(proposals).T
    which = torch.repeat_interleave(torch.tensor(counts)).to(scorer.device)
    texts = torch.stack([attack.ids for attack in attacks])
    scores = scorer.edited_nll(texts, which, 1 + places[:, None], tokens[:, None], spec.scored_tokens).split(counts)
    for attack, proposed, nll, slope in zip(attacks, proposals, scores, slopes, strict=True):
        attack.evaluations += len(nll)
        best = int(nll.argmax()) if len(nll) else -1
        if best < 0 or float(nll[best]) <= attack.nll[-1] + ADMITTED:
            attack.stuck = True
            continue
        place, token = proposed[best].tolist()
        old = int(attack.ids[1 + place])
        change = scorer.embeddings[token] - scorer.embeddings[old]
        attack.flips.append({"position": place, "old": old, "new": token, "predicted": float(slope[place] @ change)})
        attack.ids[1 + place] = token
        attack.nll.append(float(nll[best]))
        attack.states.append(attack.ids.clone())


def _proposals(scorer: Scorer, attack: Attack, slope: Tensor, spec: HotFlip, allowed: Tensor) -> Tensor:
    """(K, 2) of (place, token); a place is flipped once, so that k flips change k tokens."""
    free = allowed.repeat(spec.prefix_tokens, 1)
    free[[flip["position"] for flip in attack.flips]] = False
    current = attack.ids[1 : 1 + spec.prefix_tokens]
    return first_order_candidates(scorer, slope, current, free, spec.candidates)


def random_control(scorer: Scorer, ids: Tensor, text_id: str, spec: HotFlip, allowed: Tensor) -> list[float]:
    """Mean NLL of the untouched tokens after `flips` random flips, for each of the draws; ids (T,)."""
    tokens = np.flatnonzero(allowed.cpu().numpy())
    draws = torch.from_numpy(random_flips(spec.seed, text_id, spec.random_draws, spec.flips, spec.prefix_tokens, tokens))
    draws = draws.to(ids.device)
    copies = ids.repeat(spec.random_draws, 1)
    copies.scatter_(1, 1 + draws[..., 0], draws[..., 1])
    return scorer.nll(copies, spec.scored_tokens).tolist()


def attack_rows(scorer: Scorer, name: str, texts: Sequence[Row], end_of_text: int, spec: HotFlip, allowed: Tensor) -> list[Row]:
    """Attack a batch of texts {id, subset, ids}; one row a text with losses by number of flips and the controls.

    Every loss in a row is scored in fp32, whatever precision the search ran in.
    """
    referee = Scorer(scorer.model, "fp32")
    ids = torch.tensor([[end_of_text, *text["ids"]] for text in texts], device=scorer.device)
    attacks = attack_batch(scorer, ids, spec, allowed)
    states = torch.stack([torch.stack(attack.states) for attack in attacks])  # (B, 1 + flips, T)
    curves = referee.nll(states.flatten(0, 1), spec.scored_tokens).view(len(attacks), -1).tolist()
    whole = ids.shape[1] - 1
    reference_clean, reference_attacked = (referee.nll(states[:, k], whole).tolist() for k in (0, -1))
    return [
        {
            "model": name,
            "text": text["id"],
            "subset": text["subset"],
            "nll": curve,
            "flips": attack.flips,
            "evaluations": attack.evaluations,
            "random_nll": random_control(referee, row, text["id"], spec, allowed),
            "reference_clean": before,
            "reference_attacked": after,
        }
        for text, row, attack, curve, before, after in zip(texts, ids, attacks, curves, reference_clean, reference_attacked, strict=True)
    ]


def attack_model(
    model: PreTrainedModel, name: str, texts: Sequence[Row], alphabet: Alphabet, spec: HotFlip, precision: str, path: Path, stop: Stop
) -> list[Row]:
    """Attack all texts on one model, with resume after every batch; returns the rows of the finished file."""
    scorer = Scorer(model, precision)
    allowed = allowed_tokens(model.config.vocab_size, alphabet.writable(), scorer.device)
    records, groups = Records(path), grouped(texts, spec.batch_size)
    pending = list(records.pending(groups))
    progress = Progress(f"HotFlip on {name}", len(groups), len(groups) - len(pending))
    for group in pending:
        stop.check()
        records.append(attack_rows(scorer, name, group, alphabet.end_of_text, spec, allowed))
        progress.advance()
    progress.close()
    return read_rows(path)


def summarise(rows: Sequence[Row], spec: HotFlip) -> dict[str, Any]:
    """Figures of one model from its records; the reference's fields hold untouched-token losses."""
    clean, attacked = [row["nll"][0] for row in rows], [row["nll"][-1] for row in rows]
    rises = np.subtract(attacked, clean)
    random_rises = np.array([np.mean(row["random_nll"]) - row["nll"][0] for row in rows])
    reference = np.array([row["reference_attacked"] / row["reference_clean"] - 1 for row in rows])
    return {
        "avg_degradation": float(rises.mean()),
        "std_degradation": float(rises.std(ddof=1)) if len(rises) > 1 else 0.0,
        "success_rate": float((rises > spec.threshold_nats).mean()),
        "avg_orig_loss": float(np.mean(clean)),
        "avg_attack_loss": float(np.mean(attacked)),
        "random_degradation": float(random_rises.mean()),
        "rise_by_flips": (np.array([row["nll"] for row in rows]) - np.array(clean)[:, None]).mean(axis=0).tolist(),
        "mean_flips": float(np.mean([len(row["flips"]) for row in rows])),
        "reference_criterion": {
            "success_rate": float((reference > spec.reference_threshold).mean()),
            "mean_relative_rise": float(reference.mean()),
            "note": "all tokens scored, flipped ones included, relative to the model's own clean loss; favours worse models",
        },
        "num_samples": len(rows),
        "num_oom_skipped": 0,
    }


def paired_tests(rows: Sequence[Row], first: str, second: str, threshold: float) -> dict[str, Any]:
    """Rise of `second` minus `first` on the same texts: Wilcoxon signed-rank, and exact McNemar on success at the threshold."""
    rise = {name: np.array([row["nll"][-1] - row["nll"][0] for row in rows if row["model"] == name]) for name in (first, second)}
    difference = rise[second] - rise[first]
    won, lost = (int(((rise[a] > threshold) & (rise[b] <= threshold)).sum()) for a, b in ((first, second), (second, first)))
    return {
        "mean_difference": float(difference.mean()),
        "wilcoxon_p_value": float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0,
        f"success_of_{first}_only": won,
        f"success_of_{second}_only": lost,
        "mcnemar_p_value": float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    }


def attack_stored(
    config: Experiment, seed: int, *, models: dict[str, Path], texts: Path, state: Path, records: Path, stop: Stop
) -> dict[str, Any]:
    """Attack stored models with the same texts and budget; write all rows to `records`; return hotflip_results.json."""
    device, spec = device_of(config.compute), config.hotflip
    sets, alphabet = read_attack_texts(texts)
    rows: list[Row] = []
    results = {}
    for name, folder in models.items():
        model = load_model(folder, device)
        mine = attack_model(model, name, sets["hotflip"], alphabet, spec, config.compute.precision, state / f"{name}.jsonl", stop)
        rows += mine
        results[f"{name}_pythia"] = {**summarise(mine, spec), "model_name": name}
    write_rows(records, rows)
    attack = {"num_flips": spec.flips, "num_samples": spec.texts, "success_threshold": spec.threshold_nats}
    return {
        "seed": seed,
        "attack_config": attack | spec.model_dump(mode="json"),
        "results": results,
        "statistical_tests": {"baseline_vs_monotonic": paired_tests(rows, "baseline", "monotonic", spec.threshold_nats)},
        "loss_unit": UNIT,
    }
