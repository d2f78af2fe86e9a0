"""Write named tensors as one safetensors file and know its checksum at once, without reading 11 GB back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 24  # bytes written and hashed at a time; both release the interpreter, so that training goes on
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, told: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write CPU tensors to `path` in the safetensors format, `told` in its header; returns its {sha256, bytes} as `inventory` would."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # wide elements first keeps all aligned
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as handle:
        for part in (_header(ordered, told or {}), *(_bytes(tensor) for _, tensor in ordered)):
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK]
                handle.write(block)
                digest.update(block)
            size += len(part)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _header(ordered: list[tuple[str, Tensor]], told: Mapping[str, str]) -> memoryview:
    """8 bytes with the length of the JSON text, and the text, padded so that the data begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **told}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
