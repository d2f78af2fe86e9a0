"""How long the sequences of an experiment are, and how long a model takes them: known from its configuration, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.schema import Experiment
from utils.data.published import read_config
from utils.run.errors import InputError


def of_setup(config: Experiment) -> dict[str, int]:
    """What setup prepares, {keys: tokens}. A trigger has at least one token; how many is no matter of setup."""
    return config.data.longest | config.hotflip.longest | {"uat.text_tokens + 2": config.uat.text_tokens + 2}


def refuse_longer(source: Path, needs: Mapping[str, int]) -> None:
    """Raise InputError if a sequence of `needs` ({keys: tokens}) is longer than the model in a folder or a GGUF file takes.

    GPT-2 and OPT have a table of positions and would fail; others would extrapolate.
    """
    longest = getattr(read_config(source), "max_position_embeddings", None)
    for key, tokens in needs.items():
        if longest is not None and tokens > longest:
            raise InputError(f"{key} = {tokens}: expected at most {longest}, the longest sequence of the base model; lower it")
