"""Rotary position embedding over (frame, row, column), as in Wan 2.1."""

from __future__ import annotations

from functools import lru_cache

import torch


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head given to (frame, row, column); 128 gives (44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _angles(positions: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return positions.double()[:, None] * theta**-exponents


@lru_cache(maxsize=512)
def rope_table(
    positions: tuple[int, ...],
    rows: int,
    columns: int,
    head_dim: int,
    theta: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [len(positions), rows * columns, 1, head_dim / 2].

    Built in float64 on the CPU and kept per position tuple, so a rollout whose positions repeat
    (relative positions do) builds each table once and never waits for the host again.
    """
    # A table first built under the caller's inference mode must serve a later training pass too.
    with torch.inference_mode(False):
        t_dim, h_dim, w_dim = axis_dims(head_dim)
        t = _angles(torch.tensor(positions), t_dim, theta)
        h = _angles(torch.arange(rows), h_dim, theta)
        w = _angles(torch.arange(columns), w_dim, theta)
        frames = len(positions)
        grid = torch.cat(
            [
                t[:, None, None, :].expand(frames, rows, columns, -1),
                h[None, :, None, :].expand(frames, rows, columns, -1),
                w[None, None, :, :].expand(frames, rows, columns, -1),
            ],
            dim=-1,
        ).reshape(frames, rows * columns, 1, head_dim // 2)
        return grid.cos().float().to(device), grid.sin().float().to(device)


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate interleaved channel pairs of x [..., frames, tokens, heads, head_dim] in float32."""
    cos, sin = table
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    out = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return out.flatten(-2).to(x.dtype)
