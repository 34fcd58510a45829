"""The background: a smooth random field on the plane, seen through a moving camera.

N counts the frames of all clips together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aad1.worlds.sprites.config import SpritesConfig
from aad1.worlds.sprites.lots import mix
from aad1.worlds.sprites.state import SpritesState

_CELLS = (1 / 4, 1 / 8, 1 / 16)  # lattice spacing of the octaves, in frame sides
_GAINS = (1.0, 0.75, 0.5)
_HUE_CELL = 1 / 3
_SPLINE_STD = 0.317  # of a quadratic B-spline field over uniform lattice values in [-1, 1]


def draw_texture(
    config: SpritesConfig, state: SpritesState, part: slice, device: torch.device | str
) -> Tensor:
    """The background of some clips: float [N, H * W, 3] in [0, 1]."""
    camera = state.camera[part].flatten(0, 1)
    frames = state.camera.shape[1]
    key = state.texture[part].repeat_interleave(frames)
    side = config.size
    light = torch.zeros(camera.shape[0], side, side, device=device)
    for octave, (cell, gain) in enumerate(zip(_CELLS, _GAINS, strict=True)):
        spacing = max(cell * side / config.texture_frequency, 2.0)
        light += _spline_field(camera, key + octave, spacing, side, device).mul_(gain)
    scale = 1 / (_SPLINE_STD * math.hypot(*_GAINS))
    light = torch.tanh(light.mul_(scale))
    hue = _spline_field(camera, key + 7, _HUE_CELL * side, side, device)
    palette = state.palette[part].repeat_interleave(frames, dim=0).to(device, torch.float32)
    basis = torch.stack([light, hue.mul_(1 / _SPLINE_STD)], dim=-1).flatten(1, 2)
    return torch.baddbmm(palette[:, :1], basis, palette[:, 1:]).clamp_(0, 1)


def _spline_field(
    camera: Tensor, key: Tensor, spacing: float, side: int, device: torch.device | str
) -> Tensor:
    """A smooth random field on the plane, seen through the cameras: float [N, side, side].

    Random values on a lattice, interpolated by quadratic B-splines. The kernel is separable, so a
    frame is rows @ values @ columns^T with the few lattice points under it, exact at any subpixel
    offset.
    """
    points = math.ceil(side / spacing) + 4  # the splines reach 1.5 cells past the frame
    first = torch.floor(camera / spacing).long() - 1  # [N, 2]
    inside = (camera / spacing - first).to(device, torch.float32)  # of pixel 0, in cells
    # [N, 2, points]
    lattice = (first[:, :, None] + torch.arange(points, device=first.device)).to(device)
    key = key.to(device)[:, None]
    column = mix(lattice[:, 0] + key * 0x2545F491)
    values = mix(column[:, None, :] + mix(lattice[:, 1] + key)[:, :, None] * 5)
    values = values.float().mul_(2 / 2**32).sub_(1)  # [N, rows, columns]
    pixel = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / spacing
    distance = (
        inside[:, :, None, None]
        + pixel[:, None]
        - torch.arange(points, device=device, dtype=torch.float32)
    ).abs_()
    near = 0.75 - distance.square()
    far = (1.5 - distance).clamp_(min=0).square_().mul_(0.5)
    weight = torch.where(distance < 0.5, near, far)  # [N, 2, side, points]
    return torch.bmm(torch.bmm(weight[:, 1], values), weight[:, 0].transpose(1, 2))
