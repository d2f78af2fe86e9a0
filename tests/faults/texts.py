"""Text that nobody expects, through the real setup, and through the whole experiment where it is to be used."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fake_stages import ROOT, TINY
from tests.faults.outcome import Outcome
from tests.tiny_models import random_model
from utils.data.tokenizer import train_tokenizer
from utils.models.loading import save_model

WORDS = (
    "a",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "and",
    "looked",
    "at",
    "a",
    "dog",
    "that",
    "ran",
    "to",
    "the",
    "river",
    "where",
    "it",
    "swam",
)
Make = Callable[[random.Random], Iterable[str]]


def normal(chance: random.Random, count: int = 400) -> list[str]:
    """Documents long enough to be attacked."""
    return [" ".join(chance.choices(WORDS, k=60)) + f" {number}" for number in range(count)]


def mixed(chance: random.Random) -> list[str]:
    """What a scraped text may hold, between documents that are as they should be."""
    odd = ["", " ", "\n" * 5000, "\0", "a\0b\0" * 50, "\ufeff\u202e\u200b" * 20, "\x1b[2J\x07", "é" * 3000, "<|endoftext|>" * 30]
    found = [*normal(chance, 600), *odd * 3, *("a" for _ in range(10_000)), "ab " * 100_000, "x" * 200_000]
    chance.shuffle(found)
    return found


@dataclass(frozen=True)
class Text:
    """`words`: what the refusal says; empty where the text is to be used. `through`: the last stage to run."""

    name: str
    train: Make
    held_out: Make
    words: str = ""
    through: int = 0
    raw: bytes = b""  # put behind the training text as it is


TEXTS = (
    Text("documents of one token, empty ones, NUL bytes, long runs, controls between others", mixed, mixed, through=7),
    Text("10,000 documents of one token in training, test and validation", *[lambda chance: ["a"] * 10_000] * 2, "expected"),
    Text("10,000 different words, a document each", *[lambda chance: [f"{number}" for number in range(10_000)]] * 2, "expected"),
    Text("a document of 50 MB", lambda chance: [*normal(chance), "ab cd " * (50 * 10**6 // 6)], normal),
    Text("empty documents alone", *[lambda chance: [""] * 1000] * 2, "expected"),
    Text("no document", *[lambda chance: []] * 2, "expected"),
    Text("NUL bytes alone", *[lambda chance: ["\0" * 500] * 1000] * 2, "expected"),
    Text("the same document 1,000 times", *[lambda chance: normal(chance, 1) * 1000] * 2, "expected"),
    Text("bytes that are no UTF-8", normal, normal, "expected UTF-8", raw=b'{"text": "\xff\xfe"}\n'),
    Text("UTF-16", normal, normal, "expected", raw=b'{"text": "x"}\n'.decode().encode("utf-16")),
    Text("half of a surrogate pair", normal, normal, raw=b'{"text": "a\\ud800b"}\n'),
)


def read(folder: Path, seed: int) -> Iterator[Outcome]:
    """Every text, and every tokenizer, through the command line."""
    for text in TEXTS:
        place = folder / "text"
        chance = random.Random(seed)
        for split, make in (("train", text.train), ("validation", text.held_out), ("test", text.held_out)):
            place.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"text": f"{each} {split}" if each and split != "train" else each}) for each in make(chance)]
            (place / f"{split}.jsonl").write_bytes("\n".join([*rows, ""]).encode() + (text.raw if split == "train" else b""))
        files = {split: [str(place / f"{split}.jsonl")] for split in ("train", "validation", "test")}
        found = experiment(folder, {"data.files": json.dumps(files)}, text.through)
        yield Outcome(f"text: {text.name}", _fits(found, text.words), _told(found))
    yield from tokenizers(folder)


def tokenizers(folder: Path) -> Iterator[Outcome]:
    """A published model whose tokenizer lacks a pad token, an end-of-text token, or is none."""
    place = folder / "model"
    words = train_tokenizer(iter(WORDS * 9), 297)
    save_model(random_model(vocabulary=words.get_vocab_size()), place)
    for name, told, expected in (
        ("without a pad token", {"eos_token": "<|endoftext|>"}, ""),
        ("without an end-of-text token", {}, "has no end-of-text token"),
        ("whose end-of-text token is not in it", {"eos_token": "<nowhere>"}, "expected ids below"),
        ("that asks for code of its own", {"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, ""),
    ):
        words.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | told))
        given = {"model": json.dumps({"source": "pretrained", "name": str(place)}), "uat.text_tokens": "16"}
        found = experiment(folder, given, 0)
        yield Outcome(f"tokenizer {name}", _fits(found, expected), _told(found))


def experiment(folder: Path, overrides: Mapping[str, str], through: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tiny experiment with other text or another model, through the real command line; pretraining is shortened."""
    given = {"data.source": "files", "data.embedded": "null", "model.scratch.steps": "20", "model.scratch.earlier": "[4]"}
    if "model" in overrides:
        given = {}
    options = [part for name, value in (given | dict(overrides)).items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "stages", "run", "--config", TINY, "--to", str(through), *options]
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    places = {"SCRATCH": str(folder / "scratch"), "PROJECT": str(folder / "project"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | places | environment, capture_output=True, text=True, timeout=300)


def _fits(found: subprocess.CompletedProcess[str], words: str) -> bool:
    """Used, or refused in these words; never a traceback."""
    return "Traceback" not in found.stderr and found.returncode == (2 if words else 0) and words in found.stderr


def _told(found: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {found.returncode}: {(found.stderr.strip() or found.stdout.strip())[-300:]}"
