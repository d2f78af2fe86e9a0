"""What the setup is: the model's size and the machine, under the reference's field names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.schema import Experiment
from utils.data.lengths import of_setup, refuse_longer
from utils.models.ffn import check_fits, ffn_parameters
from utils.models.loading import device_of, load_model, without_weights
from utils.run.environment import code_revision, host, now, versions


def refuse_unsuitable(config: Experiment, source: Path) -> None:
    """Raise InputError if the published model in a folder or a GGUF file takes shorter sequences than setup prepares, or cannot be made
    monotone in the configured way: known from its configuration alone, and of no influence on what setup makes."""
    refuse_longer(source, of_setup(config))
    check_fits(without_weights(source), config.monotone)


def setup_facts(config: Experiment, seed: int, base: Path) -> dict[str, Any]:
    """Fields of setup_complete.json. Raises InputError if the configuration needs longer sequences than the base model takes."""
    refuse_longer(base, of_setup(config))
    model = load_model(base)
    total, ffn = model.num_parameters(), ffn_parameters(model)
    facts: dict[str, Any] = {
        "timestamp": now(),
        "model_name": config.model.name,
        "model_revision": config.model.revision,
        "seed": seed,
        "num_parameters": total,
        "num_trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "ffn_parameters": ffn,
        "ffn_percentage": 100 * ffn / total,
        "vocab_size": model.config.vocab_size,
        "max_seq_length": config.data.sequence_length,
        "device": str(device_of(config.compute)),
        "cuda_available": torch.cuda.is_available(),
        "pytorch_version": torch.__version__,
        "python_version": versions()["python"],
        "platform": host()["platform"],
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "code_revision": code_revision(),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"cuda_version": torch.version.cuda, "gpu_name": card.name, "gpu_memory_gb": card.total_memory / 2**30}
    return facts
