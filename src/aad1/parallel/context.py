"""Context parallelism (Ulysses) around a finished transformer: a clip's tokens over a group.

Each process holds an equal part of every frame's tokens. Around self-attention an all-to-all
exchange turns that into all tokens of its share of the heads, and back. K and V stay sharded by
heads, cached ones too, so what is cached is never sent again. Everything that goes by frame
(plans, noise levels, prompts) stays as it is.

Gradients: the loss that is minimised is the *mean over processes* of their losses, and each
operation here has its true adjoint under that reading. Processes of a group compute the same loss
from gathered outputs, so the mean that sharded states take of their gradients (`shard.py`) is right
without a factor for cp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aad1.core.kv_cache import KV
from aad1.errors import UserError
from aad1.models.discriminator import QueryHead
from aad1.models.dit import Attention, Block, WanTransformer

TOKENS, HEADS = -3, -2
"""Dimensions of q, k and v, [..., tokens, heads, head_dim]."""


def _swap(x: torch.Tensor, group: dist.ProcessGroup, split: int, join: int) -> torch.Tensor:
    """Part r of dimension `split` goes to process r; what comes is joined along `join`."""
    parts = torch.stack(x.chunk(group.size(), split))
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return torch.cat(out.unbind(0), join)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, split: int, join: int) -> torch.Tensor:
        ctx.rest = (group, join, split)
        return _swap(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _swap(grads[0], *ctx.rest), None, None, None


class _Gather(torch.autograd.Function):
    """All parts along a dimension; its adjoint sums what every process asks of one's own part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
        ctx.rest = (group, dim)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        group, dim = ctx.rest
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.chunk(group.size(), dim)[group.rank()].contiguous(), None, None


class _Common(torch.autograd.Function):
    """An input that all processes of the group have: its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total / ctx.group.size(), None


class _Heads:
    """Self-attention's projections with the exchange around them."""

    def __init__(self, attention: Attention, group: dist.ProcessGroup) -> None:
        self.attention, self.group = attention, group

    def key_value(self, x: torch.Tensor) -> KV:
        k, v = Attention.key_value(self.attention, x)
        both: torch.Tensor = _Exchange.apply(torch.stack([k, v]), self.group, HEADS, TOKENS)
        k, v = both.unbind(0)
        return k, v

    def query(self, x: torch.Tensor) -> torch.Tensor:
        q = Attention.query(self.attention, x)
        return _Exchange.apply(q, self.group, HEADS, TOKENS)

    def out(self, x: torch.Tensor) -> torch.Tensor:
        x = _Exchange.apply(x, self.group, TOKENS, HEADS)
        return Attention.out(self.attention, x)


class _HeadsOfOneQuery(_Heads):
    """The same for a query that every process has: each takes its share of the heads."""

    def query(self, x: torch.Tensor) -> torch.Tensor:
        q = Attention.query(self.attention, x)
        return q.chunk(self.group.size(), HEADS)[self.group.rank()]

    def out(self, x: torch.Tensor) -> torch.Tensor:
        x = _Gather.apply(x, self.group, HEADS)
        return Attention.out(self.attention, x)


class _Tokens:
    """The way in and out of a transformer: own tokens after the embedding, all at the end."""

    def __init__(self, model: WanTransformer, group: dist.ProcessGroup) -> None:
        self.model, self.group = model, group

    def embed(self, latents: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> Any:
        if latents.requires_grad:
            latents = _Common.apply(latents, self.group)
        x, e, e0, context, grid = WanTransformer._embed(self.model, latents, sigma, text)
        count, size = x.shape[2], self.group.size()
        if count % size:
            raise UserError(f"cp={size} does not divide the {count} tokens of a latent frame")
        return x.chunk(size, 2)[self.group.rank()].contiguous(), e, e0, context, grid

    def head(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return _Gather.apply(WanTransformer._head(self.model, x, e), self.group, 2)


def share_context(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Have every transformer and query head within share its tokens over the group, in place.

    Call it after copies were made: a deep copy would still use the first one's weights. Networks
    that pass tokens or K and V to one another must share the same group.
    """
    for part in module.modules():
        if isinstance(part, WanTransformer):
            tokens = _Tokens(part, group)
            part._embed = tokens.embed  # type: ignore[method-assign]
            part._head = tokens.head  # type: ignore[method-assign]
        elif isinstance(part, Block):
            _wrap(part.attn1, _Heads(part.attn1, group))
        elif isinstance(part, QueryHead):
            _wrap(part.attention, _HeadsOfOneQuery(part.attention, group))


def _wrap(attention: Attention, heads: _Heads) -> None:
    attention.key_value = heads.key_value  # type: ignore[method-assign]
    attention.query = heads.query  # type: ignore[method-assign]
    attention.out = heads.out  # type: ignore[method-assign, assignment]
