"""Stage 5 on stored models: a trigger searched on every model, and reported on every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.schema import Experiment
from utils.attacks.matched import matched_controls
from utils.attacks.round_trip import RoundTrip
from utils.attacks.trigger_records import common_triggers, find_trigger, own_triggers, report_rows
from utils.attacks.trigger_results import table_of, trigger_results
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
) -> tuple[dict[str, Any], str]:
    """Search a trigger on the models and on the controls of equal quality, then report every trigger on every one of them.

    Writes all rows to `records`; returns uat_results.json and the text of learned_triggers.csv.
    """
    device, spec, precision = device_of(config.compute), config.uat, config.compute.precision
    made, matched = matched_controls(
        config, models=models, earlier_models=earlier_models, validation_tokens=validation_tokens, folder=state / "matched"
    )
    folders = models | made
    sets, alphabet = read_attack_texts(texts)
    words = RoundTrip(load_tokenizer(tokenizer))
    found = {
        name: find_trigger(load_model(folder, device), name, sets, alphabet, words, spec, precision, state / f"{name}.json", stop)
        for name, folder in folders.items()
    }
    common = common_triggers(found, words, alphabet, spec)
    rows: dict[str, list[Row]] = {"report": [], "select": []}
    for name, folder in folders.items():
        model, triggers = load_model(folder, device), common | own_triggers(name, found[name])
        for kind, mine in rows.items():
            mine += report_rows(model, name, sets[kind], triggers, alphabet.end_of_text, state / f"{name}.{kind}.jsonl", stop.check)
    write_rows(records, rows["report"])
    attack = {
        "trigger_length": spec.trigger_length,
        "num_iterations": spec.sweeps,
        "num_restarts": spec.restarts,
        "num_opt_samples": spec.search_texts,
        "num_eval_samples": spec.report_texts,
    }
    results = trigger_results(rows["report"], rows["select"], found, sets["report"], words, spec)
    return {"seed": seed, "attack_config": attack | spec.model_dump(mode="json"), "matched": matched, **results}, table_of(
        results["results"]
    )
