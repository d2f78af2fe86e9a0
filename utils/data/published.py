"""A published model before it is loaded: where it is, what identifies it, what its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import Model
from utils.run.errors import InputError
from utils.run.gguf import gguf_file
from utils.run.hub import model_folder
from utils.run.preemption import Stop
from utils.run.trouble import first_line, of_machine

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def published_at(model: Model, cache: Path, stop: Stop) -> Path:
    """The folder of a published model, fetched if need be, or its GGUF file."""
    return gguf_file(model.name) if model.source == "gguf" else model_folder(model, cache, stop)[0]


def read_from(source: Path) -> dict[str, Any]:
    """What `from_pretrained` is told to read a folder or a GGUF file as it is."""
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name} if source.is_file() else {}
    return {"pretrained_model_name_or_path": source, "local_files_only": True} | place


def read_config(source: Path) -> PretrainedConfig:
    """The configuration of the model in a folder or a GGUF file. Raises InputError if transformers does not know it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**read_from(source), trust_remote_code=False)
    except Exception as error:  # whatever the library raises for what somebody else made
        if of_machine(error):
            raise
        raise InputError(
            f"{source}: expected a model whose configuration transformers knows ({first_line(error)}); name another model"
        ) from None


def published_identity(model: Model) -> dict[str, Any]:
    """What identifies a published model, for the cache: name and revision, and for a local folder or file what is there."""
    folder = Path(model.name)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    files = [gguf_file(model.name)] if model.source == "gguf" else files
    local = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {"name": model.name, "revision": model.revision, "files": local}
