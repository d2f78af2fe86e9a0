"""All checks of what setup takes from elsewhere, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from utils.run import hub
from utils.run.checks import Check, Finding, examined
from utils.run.places import visited
from utils.verify.benchmarks import benchmarks
from utils.verify.look import Look
from utils.verify.published import architecture, model_files, sequences, small_model, tokenizer
from utils.verify.reach import cache_folder, disk, hub_answers, network, offline_use, token
from utils.verify.texts import fallback, first_rows, text_files

OF_THE_HUB = ("network", "hub", "token", "small model")  # of no use to an experiment that takes nothing from there
OF_THE_MODEL = ("model files", "tokenizer", "sequences", "architecture")
ASKING = ("token", "disk", *OF_THE_MODEL, "text files", "first rows", "fallback", "benchmarks", "small model")


def download_checks(look: Look) -> Iterator[Check]:
    """Each check as soon as it is known. Once the hub is found not to answer, what would ask it again is skipped."""
    needed, reached = bool(hub.wanted(look.config)), True
    with visited(look.folders.cache):
        for name, (remedy, check) in _checks(look).items():
            if name in OF_THE_HUB and not needed:
                yield Check(name, "skip", "nothing of this experiment is on the hub")
            elif name in ASKING and not reached:
                yield Check(name, "skip", "the hub is not reached")
            else:
                found = examined(name, remedy, check)
                reached = reached and (name, found.verdict) != ("hub", "no")
                yield found


def _checks(look: Look) -> dict[str, tuple[str, Callable[[], Finding]]]:
    """{name: (what to do about a `no`, how to look)}."""
    return {
        "cache folder": ("", lambda: cache_folder(look)),
        "network": ("", lambda: network(look)),
        "hub": ("", lambda: hub_answers(look)),
        "token": ("", lambda: token(look)),
        "disk": ("", lambda: disk(look)),
        "model files": ("", lambda: model_files(look)),
        "tokenizer": ("name a model whose tokenizer transformers can load", lambda: tokenizer(look)),
        "sequences": ("", lambda: sequences(look)),
        "architecture": ("", lambda: architecture(look)),
        "text files": ("", lambda: text_files(look)),
        "first rows": ("", lambda: first_rows(look)),
        "fallback": ("", lambda: fallback(look)),
        "benchmarks": ("", lambda: benchmarks(look)),
        "offline use": ("", lambda: offline_use(look)),
        "small model": ("it is for tests only, but the study's model goes the same way", lambda: small_model(look)),
    }
