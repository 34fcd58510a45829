"""Jobs about size: networks read into shards, states on the CPU, and 64 processes that are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor

from aad1.core.chunks import ChunkGeometry
from aad1.models.checkpoints import load_wan_transformer
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanTransformer
from aad1.parallel import load, mesh
from aad1.parallel.shard import distribute, local, whole
from aad1.presets import preset
from aad1.rollout.stream import Rollout
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner, SampleNoise
from aad1.train.adam import AdamW
from aad1.train.averages import Averages
from aad1.train.blocks import checkpoint_blocks
from aad1.train.config import OptimConfig, WanData
from aad1.train.plan import Cluster, describe, plan

CPU = torch.device("cpu")
GEOMETRY = ChunkGeometry(chunk=2, sink=1, window=5)
JUDGE = DiscriminatorConfig(taps=(0, 1))


def anonymous() -> int:
    """Bytes of this process's own memory; files that it has mapped do not count."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x]
    return 1024 * int(line.split()[1])


def height(call: Callable[[], Any]) -> tuple[Any, int]:
    """What the call returns, and by how many bytes this process grew at most meanwhile."""
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous() - before)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return call(), max(most, anonymous() - before)
    finally:
        done.set()
        watcher.join()


def loaded(processes: mesh.Processes, path: str) -> Any:
    """A transformer and a discriminator loaded whole and in shards: (equal?, bytes) of each."""
    where, found = Path(path), {}
    model, grew = height(lambda: load_wan_transformer(where, torch.float32))
    size = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    found["whole"] = True, grew, size, largest
    for name, dtype, trained in (("fp32", torch.float32, True), ("bf16", torch.bfloat16, False)):
        shards, grew = height(
            lambda d=dtype, t=trained: load.load_transformer(where, d, CPU, processes, trained=t)  # type: ignore[misc]
        )
        want = load_wan_transformer(where, dtype)
        assert all(p.requires_grad == trained for p in shards.parameters())
        found[name] = same(shards, want), grew, *sizes(shards)
    torch.manual_seed(3)
    want = Discriminator(load_wan_transformer(where), JUDGE, GEOMETRY)
    after = torch.rand(1)
    torch.manual_seed(3)
    critic, grew = height(lambda: load.load_discriminator(where, JUDGE, GEOMETRY, CPU, processes))
    assert torch.equal(torch.rand(1), after)  # as many numbers were drawn
    found["discriminator"] = same(critic, want), grew, *sizes(critic)
    return found


def same(shards: nn.Module, want: nn.Module) -> bool:
    """Whether all weights are equal and sharded as FSDP2 shares out a tensor that it is given."""
    own, other = dict(shards.named_parameters()), dict(want.named_parameters())
    assert own.keys() == other.keys()
    equal = []
    for name, p in own.items():
        told = distribute_tensor(other[name].detach(), p.device_mesh, p.placements)  # type: ignore[attr-defined]
        equal.append(torch.equal(local(p), local(told)) and p.dtype == other[name].dtype)
        equal.append(torch.equal(whole(p), other[name]))
    return all(equal)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Bytes of this process's shards, and of the largest tensor."""
    mine = sum(local(p).nbytes for p in module.parameters())
    return mine, max(p.numel() * 4 for p in module.parameters())


def pretend(rank: int, size: int, text: str) -> mesh.Processes:
    """Process `rank` of `size` that are not there: what it sends goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    return mesh.arrange(mesh.MeshShape.parse(text, size), CPU)


def rows(processes: mesh.Processes, meshes: list[str]) -> Any:
    """Of tensors of 1 to 13 rows: those this process says it has, torch's answer, and a count."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    found = []
    for text in meshes:
        where = mesh.arrange(mesh.MeshShape.parse(text, processes.size), CPU)
        for count in range(1, 14):
            with torch.device("meta"):
                layer = nn.Linear(3, count)
            distribute(layer, where)
            p: Any = layer.weight
            shape, start = compute_local_shape_and_global_offset(
                p.shape, p.device_mesh, p.placements
            )
            mine = load.own_rows(p)
            found.append((mine.start, mine.stop, start[0], start[0] + shape[0], local(p).shape[0]))
    return found


