"""Sharded states (FSDP2) of finished networks: weights, gradients and moments over all processes.

Each block is gathered when it runs and let go after. Weights are sharded and gathered in the
precision they have (float32 masters; bfloat16 for frozen networks that were cast), and computed
with under autocast as in one process: so modulation and norms stay in float32. Autocast computes
the linear layers in bfloat16, so these may as well be gathered in it: half the traffic.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from aad1.models.discriminator import QueryHead
from aad1.models.dit import Block, WanTransformer
from aad1.parallel.context import share_context
from aad1.parallel.mesh import Processes


def distribute(module: nn.Module, processes: Processes) -> None:
    """Share a network out over the processes, in place; nothing happens for one process, or for a
    network that is shared out already.

    Copies must have been made before, optimisers must be made after. With `processes.gather_bf16`
    the linear layers of the blocks are gathered one by one, cast to bfloat16; gradients are summed
    over processes in float32 either way.
    """
    if processes.mesh is None or isinstance(module, FSDPModule):
        return
    if processes.context is not None:
        share_context(module, processes.context)
    # It warns of K and V, which are views: nothing here writes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    cast = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in list(module.modules()):
        if isinstance(part, Block | QueryHead) and part is not module:
            for inner in part.modules() if processes.gather_bf16 else ():
                if isinstance(inner, nn.Linear) and inner.weight.dtype == torch.float32:
                    fully_shard(inner, mesh=processes.mesh, mp_policy=cast)
            fully_shard(part, mesh=processes.mesh)
    fully_shard(module, mesh=processes.mesh)
    if isinstance(module, WanTransformer):
        for name in ("keys_values", "features"):
            register_fsdp_forward_method(module, name)


def fix_precision(module: nn.Module) -> None:
    """Have FSDP2 settle in what precision gradients are summed. It would in the first pass, and
    forget it for weights that happen not to be trained in that. (It offers no other way to ask.)"""
    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let go of gathered weights. Needed before weights are read or written: what a forward pass
    without autograd leaves gathered is a copy."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, the network stays gathered once it has run, for many passes with the same weights."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.set_reshard_after_forward(False)
    module.set_reshard_after_backward(False)
    try:
        yield
    finally:
        module.set_reshard_after_forward(True)
        module.set_reshard_after_backward(True)
        reshard([module])


def reduce_over_replicas(modules: Iterable[nn.Module], now: bool) -> None:
    """With replicas (HSDP): whether the next backward pass ends the update, so that gradients are
    summed over replicas once an update rather than once a micro-batch."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor (not a copy), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, in every process; the tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def zeros_for(tensor: torch.Tensor, *, on_cpu: bool = False) -> torch.Tensor:
    """Zeros like a tensor, sharded as it is; on_cpu: in the CPU's memory, wherever the tensor is.

    All processes must call it alike.
    """
    if not on_cpu:
        return torch.zeros_like(tensor.detach())
    # Pinned, so that copies to and from a GPU are fast and need not be waited for one by one.
    part = torch.zeros(local(tensor).shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    if not isinstance(tensor, DTensor):
        return part
    mesh, placements = _cpu_mesh(tensor.device_mesh), tensor.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@contextmanager
def on_device(
    tensors: Sequence[torch.Tensor], device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Tensors to be changed in place on a device: themselves, or copies that are taken back at the
    end. Call `synchronise` before the CPU reads what was taken back."""
    here = [t.to(device, non_blocking=True) for t in tensors]
    yield here
    for old, new in zip(tensors, here, strict=True):
        if new is not old:
            old.copy_(new, non_blocking=True)


def synchronise() -> None:
    """Wait for copies to the CPU that were begun: the CPU may read what they write only then."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@lru_cache
def _cpu_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same processes in the same layout, for tensors in the CPU's memory."""
    if mesh.device_type == "cpu":
        return mesh
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def collect(module: nn.Module, processes: Processes) -> dict[str, torch.Tensor]:
    """All weights by name, on the CPU, in the first process; nothing in the others."""
    reshard([module])
    found = {}
    for name, value in module.state_dict().items():
        put_together = whole(value.detach())  # all take part, one tensor at a time
        if processes.main:
            found[name] = put_together.cpu()
    return found
