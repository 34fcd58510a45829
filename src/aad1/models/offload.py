"""A transformer whose blocks stay in host memory and visit the device two at a time.

14B weights in bfloat16 take 27 GiB; its blocks are used one after the other, each for longer than
the bus takes to bring the next. So each block's weights lie in one page-locked buffer, and while
the device computes with block i, a second stream copies block i + 1 into the place of i - 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aad1.errors import UserError
from aad1.models.dit import Block, WanTransformer

ALIGNMENT = 256


class _Layout:
    """Where a block's parameters lie in one buffer of bytes."""

    def __init__(self, block: nn.Module) -> None:
        self.parts: list[tuple[int, torch.dtype, torch.Size]] = []
        self.size = 0
        for p in block.parameters():
            self.parts.append((self.size, p.dtype, p.shape))
            self.size += -(-p.nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in a buffer [size] of uint8."""
        return [
            buffer[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, dtype, shape in self.parts
        ]


class _Slot:
    """Room for one block on the device."""

    def __init__(self, layout: _Layout, device: torch.device) -> None:
        self.buffer = torch.empty(layout.size, dtype=torch.uint8, device=device)
        self.views = layout.views(self.buffer)
        self.block: int | None = None
        """Number of the block in it, or on its way into it."""


class StreamedBlocks(nn.ModuleList):
    """The blocks of a transformer, each on `device` while it is handed out and not much longer.

    Asked for a block (by number, slice or iteration), it brings this one, and begins to bring the
    next. A block that is handed out must be done with (its work queued) before the next is asked
    for; passes of `WanTransformer` do so. Not for training.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        super().__init__(blocks)
        own: list[Any] = list(blocks)
        self._layout = _Layout(own[0])
        if any(_Layout(block).parts != self._layout.parts for block in own):
            raise ValueError("the blocks must be alike")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._host: list[torch.Tensor] = []
        if self._copies is not None:
            # It holds the buffers, so that they outlive their lock.
            weakref.finalize(self, _unlock, self._host)
        for block in own:
            buffer = torch.empty(self._layout.size, dtype=torch.uint8)
            for p, view in zip(block.parameters(), self._layout.views(buffer), strict=True):
                view.copy_(p.detach())
                p.requires_grad_(False)
                p.data = view
            if self._copies is not None:
                _lock(buffer)
            self._host.append(buffer)
        self._slots = [_Slot(self._layout, device) for _ in range(2)]

    @property
    def resident(self) -> list[int]:
        """Numbers of the blocks that have room on the device now: two at most."""
        return [slot.block for slot in self._slots if slot.block is not None]

    def __iter__(self) -> Iterator[Any]:
        return self._each(range(len(self)))

    def __getitem__(self, index: int | slice) -> Any:
        numbers = range(len(self))[index]
        return self._enter(numbers) if isinstance(numbers, int) else self._each(numbers)

    def _each(self, numbers: range) -> Iterator[Any]:
        for number in numbers:
            yield self._enter(number)

    def _enter(self, number: int) -> Block:
        """The block of that number, on the device."""
        if self._slots[0].block != number:
            self._slots.reverse()
        here, other = self._slots
        if here.block != number:
            self._bring(number, here)
        if self._copies is not None:
            torch.cuda.current_stream(here.buffer.device).wait_stream(self._copies)
        block = self._place(number, here.views)
        following = (number + 1) % len(self)
        if following not in (here.block, other.block):
            self._bring(following, other)
        return block

    def _bring(self, number: int, slot: _Slot) -> None:
        """Copy a block into `slot`, behind all work that is queued on what was there."""
        if slot.block is not None:
            self._place(slot.block, self._layout.views(self._host[slot.block]))
        slot.block = number
        if self._copies is None:
            slot.buffer.copy_(self._host[number])
            return
        self._copies.wait_stream(torch.cuda.current_stream(slot.buffer.device))
        with torch.cuda.stream(self._copies):
            slot.buffer.copy_(self._host[number], non_blocking=True)

    def _place(self, number: int, views: list[torch.Tensor]) -> Block:
        block = self._modules[str(number)]
        assert isinstance(block, Block)
        for p, view in zip(block.parameters(), views, strict=True):
            p.data = view
        return block


def offload_blocks(model: WanTransformer, device: torch.device) -> WanTransformer:
    """Put a transformer on `device` but for its blocks, which stay in host memory; returns it.

    model: on the CPU, in the precision to compute in. On a CPU device the same is done without
    locked memory and streams, which is of use to tests alone.

    UserError if the host does not lock that much memory.
    """
    blocks = model.blocks
    model.blocks = nn.ModuleList()
    model.to(device)
    model.blocks = StreamedBlocks(blocks, device)
    return model


def _lock(buffer: torch.Tensor) -> None:
    """Page-lock memory as it is: PyTorch's own pinned memory is rounded up to powers of two."""
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if int(error) != 0:
        raise UserError(
            f"--offload: the host locked no further {buffer.nbytes / 2**20:.0f} MiB of memory "
            f"(CUDA error {int(error)}); it needs as much free memory as the transformer has"
        )


def _unlock(buffers: list[torch.Tensor]) -> None:
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
