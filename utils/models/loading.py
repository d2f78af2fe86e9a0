"""Models on disk and on the device: safetensors only, fp32 master weights always."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from configs.schema import Compute, Model, Scratch
from utils.data.published import read_config
from utils.models import activations, gated  # noqa: F401 - make our activations and architectures loadable by name
from utils.run.artifacts import file_digest, published
from utils.run.errors import InputError
from utils.run.gguf import gguf_file
from utils.run.hub import model_folder
from utils.run.preemption import Stop
from utils.run.trouble import first_line, of_machine

transformers_logging.disable_progress_bar()


def device_of(compute: Compute) -> torch.device:
    """The device to use; sets the number of CPU threads. Raises InputError if a GPU is asked for and none is there."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device: found no usable GPU, expected one for 'cuda'; check the driver, or set compute.device=cpu")
    return torch.device("cuda" if compute.device != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Matrix products in bf16 where asked for; parameters, norms, softmax and losses stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def product_dtype(precision: str) -> torch.dtype:
    """The format that matrix products run in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def compute_dtype(compute: Compute) -> torch.dtype:
    """The format that matrix products run in, hence the one that a certificate must hold in."""
    return product_dtype(compute.precision)


def load_model(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a model folder in fp32, ready to evaluate. Only safetensors are read, never a pickle."""
    try:
        model = _read(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises for what somebody else made
        if of_machine(error):
            raise
        raise InputError(f"{folder}: expected a model folder with config.json and safetensors weights: {error}") from None
    return model.to(device).eval()


def without_weights(source: Path) -> PreTrainedModel:
    """The architecture of the model in a folder or a GGUF file, on device `meta`. Raises InputError if it is no causal language model."""
    config = read_config(source)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the library raises for what somebody else made
        if of_machine(error):
            raise
        raise InputError(
            f"{source}: expected the configuration of a causal language model ({first_line(error)}); name another model"
        ) from None


def as_teacher(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A model to learn from: without gradients, its linear maps stored in the format that autocast would cast them to at every use."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.to(product_dtype(precision))
    return model.requires_grad_(False)


def _read(source: Path | str, **options: Any) -> PreTrainedModel:
    """from_pretrained, which alone would fill weights that the files lack with random numbers."""
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights lack {missing[0]} ({len(missing)} in all)")
    return model


def _read_gguf(path: Path) -> PreTrainedModel:
    """The weights of a GGUF file, unpacked into a plain model of its architecture."""
    from transformers import modeling_gguf_pytorch_utils as reader

    reader.tqdm = partial(tqdm, disable=None)  # its own bar would fill a log that is no terminal
    packed = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    try:
        found = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **packed
        )
    except Exception as error:
        if of_machine(error):
            raise
        raise InputError(f"{path}: expected a GGUF file of an architecture that transformers knows: {first_line(error)}") from None
    plain = AutoModelForCausalLM.from_config(type(found.config).from_dict(_unpacked(found.config)), dtype=torch.float32)
    plain.load_state_dict(found.state_dict())
    return plain.eval()


def _unpacked(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and the weights that run as safetensors, under the published names of the architecture."""
    with published(folder) as aside:
        model.save_pretrained(aside, state_dict=plain_state(model))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State of a model under its architecture's own names: a parametrised weight is replaced by its value."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            state[f"{name}.weight"] = module.weight.detach()
    return state


def scratch_model(shape: Scratch, end_of_text: int) -> PreTrainedModel:
    """An untrained GPT-NeoX model, initialised from `shape.seed` alone."""
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def fetch_pretrained(model: Model, cache: Path, stop: Stop) -> tuple[PreTrainedModel, str]:
    """A published checkpoint (hub name, local folder or GGUF file) in fp32, and the commit it resolved to ('local' for a folder, the
    file's SHA-256 for a GGUF file)."""
    if model.source == "gguf":
        path = gguf_file(model.name)
        return _read_gguf(path), f"sha256 {file_digest(path)}"
    folder, commit = model_folder(model, cache, stop)
    try:
        return _read(folder, local_files_only=True).eval(), commit
    except Exception as error:
        if of_machine(error):
            raise
        raise InputError(
            f"model.name={model.name!r}, revision {model.revision!r}: cannot be loaded as a causal LM with safetensors weights: "
            f"{first_line(error)}. Name another model, or give a local folder"
        ) from None
