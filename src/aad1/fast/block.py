"""A block of the transformer for generation, as two functions around its attention call.

They see the chunk only, never the cache: they are compiled once for all layers, and not again when
the cache fills. Attention stays outside, so its backend is chosen at run time.

Shape letters: B batch, F latent frames, L tokens per frame, N heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aad1.core.kv_cache import KV
from aad1.fast.layers import Layer
from aad1.fast.ops import (
    Linear,
    Rows,
    Table,
    add_norm,
    gated_add,
    linear,
    linear_gelu,
    norm_rope,
    rms,
)
from aad1.models.dit import attend


class Modulation(NamedTuple):
    """What a noise level does to one block, float32 [1, F or 1, 1, D] each."""

    shift1: torch.Tensor
    scale1: torch.Tensor
    gate1: torch.Tensor
    shift2: torch.Tensor
    scale2: torch.Tensor
    gate2: torch.Tensor


class Tables(NamedTuple):
    """How K is rotated: for this pass, for the one that reads it later, and not at all in time.

    store, raw: None where no chunk of the pass needs them.
    """

    own: Table
    store: Table | None
    raw: Table | None


class Fixed(NamedTuple):
    """What every layer shares and no pass changes."""

    heads: int
    eps: float
    kernels: bool


def before_attention(
    x: torch.Tensor,
    layer: Layer,
    shift: torch.Tensor,
    scale: torch.Tensor,
    tables: Tables,
    slots: KV | None,
    fixed: Fixed,
) -> tuple[torch.Tensor | None, ...]:
    """x [B, F, L, D] -> q and K rotated by tables.own, V, K by tables.store, K by tables.raw.

    Each [B, F, L, N, D / N], None for what is not asked for.
    slots: where K and V are written, if they have one place; both are None in the result then.
    """
    h = _normed(x, layer.qkv, scale, shift, fixed)
    q, k, v = linear(h, layer.qkv, fixed.kernels, x.dtype).chunk(3, -1)
    (queries,) = _rotated(q, layer.norm_q, (tables.own,), (None,), fixed)
    own, store, raw = _rotated(k, layer.norm_k, tables, (slots and slots[0], None, None), fixed)
    v = v.unflatten(-1, (fixed.heads, -1))
    if slots is None:
        return queries, own, v, store, raw
    slots[1].copy_(v)
    return queries, None, None, store, raw


def keys_values(
    x: torch.Tensor,
    layer: Layer,
    shift: torch.Tensor,
    scale: torch.Tensor,
    tables: Tables,
    fixed: Fixed,
) -> tuple[torch.Tensor | None, ...]:
    """K as it is kept, V, and K by tables.raw: where the cache pass ends."""
    h = _normed(x, layer.kv, scale, shift, fixed)
    k, v = linear(h, layer.kv, fixed.kernels, x.dtype).chunk(2, -1)
    kept, raw = _rotated(
        k, layer.norm_k, (tables.store or tables.own, tables.raw), (None, None), fixed
    )
    return kept, v.unflatten(-1, (fixed.heads, -1)), raw


def _normed(
    x: torch.Tensor, layer: Linear, scale: torch.Tensor, shift: torch.Tensor, fixed: Fixed
) -> torch.Tensor | Rows:
    """What `layer` is given: the modulated norm of x."""
    quantise = layer.scale is not None
    return add_norm(x, None, None, scale, shift, fixed.eps, fixed.kernels, quantise)[1]


def _rotated(
    x: torch.Tensor,
    weight: torch.Tensor,
    tables: Sequence[Table | None],
    outs: Sequence[torch.Tensor | None],
    fixed: Fixed,
) -> tuple[torch.Tensor | None, ...]:
    return norm_rope(x, weight, fixed.eps, fixed.heads, tables, outs, fixed.kernels)


def after_attention(
    x: torch.Tensor,
    attended: torch.Tensor,
    layer: Layer,
    modulation: Modulation,
    texts: tuple[KV, ...],
    sizes: tuple[int, ...],
    fixed: Fixed,
) -> torch.Tensor:
    """The block from attention's output [B, F, L, N, D / N] on. texts: of chunks of `sizes`."""
    m, kernels, dtype = modulation, fixed.kernels, x.dtype
    fp8 = layer.up.scale is not None
    x, h = add_norm(
        x, linear(attended.flatten(-2), layer.out, kernels, dtype), m.gate1, layer.norm_scale,
        layer.norm_shift, fixed.eps, kernels, fp8,
    )  # fmt: skip
    q = rms(linear(h, layer.text_q, kernels, dtype), layer.text_norm_q, fixed.eps).to(dtype)
    q = q.unflatten(-1, (fixed.heads, -1))
    seen = [
        attend(part.flatten(1, 2), k, v).unflatten(1, part.shape[1:3])
        for part, (k, v) in zip(q.split(sizes, 1), texts, strict=True)
    ]
    joined = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
    x, h = add_norm(
        x, linear(joined.flatten(-2), layer.text_out, kernels, dtype), None, m.scale2, m.shift2,
        fixed.eps, kernels, fp8,
    )  # fmt: skip
    h = linear(linear_gelu(h, layer.up, kernels, dtype), layer.down, kernels, dtype)
    return gated_add(x, h, m.gate2, kernels)
