"""Is the order preserved through the network? By intervention, and by probes as the reference does it.

The certificate covers feed-forward sublayers alone. Here the residual stream (..., d) is pushed along the order behind some block, with
everything else live, and read along the order behind the last block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import Evaluate, Experiment
from utils.data.ordered_texts import Pair, ordered_pairs
from utils.data.tokenizer import load_tokenizer
from utils.data.tokens import PackedBatches, Tokens
from utils.models.falsify import Draw, pushed
from utils.models.ffn import feed_forward
from utils.models.loading import device_of, load_model
from utils.models.orders import Order

PUSHED = 0.1  # share of the axes in one push
LAYERS = 4  # evenly spaced blocks in front of which the stream is pushed
ROUNDING = 1e-5  # of the largest change of a readout: what falls by less does not fall
RIDGE = 1e-2  # weight of |w|^2 / 2 beside the mean logistic loss of a probe


def order_stored(
    config: Experiment, seed: int, *, models: dict[str, Path], order: Path, tokenizer: Path, test_tokens: Path
) -> dict[str, Any]:
    """Both measurements of stored models, all along the order of the monotone one; under `order_preservation` in the results."""
    device, chosen, words = device_of(config.compute), Order.load(order), load_tokenizer(tokenizer)
    length = min(config.data.sequence_length, config.evaluate.context - 1)
    sequences = PackedBatches(Tokens(test_tokens), length, seed).all_sequences()[: config.evaluate.order_sequences, :-1]
    ids, pairs = torch.from_numpy(sequences).to(device), ordered_pairs()
    texts = sorted({text for pair in pairs for text in (pair.weaker, pair.stronger)})
    results: dict[str, Any] = {}
    for name, folder in models.items():
        model = load_model(folder, device)
        hidden = dict(zip(texts, last_hidden(model, [words.encode(text).ids for text in texts]), strict=True))
        results[name] = {
            "intervention": intervention(model, chosen, ids, config.evaluate.order_push),
            "probe": probe(pairs, hidden, config.evaluate, seed),
        }
    return results


@torch.no_grad()
def intervention(model: PreTrainedModel, order: Order, ids: Tensor, size: float, seed: int = 0) -> dict[str, Any]:
    """Shares of readouts, over tokens and axes of ids (B, T), that do not fall behind the last block; by the block that was pushed.

    The push is along a random tenth of the axes, on all positions, with a root mean square of `size` standard deviations. `others`: axes
    that were not pushed, which the residual connection leaves alone: about one half for a network that ignores the order. `pushed`:
    the axes that were. `null`: as `others`, with the sign of every axis drawn anew. Standard errors (_se) are over sequences.
    """
    sublayers = feed_forward(model)
    draw = Draw(order, ids.device, next(model.parameters()).dtype, seed)
    places = sorted({round(place) for place in np.linspace(0, len(sublayers) - 1, LAYERS)})
    return {
        "push": size,
        "by_block": {
            str(place): _pushed_at(model, order, ids, size, draw, sublayers[place].block, sublayers[-1].block) for place in places
        },
    }


def _pushed_at(
    model: PreTrainedModel, order: Order, ids: Tensor, size: float, draw: Draw, block: torch.nn.Module, last: torch.nn.Module
) -> dict[str, float]:
    weights = torch.rand((len(ids), 1, order.size), generator=draw.generator)
    chosen = torch.rand(weights.shape, generator=draw.generator).argsort(dim=-1) < max(1, round(PUSHED * order.size))
    signs = torch.where(torch.rand(weights.shape, generator=draw.generator) < 0.5, -1.0, 1.0).to(ids.device)
    direction = order.cone((weights * chosen).to(ids.device))
    direction = direction / direction.square().mean(dim=-1, keepdim=True).sqrt()

    def push(hidden: Tensor) -> Tensor:
        return hidden + size * hidden.std(dim=-1, keepdim=True) * direction.to(hidden)

    change = order.readout(pushed(model, ids, block, last, push))  # (B, T, axes)
    floor = -ROUNDING * change.abs().amax(dim=-1, keepdim=True)
    chosen = chosen.to(ids.device)
    kept = {
        "others": _share(change >= floor, ~chosen),
        "pushed": _share(change >= floor, chosen),
        "null": _share(signs * change >= floor, ~chosen),
    }
    return {key: value for name, (mean, error) in kept.items() for key, value in ((name, mean), (f"{name}_se", error))}


def _share(holds: Tensor, among: Tensor) -> tuple[float, float]:
    """holds (B, T, axes), among (B, 1, axes) -> mean over sequences of the share that holds, and its standard error."""
    among = among.expand_as(holds)
    shares = (holds & among).double().sum(dim=(1, 2)) / among.double().sum(dim=(1, 2)).clamp(min=1.0)
    return float(shares.mean()), float(shares.std() / len(shares) ** 0.5) if len(shares) > 1 else 0.0


@torch.no_grad()
def last_hidden(model: PreTrainedModel, texts: list[list[int]]) -> Tensor:
    """Ids of n texts -> (n, d) in fp64: what the unembedding reads behind the last token of each, with end-of-text in front."""
    start = model.config.eos_token_id
    ids = torch.zeros(len(texts), 1 + max(map(len, texts)), dtype=torch.long)  # padding stands behind, where attention cannot see it
    ids[:, 0] = start if isinstance(start, int) else start[0]
    for row, text in enumerate(texts):
        ids[row, 1 : 1 + len(text)] = torch.tensor(text)
    hidden = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state
    return hidden[range(len(texts)), [len(text) for text in texts]].double().cpu()


def probe(pairs: list[Pair], hidden: dict[str, Tensor], spec: Evaluate, seed: int) -> dict[str, Any]:
    """Share of held-out pairs that a linear probe puts in order: decodability, not monotonicity; an unconstrained model may score high.

    One probe for each axis, fitted to all other axes (Bradley-Terry: logistic regression on the difference, no intercept). `null`: the
    same with the sign of every training chain shuffled; its range shows what chance gives.
    """
    differences = torch.stack([hidden[pair.stronger] - hidden[pair.weaker] for pair in pairs])
    differences = differences / differences.square().mean().sqrt().clamp(min=1e-12)
    axes = np.array([pair.axis for pair in pairs])
    chains, which = np.unique([pair.chain for pair in pairs], return_inverse=True)
    random = np.random.default_rng(seed)
    flips = np.stack([np.ones(len(chains)), *(random.choice([-1.0, 1.0], len(chains)) for _ in range(spec.order_null_fits))])
    by_axis, *nulls = held_out(differences, axes, torch.as_tensor(flips[:, which]))
    null_means = [float(np.mean(list(shares.values()))) for shares in nulls]
    return {
        "accuracy": float(np.mean(list(by_axis.values()))),
        "by_axis": by_axis,
        "null_mean": float(np.mean(null_means)),
        "null_range": [min(null_means), max(null_means)],
        "pairs": len(pairs),
        "chains": len(chains),
    }


def held_out(differences: Tensor, axes: np.ndarray, flips: Tensor) -> list[dict[str, float]]:
    """differences (n, d) of stronger minus weaker, flips (f, n) of +1 and -1 that training differences are multiplied with -> for each of
    the f {axis: share of its pairs in order under a probe that never saw the axis}."""
    names = sorted(set(axes.tolist()))
    others = torch.stack([torch.as_tensor(axes != name) for name in names]).to(differences)
    probes = fit_probes(differences, (flips[:, None] * others).flatten(0, 1)).unflatten(0, (len(flips), len(names)))
    scores = torch.einsum("nd,fad->fan", differences, probes)
    right = (scores > 0).double() + 0.5 * (scores == 0).double()
    shares = (right * (1 - others)).sum(dim=-1) / (1 - others).sum(dim=-1)
    return [dict(zip(names, row, strict=True)) for row in shares.tolist()]


def fit_probes(differences: Tensor, signs: Tensor) -> Tensor:
    """differences x (n, d), signs s (k, n) of +1, -1, or 0 for what is left out -> (k, d): each minimises the mean of
    log(1 + exp(-s x . w)) over what is not left out, plus RIDGE |w|^2 / 2; by Newton's method, all at once."""
    _, sizes, rows = torch.linalg.svd(differences, full_matrices=False)
    basis = rows[sizes > 1e-10 * sizes[0]].T  # the minima lie in the span of the data
    x, used = differences @ basis, signs.abs()
    count = used.sum(dim=1, keepdim=True)
    w = x.new_zeros(len(signs), x.shape[1])
    for _ in range(20):
        chance = torch.sigmoid(-signs * (w @ x.T))  # (k, n)
        gradient = RIDGE * w - (signs * chance / count) @ x
        weights = used * chance * (1 - chance) / count
        curvature = (x.T * weights[:, None]) @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        w = w - torch.linalg.solve(curvature, gradient)
    return w @ basis.T
