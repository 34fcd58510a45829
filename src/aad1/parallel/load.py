"""Networks that never exist whole: built without memory, shared out, then read shard by shard.

Each process reads its own rows of each tensor from the files. Beyond its shards it holds one
tensor at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.checkpoints import find_part, load_wan_transformer
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanTransformer
from aad1.models.tensor_files import Source
from aad1.models.wan_shapes import wan_config
from aad1.models.weights import check_names
from aad1.parallel.mesh import Processes
from aad1.parallel.shard import distribute, local


def own_rows(tensor: torch.Tensor) -> slice:
    """Rows (of the first dimension) that this process holds of a tensor that FSDP2 has sharded."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0])
    rows, start, stop = tensor.shape[0], 0, tensor.shape[0]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            assert placement.is_shard(0), placement
            each = -(-rows // tensor.device_mesh.size(axis))
            start = min(tensor.device_mesh.get_local_rank(axis) * each, rows)
            stop = min(start + each, rows)
    return slice(start, stop)


def materialise(module: nn.Module, processes: Processes, device: torch.device) -> None:
    """Share out a network that was built on the meta device, and give it memory; not yet values."""
    assert not list(module.buffers()), "what buffers hold would be lost"
    distribute(module, processes)
    module.to_empty(device=device)


@torch.no_grad()
def fill(module: nn.Module, source: Source) -> None:
    """Read a module's weights, each process its rows. Names and shapes must have been checked;
    UserError for numbers that are not finite."""
    own = dict(module.named_parameters())
    rows = {name: own_rows(p) for name, p in own.items()}
    for name, part in source.read(rows=rows):
        if not bool(torch.isfinite(part).all()):
            raise UserError(f"{source.where}: {name} has numbers that are not finite")
        local(own[name]).copy_(part)


@torch.no_grad()
def assign(module: nn.Module, values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Keep this process's rows of values that all processes have, one tensor at a time."""
    own: Mapping[str, torch.Tensor] = dict(module.named_parameters())
    for name, value in values:
        local(own[name]).copy_(value[own_rows(own[name])])


def load_transformer(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    processes: Processes,
    *,
    trained: bool = True,
) -> WanTransformer:
    """`load_wan_transformer`, in shards where there are several processes."""
    if processes.mesh is None:
        return load_wan_transformer(path, dtype, device).requires_grad_(trained)
    source = find_part(path, "transformer")
    config = wan_config(source)
    check_names(config, source)
    with torch.device("meta"):
        model = WanTransformer(config).cast(dtype)
    materialise(model.requires_grad_(trained), processes, device)
    fill(model, source)
    return model.eval()


def load_discriminator(
    path: Path,
    config: DiscriminatorConfig,
    geometry: ChunkGeometry,
    device: torch.device,
    processes: Processes,
) -> Discriminator:
    """A discriminator on float32 weights of a transformer; its heads are drawn from torch's global
    generator, the same in one process and in several."""
    if processes.mesh is None:
        backbone = load_wan_transformer(path, torch.float32, device)
        return Discriminator(backbone, config, geometry).to(device)
    source = find_part(path, "transformer")
    shape = wan_config(source)
    check_names(shape, source)
    with torch.device("meta"):
        critic, plain = (Discriminator(WanTransformer(shape), config, geometry) for _ in range(2))
    materialise(critic, processes, device)
    fill(critic.backbone, source)
    assign(critic, plain.fresh_heads())
    return critic
