"""The processes of a run: who they are, what they share out, and how they agree.

torchrun starts them; one process by itself needs no process group. Ranks that follow one another
share a clip (context parallel, `cp`); groups of them take different samples (data parallel, `dp`).
States are sharded over all processes, or within each of `replicas` groups (HSDP).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from aad1.errors import UserError

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process; one that died is noticed by torchrun long before."""


class SharedError(UserError):
    """A user's mistake that all processes know of, so that one of them reports it."""

    shared = True


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How processes are laid out: dp groups of cp processes; replicas of the sharded states."""

    dp: int = 1
    cp: int = 1
    replicas: int = 1

    @classmethod
    def parse(cls, text: str, size: int) -> MeshShape:
        """`dp=4,cp=2` or `dp=4,cp=2,replicas=2`; what is left out of dp and cp is found.

        UserError unless dp x cp is `size`, the number of processes, and replicas divides it.
        """
        found: dict[str, int] = {}
        for item in filter(None, text.replace(" ", "").split(",")):
            name, _, value = item.partition("=")
            if name not in ("dp", "cp", "replicas") or name in found or not value.isdigit():
                raise UserError(
                    f"--mesh must be like dp=4,cp=2 or dp=4,cp=2,replicas=2, got {text!r}"
                )
            found[name] = int(value)
        dp, cp = found.get("dp"), found.get("cp")
        if cp is None:
            cp = max(1, size // dp) if dp else 1
        if dp is None:
            dp = max(1, size // cp) if cp else 1
        replicas = found.get("replicas", 1)
        if dp * cp != size:
            raise UserError(
                f"--mesh dp={dp},cp={cp} needs {dp * cp} processes, there are {size} "
                "(torchrun --nproc-per-node)"
            )
        if replicas < 1 or size % replicas:
            raise UserError(f"--mesh replicas={replicas} does not divide {size} processes")
        return cls(dp=dp, cp=cp, replicas=replicas)


@dataclass(frozen=True)
class Processes:
    """All processes of a run as one of them sees them; the default is one alone.

    mesh: over which states are sharded (None: not at all); context: the group that shares a clip.
    gather_bf16: exchange the blocks' matrices in bfloat16 (`shard.distribute`).
    """

    rank: int = 0
    size: int = 1
    shape: MeshShape = MeshShape()
    mesh: DeviceMesh | None = None
    context: dist.ProcessGroup | None = None
    gather_bf16: bool = False

    @property
    def main(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.rank // self.shape.cp

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over processes; not a number anywhere gives not a number everywhere."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A user's mistake within, in any process, is raised in all: `SharedError`.

        The block must not talk to other processes.
        """
        problem = None
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            problem = str(error)
        for found in self.gather(problem):
            if found:
                raise SharedError(found)


def local_device(name: str) -> torch.device:
    """The device of this process: of several GPUs the one that torchrun numbered."""
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def start(mesh: str, device: torch.device, timeout: timedelta = TIMEOUT) -> Processes:
    """Join the processes that torchrun started, laid out as `mesh` says (see `MeshShape.parse`).

    UserError, the same in all of them, if the layout cannot be.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Processes(shape=MeshShape.parse(mesh, 1))
    if not dist.is_initialized():  # all join before any of them may refuse
        backend = "gloo"
        if device.type == "cuda" and device.index < torch.cuda.device_count():
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout)
        _joined.append(True)
    known = Processes(dist.get_rank(), size)
    with known.together():
        shape = MeshShape.parse(mesh, size)
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {device.index} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()} (torchrun --nproc-per-node)"
            )
    return arrange(shape, device)


def arrange(shape: MeshShape, device: torch.device) -> Processes:
    """The processes that have joined, laid out in this shape."""
    kind, n, size = device.type, shape.replicas, dist.get_world_size()
    if n == 1:
        states = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    else:
        states = init_device_mesh(kind, (n, size // n), mesh_dim_names=("replica", "shard"))
    context = None
    if shape.cp > 1:
        layout = init_device_mesh(kind, (shape.dp, shape.cp), mesh_dim_names=("dp", "cp"))
        context = layout.get_group("cp")
    return Processes(dist.get_rank(), size, shape, states, context)


def leave() -> None:
    """Leave the processes that `start` joined, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()


_joined: list[bool] = []


def end(code: int, together: bool = False) -> None:
    """End this process with `code` if it had joined others; else nothing happens.

    An interpreter that takes groups of processes down on its way out aborts now and then, which
    would look like a failed run. So all output is flushed, and it does not get that far. together:
    all processes end here; they wait for one another, so that torchrun, which ends the others when
    one has failed, sees the code of each.
    """
    if not _joined:
        return
    if together and dist.is_initialized():
        dist.all_reduce(torch.zeros(()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    signs = ("closed by peer", "Connection reset", "Broken pipe", "remote process exited")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def check_heads(cp: int, heads: dict[str, int]) -> None:
    """UserError, with the list of what is possible, unless cp divides every network's heads."""
    if any(count % cp for count in heads.values()):
        every = range(1, min(heads.values()) + 1)
        fit = [n for n in every if not any(count % n for count in heads.values())]
        named = ", ".join(f"{name} {count}" for name, count in heads.items())
        raise UserError(
            f"cp={cp} must divide the heads of every network ({named}): {', '.join(map(str, fit))}"
        )


def share(total: int, most: int, dp: int) -> tuple[int, int]:
    """(samples, samples at a time) of one data-parallel group.

    total: samples of an update; most: at a time. UserError unless dp divides them.
    """
    if total % dp:
        raise UserError(
            f"dp={dp} does not divide the batch of {total} (optim.batch x optim.accumulate)"
        )
    own = total // dp
    return own, max(n for n in range(1, min(most, own) + 1) if own % n == 0)


def split_evenly(count: int, parts: int, part: int) -> Sequence[int]:
    """Numbers of a list of `count` that one of `parts` takes; all take equally many.

    Where they do not come out even, the last numbers are taken more than once.
    """
    each = -(-count // parts)
    return [min(part * each + i, count - 1) for i in range(each)]
