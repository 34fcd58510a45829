"""The arithmetic of a block, in forms that fuse well; each with the plain formula beside it.

`kernels` picks this package's Triton kernels (aad1.fast.kernels); without it the same formulas are
left to PyTorch, or to its compiler. Rounding to the model's precision happens once per result,
where the plain model rounds in between too.

Shape letters: B batch, F latent frames, L tokens per frame, N heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Linear(NamedTuple):
    """Weight [out, in] and bias [out] of a linear layer.

    scale: [out, 1] of a float8 weight (weight x scale is the layer's own), None for any other.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor | None = None

    def rows(self, start: int) -> Linear:
        """The layer's outputs from `start` on; the weight is shared."""
        scale = None if self.scale is None else self.scale[start:].clone()
        return Linear(self.weight[start:], self.bias[start:].clone(), scale)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> float8 [M, K] and scales float32 [M, 1], the largest of each row becoming 448."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def fp8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(x x_scale) @ (weight weight_scale)^T + bias, [M, K] and [N, K] -> [M, N] in `dtype`.

    On CUDA in the tensor cores (rounded to bfloat16); elsewhere what they approximate, float32.
    """
    if x.device.type == "cuda":
        out = torch._scaled_mm(
            x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(),
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return out.to(dtype)
    product = F.linear(x.float() * x_scale, weight.float() * weight_scale)
    return (product if bias is None else product + bias.float()).to(dtype)


def linear(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """x [..., in] -> [..., out] in x's precision."""
    if layer.scale is None:
        return F.linear(x, layer.weight, layer.bias)
    flat = x.flatten(0, -2)
    out = fp8_product(*quantise_rows(flat), layer.weight, layer.scale, layer.bias, x.dtype)
    return out.unflatten(0, x.shape[:-1])


def modulate(
    x_BFLD: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, kernels: bool
) -> torch.Tensor:
    """LN(x) (1 + scale) + shift; scale and shift float32 [1, F or 1, 1, D]."""
    if kernels:
        from aad1.fast.kernels import modulate as kernel

        return kernel(x_BFLD, scale, shift, eps)
    normed = F.layer_norm(x_BFLD.float(), x_BFLD.shape[-1:], eps=eps)
    return (normed * (1 + scale) + shift).to(x_BFLD.dtype)


def gated_add(
    x_BFLD: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, kernels: bool
) -> torch.Tensor:
    """x + branch gate; gate float32 [1, F or 1, 1, D]."""
    if kernels:
        from aad1.fast.kernels import gated_add as kernel

        return kernel(x_BFLD, branch, gate)
    return (x_BFLD.float() + branch.float() * gate).to(x_BFLD.dtype)


Table = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, float32 [F, L, 1, D / N / 2]; see aad1.core.rope."""


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the full width, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotate_pairs(x_BFLND: torch.Tensor, table: Table) -> torch.Tensor:
    """Rotate interleaved channel pairs, in float32."""
    cos, sin = table
    even, odd = x_BFLND.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def norm_rope(
    x_BFLD: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    heads: int,
    tables: Sequence[Table | None],
    outs: Sequence[torch.Tensor | None],
    kernels: bool,
) -> tuple[torch.Tensor | None, ...]:
    """RMS norm over the width, then RoPE by each of `tables`; [B, F, L, N, D / N] each.

    tables: None gives None. outs: where to write each result (slots of a cache), or None.
    """
    if kernels:
        from aad1.fast.kernels import norm_rope as kernel

        return tuple(
            None if table is None else kernel(x_BFLD, weight, eps, heads, table, out)
            for table, out in zip(tables, outs, strict=True)
        )
    normed = rms(x_BFLD, weight, eps).unflatten(-1, (heads, -1))
    results: list[torch.Tensor | None] = []
    for table, out in zip(tables, outs, strict=True):
        if table is None:
            results.append(None)
            continue
        rotated = rotate_pairs(normed, table).to(x_BFLD.dtype)
        results.append(rotated if out is None else out.copy_(rotated))
    return tuple(results)
