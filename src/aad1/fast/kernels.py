"""Triton kernels of the formulas in aad1.fast.ops: one program per token, one pass over memory.

Each reads a row of D channels once, computes in float32 and writes once. Imported only where the
switch `triton` is on. TRITON_INTERPRET=1 runs them on the CPU, for tests.

eps is a constant of each kernel: the compiler hands float arguments over in double precision, and
everything they touch would be computed in it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _put(values, out, scales, row, at, inside, width, quantise: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a row, as float8 with the row's own scale if `quantise`."""
    if quantise:
        largest = tl.maximum(tl.max(tl.abs(values), 0), 1e-12)
        tl.store(scales + row, largest / 448.0)
        values = tl.clamp(values * (448.0 / largest), -448.0, 448.0)
    tl.store(out + row * width + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, branch, gate, scale, shift, total, out, scales, tokens, gates, frames, width,
    eps: tl.constexpr, added: tl.constexpr, gated: tl.constexpr, quantise: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """total = x + branch gate; out = LN(total) (1 + scale) + shift.

    gates, frames: how many rows gate and scale have.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if added:
        change = tl.load(branch + row * width + at, mask=inside, other=0.0).to(tl.float32)
        if gated:
            frame = (row // tokens) % gates
            change *= tl.load(gate + frame * width + at, mask=inside, other=0.0)
        kept = (value + change).to(total.dtype.element_ty)
        tl.store(total + row * width + at, kept, mask=inside)
        value = kept.to(tl.float32)  # what the next block will read
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    frame = (row // tokens) % frames
    a = tl.load(scale + frame * width + at, mask=inside, other=0.0)
    b = tl.load(shift + frame * width + at, mask=inside, other=0.0)
    _put(normed * (1.0 + a) + b, out, scales, row, at, inside, width, quantise)


@triton.jit
def _gated_add(x, branch, gate, out, tokens, frames, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    frame = (row // tokens) % frames
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(branch + row * width + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + frame * width + at, mask=inside, other=0.0)
    tl.store(out + row * width + at, (value + change * g).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantise(x, out, scales, width, gelu: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if gelu:  # its tanh form: tanh(z) = 2 sigmoid(2 z) - 1
        z = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(2.0 * z)
    _put(value, out, scales, row, at, inside, width, True)


@triton.jit
def _norm_rope(  # type: ignore[no-untyped-def]
    x, weight, cos, sin, out, rows, width, pairs, x_row, out_batch,
    eps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """rows: of one sample (F L); pairs: channel pairs per head; x_row, out_batch: strides."""
    row = tl.program_id(0).to(tl.int64)
    inner = row % rows
    at = tl.arange(0, block)
    inside = at < width
    # Channels are read and written side by side: apart, a thread moves two bytes at a time.
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    value *= norm * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (block // 2, 2)))
    pair = tl.arange(0, block // 2)  # of all heads
    there = pair < width // 2
    c = tl.load(cos + inner * pairs + pair % pairs, mask=there, other=0.0)
    s = tl.load(sin + inner * pairs + pair % pairs, mask=there, other=0.0)
    turned = tl.interleave(even * c - odd * s, even * s + odd * c)
    to = out + (row // rows) * out_batch + inner * width + at
    tl.store(to, turned.to(out.dtype.element_ty), mask=inside)


def _block(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return dict(block=block, num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16)


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    quantise: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As aad1.fast.ops.add_norm; x [B, F, L, D]. Returns the sum, the normed rows and, if they are
    float8, their scales [B, F, L, 1]."""
    x, scale, shift = x.contiguous(), scale.contiguous(), shift.contiguous()
    tokens, width = x.shape[2:]
    total = x if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn if quantise else x.dtype)
    scales = torch.empty(*x.shape[:3], 1, device=x.device) if quantise else None
    branch = None if branch is None else branch.contiguous()
    gate = None if gate is None else gate.contiguous()
    _add_norm[(x.numel() // width,)](
        x, x if branch is None else branch, scale if gate is None else gate, scale, shift, total,
        out, scale if scales is None else scales, tokens, 1 if gate is None else gate.shape[1],
        scale.shape[1], width, eps=eps,
        added=branch is not None, gated=gate is not None, quantise=quantise, **_block(width),
    )  # fmt: skip
    return total, out, scales


def gated_add(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As aad1.fast.ops.gated_add; x [B, F, L, D]."""
    x, branch, gate = x.contiguous(), branch.contiguous(), gate.contiguous()
    out = torch.empty_like(x)
    tokens, width = x.shape[2:]
    _gated_add[(x.numel() // width,)](
        x, branch, gate, out, tokens, gate.shape[1], width, **_block(width)
    )
    return out


def quantise_rows(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As aad1.fast.ops.quantise_rows of x [M, K], or of its tanh GELU."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(x), 1, device=x.device)
    _quantise[(len(x),)](x, out, scales, x.shape[1], gelu=gelu, **_block(x.shape[1]))
    return out, scales


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    heads: int,
    table: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor | None,
) -> torch.Tensor:
    """As aad1.fast.ops.norm_rope for one table; x [B, F, L, D] may be a slice of a wider row.

    out: [B, F, L, N, D / N], contiguous but for the stride of B.
    """
    b, f, tokens, width = x.shape
    if x.stride(3) != 1 or x.stride(1) != tokens * x.stride(2) or x.stride(0) != f * x.stride(1):
        x = x.contiguous()
    if out is None:
        out = torch.empty(b, f, tokens, heads, width // heads, dtype=x.dtype, device=x.device)
    cos, sin = table[0].contiguous(), table[1].contiguous()
    _norm_rope[(b * f * tokens,)](
        x, weight, cos, sin, out, f * tokens, width, width // heads // 2, x.stride(2),
        out.stride(0), eps=eps, **_block(width),
    )  # fmt: skip
    return out
