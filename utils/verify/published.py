"""The base model, its tokenizer, and a small model that goes the same way."""

from __future__ import annotations

import json
from pathlib import Path

from configs.schema import Model
from utils.data.lengths import refuse_longer
from utils.data.published import published_at, read_from
from utils.models.ffn import check_fits, feed_forward
from utils.models.loading import fetch_pretrained, without_weights
from utils.run import hub
from utils.run.checks import Finding
from utils.run.errors import InputError
from utils.run.gguf import gguf_file
from utils.run.hub import MODEL_FILES, Repository
from utils.verify.look import Look, faults

SMALL_MODEL = Repository("model", "EleutherAI/pythia-14m")
TOKENIZER_FILES = [name for name in MODEL_FILES if "safetensors" not in name]


def model_files(look: Look) -> Finding:
    """The revision holds a configuration, a tokenizer and all weights as safetensors; fetched and compared with --full."""
    repository = look.model
    if repository is None:
        if look.config.model.source == "gguf":
            path = gguf_file(look.config.model.name)
            return "ok", f"{path} is here, {path.stat().st_size / 1e9:.2f} GB"
        if look.config.model.source == "pretrained":
            return _model_folder(Path(look.config.model.name))
        return "skip", "the base model is pretrained here"
    there = look.listing(repository)
    names = there.matching(MODEL_FILES)
    weights = [name for name in names if name.endswith(".safetensors")]
    lacking = [what for what, there_is in (("config.json", "config.json" in names), ("*.safetensors", weights)) if not there_is]
    if lacking:
        return "no", f"{repository} lacks {', '.join(lacking)}; name a model that has them (weights in other formats are never read)"
    size = sum(there.files[name].size for name in names)
    words = f"{repository.name} at {there.commit[:12]}: {len(names)} files, {size / 1e9:.2f} GB"
    if look.mode == "quick":
        if missing := _missing_shards(look, repository, names):
            return "no", f"{repository} lacks {missing[0]} ({len(missing)} in all); name another revision"
        return "ok", words
    fault = faults(look, repository, there, names)
    return ("no", fault) if fault else ("ok", f"{words}, all here with the hub's hashes")


def _model_folder(folder: Path) -> Finding:
    lacking = [name for name in ("config.json", "*.safetensors") if not list(folder.glob(name))]
    return ("no", f"{folder} lacks {', '.join(lacking)}; complete it") if lacking else ("ok", f"{folder} has configuration and weights")


def _missing_shards(look: Look, repository: Repository, names: list[str]) -> list[str]:
    """Files that the index of divided weights names and the repository does not hold."""
    index = [name for name in names if name.endswith(".safetensors.index.json")]
    if not index:
        return []
    paths = hub.fetch(repository, index, look.root, look.stop).paths
    parts = {part for path in paths.values() for part in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    return sorted(parts - set(names))


def tokenizer(look: Look) -> Finding:
    """It loads, knows an end of text, and gives a text back."""
    if look.config.model.source == "scratch":
        return "skip", "the tokenizer is trained here"
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(**read_from(_small_files(look)), trust_remote_code=False)
    text = "def Monotone(x):\n    return x  # größer, 漢字"
    if words.eos_token_id is None:
        return "no", "it has no end-of-text token, which stands between documents"
    if words.decode(words(text, add_special_tokens=False)["input_ids"]) != text:
        return "no", "a text that is encoded and decoded comes out as another one"
    return "ok", f"{len(words)} entries, end-of-text is {words.eos_token_id}"


def sequences(look: Look) -> Finding:
    """The model takes the longest sequence of every stage."""
    if look.config.model.source == "scratch":
        return "skip", "the model is made for them"
    refuse_longer(_small_files(look), look.config.longest)
    return "ok", f"of up to {max(look.config.longest.values())} tokens, which the model takes"


def architecture(look: Look) -> Finding:
    """Its feed-forward sublayers are found, and the configured constraint can be put on them."""
    spec = look.config.monotone
    if look.config.model.source == "scratch":
        return "skip", "the model is made for the constraint"
    model = without_weights(_small_files(look))
    check_fits(model, spec)
    return "ok", f"{len(feed_forward(model))} feed-forward sublayers of {model.config.model_type!r}, which scope {spec.scope!r} fits"


def _small_files(look: Look) -> Path:
    """The model's folder, configuration and tokenizer fetched if need be, or its GGUF file. Raises InputError if they cannot be."""
    repository = look.model
    if repository is None:
        return published_at(look.config.model, look.folders.cache, look.stop)
    names = look.listing(repository).matching(TOKENIZER_FILES)
    if look.mode == "offline" and (fault := faults(look, repository, look.listing(repository), names)):
        raise InputError(fault)
    return next(iter(hub.fetch(repository, names, look.root, look.stop).paths.values())).parent


def small_model(look: Look) -> Finding:
    """A small published model is fetched, loaded and computes a finite loss: the way that the study's model will go."""
    import torch

    if look.mode == "offline" and not hub.is_here(SMALL_MODEL, MODEL_FILES, look.folders.cache):
        return "skip", f"{SMALL_MODEL.name} is not on this machine; it is for tests only"
    published = Model(source="pretrained", name=SMALL_MODEL.name, revision=SMALL_MODEL.revision)
    model, commit = fetch_pretrained(published, look.folders.cache, look.stop)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    if not loss < 1e4:
        return "no", f"{SMALL_MODEL.name} computes the loss {loss}"
    return "ok", f"{SMALL_MODEL.name} at {commit[:12]} loads and computes"
