"""A small split is written and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.data.tokenizer import load_tokenizer, save_tokenizer
from utils.data.tokens import PackedBatches, Tokens
from utils.run.artifacts import damage, files_below, inventory
from utils.run.checks import Finding
from utils.verify.sample import sample_texts, sample_tokenizer, write_tokens

LENGTH, SIZE = 16, 4


def tokens(folder: Path) -> Finding:
    """Texts survive the tokenizer, documents survive the disk, one flipped bit is noticed, and batch t depends on t alone."""
    save_tokenizer(sample_tokenizer(), folder / "tokenizer")
    tokenizer, texts = load_tokenizer(folder / "tokenizer"), sample_texts(20, seed=1)
    written = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if [tokenizer.decode(ids, skip_special_tokens=False) for ids in written] != texts:
        return "no", "a text that is encoded and decoded comes out as another one"
    split = write_tokens(folder / "split", texts, tokenizer)
    if [ids.tolist() for ids in split.documents()] != written:
        return "no", f"{split.folder}: documents read back differ from those written"
    if fault := _blind_checksum(split.folder) or _impure_batch(split):
        return "no", fault
    return "ok", f"{len(split.ids)} tokens of {len(texts)} documents read back; checksums and batches hold"


def _blind_checksum(folder: Path) -> str | None:
    """Nothing is wrong with the split as written, and one changed bit of it is found."""
    facts = inventory(folder)
    if fault := damage(folder, facts):
        return fault
    victim = max(files_below(folder), key=lambda file: file.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    found = damage(folder, facts)
    victim.write_bytes(content)
    return None if found else f"{victim}: a changed bit is not noticed by its checksum"


def _impure_batch(split: Tokens) -> str | None:
    steps = (0, 7, 3, 90, 3)  # 90 lies in a later epoch
    one = PackedBatches(split, LENGTH, seed=5)
    for step in steps:
        if not np.array_equal(one.batch(step, SIZE), PackedBatches(split, LENGTH, seed=5).batch(step, SIZE)):
            return f"batch {step} depends on what was asked for before it"
    return None
