"""Signs of a masked gradient or a weak attack, in plain words (Carlini et al. 2019; AutoAttack's flags, Croce and Hein 2020).

A model is robust only as far as the attacks on it were strong. A flag is no verdict on the model: it says why a small rise may be the
attack's fault. All rises are in nats per untouched token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ENOUGH = 0.05  # share of the rise that a longer search, the last edit of the present one, or another model's edits may add
ZERO = 0.05  # share of gradients that may be exactly zero
CORRELATION = 0.1  # Spearman's, of foretold and true gain, below which the gradient says next to nothing
COSINE = 0.9  # of the gradients in bf16 and fp32
LEAK = 1e-3  # nats; a token before the first edit loses nothing in a causal model
SPENT = 0.05  # share by which the work of two searches may differ

Facts = Mapping[str, Any]


def flip_flags(results: Mapping[str, Facts], controls: Mapping[str, Facts], transfer: Mapping[str, Facts], budget: Facts) -> list[str]:
    """Sentences about HotFlip, by model, from the parts of hotflip_results.json; none is as it should be."""
    flags = [
        f"{model}: {words}"
        for model, facts in controls.items()
        for words in (
            *_flip_flags(results[model], facts),
            *_transferred(model, results[model]["avg_degradation"], transfer[model], "flips"),
        )
    ]
    return [*flags, *_unequal(budget["by_model"])]


def _flip_flags(own: Facts, facts: Facts) -> Iterator[str]:
    rise, longer = own["avg_degradation"], facts["longer"]
    for kind, found in (("random flips raise", facts["random_rise"]), ("a search without gradient raises", facts["query_greedy_rise"])):
        if found >= rise:
            yield f"{kind} the loss by {found:.3f} nats, HotFlip by {rise:.3f}; its gradient may be masked"
    if (share := facts["zero_gradient_share"]) > ZERO:
        yield f"{100 * share:.1f} % of the prefix tokens have a gradient of exactly zero; it may be masked"
    for which, name in (("candidates", "scored candidates"), ("random", "random substitutions")):
        if (found := facts["rank_correlation"][which]) is not None and found < CORRELATION:
            yield f"foretold and true gains of {name} correlate by {found:.2f} only (Spearman); the gradient is a poor guide"
    if (cosine := facts["bf16_cosine"]) is not None and cosine < COSINE:
        yield f"gradients in bf16 and fp32 agree by a cosine of {cosine:.2f} only; search in fp32"
    if longer["further_share"] > ENOUGH:
        yield (
            f"ten times the candidates raise the loss by {longer['rise']:.3f} nats, HotFlip by {longer['hotflip_rise']:.3f} on the same "
            f"{longer['texts']} texts ({100 * longer['further_share']:+.1f} %); the budget of candidates is too small"
        )
    if not own["flat"]:
        yield (
            f"the last flip still brings {100 * own['last_flip_share']:.1f} % of the whole rise; the curve has not flattened, more flips "
            "would do more"
        )
    if (leak := facts["largest_leak"]) > LEAK:
        yield f"tokens before the first flip changed by up to {leak:.2g} nats; the model is not causal, or the scores are wrong"


def trigger_flags(results: Mapping[str, Facts], controls: Mapping[str, Facts], transfer: Mapping[str, Facts], budget: Facts) -> list[str]:
    """Sentences about the universal triggers, by model, from the parts of uat_results.json."""
    flags = []
    for model, facts in controls.items():
        own = results[model]
        signs = (*_trigger_flags(own, facts), *_transferred(model, own["nll_increase"], transfer[model], "trigger"))
        flags += [f"{model}: {words}" for words in signs]
    return [*flags, *_unequal(budget["by_model"])]


def _trigger_flags(own: Facts, facts: Facts) -> Iterator[str]:
    rise = own["nll_increase"]
    compared = {"a neutral trigger raises": own["neutral_increase"], "random triggers raise": own["random_increase"]}
    compared["a search without gradient raises"] = facts["query_greedy_increase"]
    for kind, found in compared.items():
        if found >= rise:
            yield f"{kind} the loss by {found:.3f} nats, the trigger by {rise:.3f}; the gradient may be masked"
    if facts["last_sweep_share"] > ENOUGH:
        yield f"the last sweep still brings {100 * facts['last_sweep_share']:.1f} % of the rise on the search texts; more would do more"
    if own["survives_retokenisation"] < 1 - ENOUGH:
        yield (
            f"on {100 * (1 - own['survives_retokenisation']):.0f} % of the texts the trigger does not survive decoding and encoding; "
            "nobody can type it there (uat.mode=text searches only such as can be typed)"
        )


def _transferred(own: str, rise: float, found: Facts, what: str) -> Iterator[str]:
    for source, other in found.items():
        if other > (1 + ENOUGH) * rise and source != own:
            yield f"the {what} found on {source} raised its loss by {other:.3f} nats, its own by {rise:.3f}; the search on it is weak"


def _unequal(spent: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for kind in ("forwards", "backwards", "flops"):
        least, most = (choose(spent, key=lambda model: spent[model][kind]) for choose in (min, max))
        if spent[most][kind] > (1 + SPENT) * spent[least][kind]:
            yield (
                f"the searches cost {spent[most][kind]:,} {kind} on {most} and {spent[least][kind]:,} on {least}; "
                "the allowance is the same, but some texts ended early or took a wider round"
            )
