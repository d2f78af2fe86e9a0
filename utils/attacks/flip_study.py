"""Stage 6 on stored models: every attack by flips on every model, with the same texts, candidates and budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.schema import Experiment
from utils.attacks.flip_records import FlipAttacks
from utils.attacks.flip_results import flip_results
from utils.attacks.matched import matched_controls
from utils.attacks.round_trip import RoundTrip
from utils.data.attack_texts import read_attack_texts
from utils.data.tokenizer import load_tokenizer
from utils.models.loading import device_of, load_model
from utils.run.preemption import Stop
from utils.run.records import Row, write_rows


def attack_stored(
    config: Experiment,
    seed: int,
    *,
    models: dict[str, Path],
    earlier_models: Path,
    validation_tokens: Path,
    texts: Path,
    tokenizer: Path,
    state: Path,
    records: Path,
    stop: Stop,
) -> dict[str, Any]:
    """Attack the models and the controls of equal quality; write all rows to `records`; return hotflip_results.json."""
    device, spec = device_of(config.compute), config.hotflip
    made, matched = matched_controls(
        config, models=models, earlier_models=earlier_models, validation_tokens=validation_tokens, folder=state / "matched"
    )
    folders = models | made
    sets, alphabet = read_attack_texts(texts)
    own, words = sets["hotflip"], RoundTrip(load_tokenizer(tokenizer))

    def attacks(name: str) -> FlipAttacks:
        return FlipAttacks(load_model(folders[name], device), name, alphabet, words, spec, config.compute.precision, state, stop)

    rows: dict[str, dict[str, list[Row]]] = {}
    for name in folders:
        on = attacks(name)
        rows[name] = {"hotflip": on.hotflip(own), "query_greedy": on.query_greedy(own), "longer": on.longer(own)}
        del on  # a model and its copy, before the next is loaded
    found = {name: mine["hotflip"] for name, mine in rows.items()}
    for name in folders:
        rows[name] |= attacks(name).transferred(found, own)
    write_rows(records, (row for mine in rows.values() for found in mine.values() for row in found))
    attack = {"num_flips": spec.flips, "num_samples": spec.texts, "success_threshold": spec.threshold_nats}
    return {"seed": seed, "attack_config": attack | spec.model_dump(mode="json"), "matched": matched, **flip_results(rows, spec)}
