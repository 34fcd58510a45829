"""Sampling the bidirectional teacher, and its trajectories for stage I."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aad1.core.flow import guide, sigma_grid
from aad1.errors import UserError
from aad1.models.dit import WanTransformer


@torch.no_grad()
def sample(
    teacher: WanTransformer,
    noise: torch.Tensor,
    text: torch.Tensor,
    null: torch.Tensor | None,
    *,
    steps: int,
    shift: float,
    guidance_scale: float,
    keep: Sequence[float] = (),
    image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler on dx/dsigma = v over the exact grid shift(i / steps).

    noise [B, C, F, H, W]; text and null as the transformer takes them (null None: no guidance).
    keep: noise levels whose states are wanted; each must lie on the grid.
    image: clean first frames [B, C, f, H, W] that stay as they are, at sigma 0, for a teacher
        that was trained with clean first frames among others.
    Returns (x0, states [B, len(keep), C, F, H, W]).
    """
    grid = sigma_grid(steps, shift)
    index = []
    for level in keep:
        nearest = int((grid - level).abs().argmin())
        if abs(float(grid[nearest]) - level) > 1e-6:
            raise UserError(
                f"sigma {level} is not on the teacher's grid of {steps} steps with shift {shift}; "
                f"the nearest is {float(grid[nearest]):.6f}"
            )
        index.append(nearest)
    given = 0 if image is None else image.shape[2]
    x, states = noise, {}
    if image is not None:
        x = torch.cat([image, noise[:, :, given:]], 2)
    for i in range(steps):
        if i in index:
            states[i] = x
        sigma = torch.full((len(x),), float(grid[i]), device=x.device)
        if given:
            sigma = sigma[:, None].repeat(1, x.shape[2])
            sigma[:, :given] = 0
        v = teacher(x, sigma, text)
        if null is not None and guidance_scale != 1:
            v = guide(v, teacher(x, sigma, null), guidance_scale)
        moved = x[:, :, given:] + float(grid[i + 1] - grid[i]) * v[:, :, given:]
        x = torch.cat([x[:, :, :given], moved], 2)
    kept = torch.stack([states[i] for i in index], 1) if index else x[:, None][:, :0]
    return x, kept
