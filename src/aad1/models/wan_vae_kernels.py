"""A Triton kernel for the decoder of Wan's autoencoder: everything between two convolutions.

What a causal convolution is given is its remembered frames, then SiLU of the norm of new ones, with
zero channels behind where it wants them. Left to the compiler that is three passes over a picture
of gigabytes; here it is one. Imported only where the fast path's switch `triton` is on.
TRITON_INTERPRET=1 runs it on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a program's tile


@triton.jit
def _activate(  # type: ignore[no-untyped-def]
    x, bias, gamma, past, out, frames, area, channels, wide,
    root: tl.constexpr, biased: tl.constexpr, remembered: tl.constexpr, block: tl.constexpr,
    rows: tl.constexpr,
):  # fmt: skip
    """A tile of one frame of `out`. frames: new ones; area: positions of a frame; root: of the
    channels (a constant: the compiler hands floats over in double precision)."""
    place = tl.program_id(0) * rows + tl.arange(0, rows)
    frame = tl.program_id(1)
    clip = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, block)
    here = (place < area)[:, None]
    inside = at < channels
    to = out + ((clip * (frames + remembered) + frame) * area + place)[:, None] * wide + at[None, :]
    written = here & (at < wide)[None, :]
    if frame < remembered:
        source = ((clip * remembered + frame) * area + place)[:, None] * channels
        kept = tl.load(past + source + at[None, :], mask=here & inside[None, :], other=0.0)
        tl.store(to, kept, mask=written)
    else:
        source = ((clip * frames + frame - remembered) * area + place)[:, None] * channels
        value = tl.load(x + source + at[None, :], mask=here & inside[None, :], other=0.0)
        value = value.to(tl.float32)
        if biased:
            value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        size = tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12)
        value *= (root / size)[:, None]
        value *= tl.load(gamma + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        value *= tl.sigmoid(value)
        tl.store(to, value.to(out.dtype.element_ty), mask=written)


def activate(
    x: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, past: torch.Tensor, wide: int
) -> torch.Tensor:
    """past [B, C, P, h, w], then SiLU(norm(x + bias)) of x [B, C, T, h, w], then zero channels.

    The norm is `wan_vae_layers.Norm` with gamma; bias [C] is what the convolution before left out.
    Returns [B, wide, T + P, h, w], channels last; nothing is overwritten.
    """
    last = x.permute(0, 2, 3, 4, 1).contiguous()
    kept = past.permute(0, 2, 3, 4, 1).contiguous()
    b, t, h, w, c = last.shape
    before = past.shape[2]
    out = torch.empty(b, t + before, h, w, wide, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(wide)
    rows = max(1, ELEMENTS // block)
    _activate[(triton.cdiv(h * w, rows), t + before, b)](
        last, last if bias is None else bias, gamma, kept, out, t, h * w, c, wide, root=c**0.5,
        biased=bias is not None, remembered=before, block=block, rows=rows, num_warps=4,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3)
