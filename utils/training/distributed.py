"""Several processes, one a GPU, that make the same steps together: who is who, what they share, and how a model lies on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from utils.run.errors import StoppedInTime
from utils.run.launch import place


@dataclass(frozen=True)
class World:
    """This process among `size` of them. One process alone needs no communication, and has none."""

    rank: int = 0
    size: int = 1
    parallel: str = "none"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.rank == 0

    @property
    def cut(self) -> bool:
        """Whether parameters and moments are cut over the processes."""
        return self.parallel == "fsdp2" and self.size > 1

    def own(self, count: int) -> slice:
        """This process's share of `count` sequences, which the number of processes divides."""
        assert count % self.size == 0, (count, self.size)
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, values: Tensor) -> Tensor:
        """Add the tensors of all processes, in place, on their device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of the processes."""
        return bool(self.largest(float(flag)))

    def largest(self, value: float) -> float:
        """The largest value of a process. The hosts talk; the devices go on."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return float(box[0])

    def told(self, value: Any) -> Any:
        """The first process's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = World()


@contextmanager
def joined(parallel: str) -> Iterator[World]:
    """Meet the other processes at MASTER_ADDR:MASTER_PORT, and leave them at the end.

    On a GPU one leaves together or not at all: NCCL waits for the others, and they for this process. One that has failed must just end.
    """
    rank, size, local = place()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=size)
    together = not cuda
    try:
        yield World(rank, size, parallel)
        together = True
    except StoppedInTime:
        together = True
        raise
    finally:
        if together:
            dist.destroy_process_group()


def spread_out(module: nn.Module, blocks: list[nn.Module], world: World, precision: str) -> nn.Module:
    """The module as all processes run it together. It is called as before; its gradients are means over the processes.

    ddp: a whole copy in each. fsdp2: parameters, gradients and moments are cut along their first dimension, block by block; blocks are
    gathered in bf16 if products run in bf16 (in fp32 on a CPU, whose norms need that, and with a parametrisation, whose V would lose W's
    precision), gradients summed in fp32.
    """
    if world.parallel == "ddp":
        constant = [name for name, _ in module.named_buffers()]  # the same everywhere, and never written
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constant)
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    if world.parallel == "fsdp2":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (world.size,))
        for block in blocks:
            exact = precision == "fp32" or device == "cpu" or any(parametrize.is_parametrized(part) for part in block.modules())
            policy = MixedPrecisionPolicy(None if exact else torch.bfloat16, torch.float32, cast_forward_inputs=False)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False))
    return module


def last_micro_batch(module: nn.Module, last: bool) -> None:
    """With ddp gradients are exchanged in the backward pass of a step's last micro-batch alone. With fsdp2 in each: until they are
    exchanged they are whole, in fp32, on every device, which is the memory that one has cut the model to save."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut over the processes; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut as `like` is; one that is cut already stays."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def total_norm(gradients: list[Tensor], world: World) -> Tensor:
    """Norm of all gradients together, the same number in every process."""
    norm = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients], foreach=True)
    return world.sum(norm.square()).sqrt() if world.parallel == "fsdp2" else norm