def dry(processes: mesh.Processes, size: int) -> Any:
    """Bytes of every role of the full Wan runs in the first and the last of `size` processes, and
    what the dry run says of them."""
    found = []
    for name, text in (("wan1.3b-dmd", "cp=4"), ("wan1.3b-aad", "cp=4"), ("wan14b-dmd", "cp=8"),
                       ("wan14b-aad", "cp=8")):  # fmt: skip
        e = replace(preset(name), mesh=text, teacher=None, init=None)
        p, said = plan(e, Cluster(gpus=size)), describe(e, Cluster(gpus=size))
        told = {role.name: role for role in p.roles}
        for rank in (0, size - 1) if name == "wan14b-aad" else (0,):
            where = pretend(rank, size, text)
            found.append((name, rank, held(e, where), told, p.shards, said))
            dist.destroy_process_group()
    return found


def held(e: Any, where: mesh.Processes) -> dict[str, dict[str, int]]:
    """Bytes by role and kind in this process, of networks on the meta device."""
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"generator": WanTransformer(e.model)}
        if e.name.endswith("dmd"):
            networks["real score"] = WanTransformer(e.model).cast(torch.bfloat16)
            networks["real score"].requires_grad_(False)
            networks["fake score"] = WanTransformer(e.model)
        else:
            networks["discriminator"] = Discriminator(
                WanTransformer(e.model), e.discriminator, e.geometry
            )
    for network in networks.values():
        distribute(network, where)
    optim: OptimConfig = e.optim
    found: dict[str, dict[str, int]] = {}
    for name, network in networks.items():
        parts = {name: list(network.parameters())}
        if isinstance(network, Discriminator):
            parts = {name: list(network.backbone.parameters()), "its heads":
                     network.head_parameters()}  # fmt: skip
        for role, parameters in parts.items():
            own = found[role] = {"weights": sum(local(p).nbytes for p in parameters)}
            if name != "real score":
                optimizer = AdamW(parameters, 1.0, optim.critic_betas)
                own["adam"] = sum(local(optimizer.blank(p)).nbytes for p in parameters)
    averages = Averages({"generator": networks["generator"]}, 0.9).tensors["generator"]
    found["generator"]["average"] = sum(local(p).nbytes for p in averages.values())
    return found


def step(processes: mesh.Processes, size: int) -> Any:
    """Gradients' bytes of both steps of stage III at 14B's width, with two layers, in one of
    `size` processes, on tensors without storage; and what the dry run says of them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    e = preset("wan14b-aad")
    e = replace(e, mesh="cp=8", teacher=None, init=None, model=replace(e.model, num_layers=2),
                discriminator=DiscriminatorConfig(taps=(0,)))  # fmt: skip
    assert isinstance(e.stage, AdversarialConfig) and isinstance(e.data, WanData)
    e = replace(e, data=replace(e.data, frames=9))
    where = pretend(5, size, e.mesh)
    with FakeTensorMode(allow_non_fake_inputs=True):
        generator = WanTransformer(e.model)
        critic = Discriminator(WanTransformer(e.model), e.discriminator, e.geometry)
        for network in (generator, critic):
            distribute(network, where)
            checkpoint_blocks(network)
        rows = torch.randn(1, e.text_length, e.model.text_dim)
        text = Conditioner(lambda prompts: rows.expand(len(prompts), -1, -1), e.geometry)
        rollout = Rollout(generator, e.geometry, e.sigmas)
        stage = Adversarial(rollout, critic, text, e.stage.settled(e.checkpoint_blocks))
        batch = Batch(torch.randn(1, 16, 9, 60, 104), [["a prompt"]])
        found = {}
        for role in ("critic", "generator"):
            generator.requires_grad_(role == "generator")
            critic.requires_grad_(role == "critic")
            noise = SampleNoise([1], 2)
            if role == "critic":
                for loss, _ in stage.critic_parts(batch, noise):
                    loss.backward()
            else:
                stage.generator_loss(batch, noise)[0].backward()
            network = critic if role == "critic" else generator
            got = [p.grad for p in network.parameters() if p.grad is not None]
            found[role] = sum(local(g).nbytes for g in got)
    _, *others = plan(e, Cluster(gpus=size)).roles
    told = {"generator": plan(e, Cluster(gpus=size)).roles[0].gradients,
            "critic": sum(role.gradients for role in others)}  # fmt: skip
    return found, told


JOBS = {"loaded": loaded, "rows": rows, "dry": dry, "step": step}
