"""Tokenising a training split to disk, against `datasets.map` and `save_to_disk` on the same rows, tokenizer and cores.

    python -m tests.benchmarks.tokenise ROWS [--tokenizer FOLDER]

ROWS is a .jsonl, .jsonl.zst or .jsonl.gz file. Without --tokenizer, one of GPT-NeoX's make (50,277 entries) is trained on its beginning.
Ours reads the archive, leaves out copies, tokenises, packs, hashes and syncs. The alternative is timed from rows that are read already; its
reading is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

CODE = {"ours": "_ours", "datasets.map, a process a core": "_map", "datasets.map, a thread a core": "_threads"}


def _ours(rows: Path, words: Path, folder: Path) -> dict[str, float]:
    from configs.schema import Data, Files
    from utils.data.sources import SPLITS, Source
    from utils.data.tokenise import Limits, tokenise
    from utils.data.tokenizer import load_tokenizer
    from utils.data.tokens import Tokens
    from utils.run.preemption import Stop

    for name in ("validation", "test"):
        texts = [json.dumps({"text": f"a short text for the split {name}, number {number}"}) for number in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(texts))
    files = Files(train=(str(rows),), validation=(str(folder / "validation.jsonl"),), test=(str(folder / "test.jsonl"),))
    data = Data(source="files", files=files, sequence_length=8, train_tokens=10**12, validation_tokens=10**6, test_tokens=10**6)
    limits = dict.fromkeys(SPLITS, Limits(10**12))
    began = time.monotonic()
    tokenise(Source.of(data, folder, Stop()), load_tokenizer(words), 0, limits, folder / "tokens", Stop())
    train = Tokens(folder / "tokens" / "train")
    return {"seconds": time.monotonic() - began, "tokens": len(train.ids), "bytes": int(train.column("bytes").sum())}


def _map(rows: Path, words: Path, folder: Path, threads: bool = False) -> dict[str, float]:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words)
    began = time.monotonic()
    texts = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
    reading = time.monotonic() - began
    began = time.monotonic()
    made = texts.map(
        lambda batch: {"ids": tokenizer(batch["text"])["input_ids"]},
        batched=True,
        remove_columns=texts.column_names,
        num_proc=None if threads else len(os.sched_getaffinity(0)),
    )
    made.save_to_disk(str(folder / "made"))
    seconds = time.monotonic() - began
    return {
        "seconds": seconds,
        "reading": reading,
        "tokens": sum(map(len, made["ids"])) + len(made),
        "bytes": sum(len(text.encode()) for text in texts["text"]),
    }


def _threads(rows: Path, words: Path, folder: Path) -> dict[str, float]:
    return _map(rows, words, folder, threads=True)


def _tokenizer(rows: Path, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from utils.data.formats import items

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=50_254, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((item.text for item in islice(items(rows), 5000)), trainer)
    tokenizer.add_tokens([AddedToken(" " * length, normalized=True, special=False) for length in range(24, 1, -1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0]).save_pretrained(folder)


def _child(name: str, rows: Path, words: Path) -> None:
    """One way in a process of its own, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = globals()[CODE[name]](rows, words, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps(found | {"peak_mb": peak / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--child", choices=CODE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child, options.rows, options.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        words = options.tokenizer or Path(folder)
        if not options.tokenizer:
            _tokenizer(options.rows, words)
        for name in CODE:
            command = [sys.executable, "-m", __spec__.name, str(options.rows), "--tokenizer", str(words), "--child", name]
            threads = {"TOKENIZERS_PARALLELISM": "false" if name.endswith("process a core") else "true"}
            done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rate, reading = found["bytes"] / found["seconds"] / 1e6, found.get("reading", 0.0)
            memory = f"peak {found['peak_mb']:.0f} MB"
            print(
                f"{name:<32} {found['seconds']:7.1f} s (+ reading {reading:.1f})  {rate:6.2f} MB/s  {found['tokens']:,} tokens  {memory}",
                flush=True,
            )


if __name__ == "__main__":
    main()
