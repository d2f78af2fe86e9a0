"""The byte-level BPE tokenizer, trained at setup or the pretrained model's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.schema import Model
from utils.data.encode import parts
from utils.data.published import read_from
from utils.run.errors import InputError
from utils.run.trouble import first_line, of_machine

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) of exactly `vocabulary` entries if the text gives as many; end-of-text is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((part for text in texts for part in parts(text)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that plain transformers loads."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
    wrapped.save_pretrained(folder)


def copy_tokenizer(model: Model, source: Path, folder: Path) -> int:
    """Save the tokenizer of a published model, which is at `source`, to `folder`; returns the id of its end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**read_from(source), trust_remote_code=False)
    except Exception as error:  # whatever the library raises for a file that somebody else made
        if of_machine(error):
            raise
        raise InputError(
            f"model.name={model.name!r}, revision {model.revision!r}: no tokenizer found ({first_line(error)}); name a model that has one"
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model.name={model.name!r}: its tokenizer has no end-of-text token, expected one between documents; name another model"
        )
    tokenizer.save_pretrained(folder)
    return tokenizer.eos_token_id


def load_tokenizer(folder: Path) -> Tokenizer:
    """The stored tokenizer; the text "<|endoftext|>" inside a document is encoded as text, not as the end of it."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more particular
        if of_machine(error):
            raise
        raise InputError(f"{path}: expected a tokenizer of the tokenizers library ({error}); name a model that has one") from None
    tokenizer.encode_special_tokens = True
    return tokenizer
