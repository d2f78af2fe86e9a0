"""A state that is cut over processes, on disk: each writes its own parts, and any number of processes reads what it needs of them.

The files have the format of torch.distributed.checkpoint's safetensors storage: no index, and so no pickle; every file says in its header
where its parts lie in the whole tensors. The library's reader puts them together for any other cut. Its writer is not used: it forms each
file in memory as one object while it holds the interpreter, and no step is made meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this process's part begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def header(offsets: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a file of parts says of itself: {name: where the part begins}, in the words of the library's reader."""
    places = {name: {"saved_offsets": list(begin)} for name, begin in offsets.items()}
    return {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}


def assembled(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a folder of parts: cut and placed as its namesake in `like`, otherwise whole on the CPU."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        cut = isinstance(like.get(name), DTensor)
        tensors[name] = torch.empty_like(like[name]).detach() if cut else torch.empty(facts.size, dtype=facts.properties.dtype)
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # that it reads without talking to other processes, which is what is asked for
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
