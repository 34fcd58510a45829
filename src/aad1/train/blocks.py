"""Transformer blocks run otherwise than they are written: again in the backward pass, compiled,
with another library's attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from aad1.models.dit import Block


def checkpoint_blocks(module: nn.Module) -> None:
    """Have the transformer blocks inside run again in the backward pass (see the config's field).

    What a block is given, cached K and V included, is never written to, so the second run is the
    same. Call it last: a deep copy of the module would still run the first one's blocks.
    """
    for block in module.modules():
        if isinstance(block, Block):
            block.forward = _Checkpointed(block)  # type: ignore[method-assign, assignment]


class _Checkpointed:
    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return Block.forward(self.block, *args)
        return activation_checkpoint(
            Block.forward, self.block, *args, use_reentrant=False, preserve_rng_state=False
        )


_PLAIN = Block.forward


@lru_cache(maxsize=1)
def compile_blocks() -> None:
    """Compile the transformer block for this process, once for all networks that use it.

    Every combination of shapes, plan of attention and gradients is compiled for itself, which
    takes seconds each: what is small or rare is left plain (see also `uncompiled`).
    """
    torch._dynamo.config.recompile_limit = 64
    fast = torch.compile(_PLAIN, dynamic=False)

    def forward(self: Block, *args: Any) -> Any:
        keys_only = len(args) > 5 and args[5]
        image = args[0].shape[1] == 1 and args[3] is None  # a lone frame over no others
        return (_PLAIN if keys_only or image else fast)(self, *args)

    Block.forward = forward  # type: ignore[method-assign, assignment]


def plain_blocks() -> None:
    """Undo `compile_blocks`: for programs that train one network after another."""
    Block.forward = _PLAIN  # type: ignore[method-assign]
    compile_blocks.cache_clear()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Blocks run as they are written, for passes too few to pay for being compiled."""
    current = Block.forward
    Block.forward = _PLAIN  # type: ignore[method-assign]
    try:
        yield
    finally:
        Block.forward = current  # type: ignore[method-assign]


@contextmanager
def attention_by(*, cudnn: bool) -> Iterator[None]:
    """Within, forward passes (and what of them runs again in a backward pass) take cuDNN's
    attention where it can be had, if asked for; else what torch prefers."""
    if not cudnn:
        yield
        return
    with sdpa_kernel(BACKENDS, set_priority=True):
        yield


BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
