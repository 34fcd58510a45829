"""The shapes, painted over the background.

N counts the frames of all clips together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aad1.core.transfer import upload
from aad1.worlds.sprites.config import SpritesConfig
from aad1.worlds.sprites.state import SpritesState
from aad1.worlds.sprites.words import COLORS, SHAPE_OUTLINES

_WIDEST = max(extent for _, extent, _ in SHAPE_OUTLINES.values())


def draw_sprite(
    config: SpritesConfig, state: SpritesState, part: slice, sprite: int, image: Tensor
) -> None:
    """Paints one shape of every clip over image [N, H * W, 3], inside a window around it."""
    frames, side, device = state.camera.shape[1], config.size, image.device
    home = state.camera.device  # of the state: the CPU, or `device` too
    shapes = upload(torch.tensor(list(SHAPE_OUTLINES.values()), dtype=torch.float64), home)

    def per_frame(clip_values: Tensor) -> Tensor:
        return clip_values.repeat_interleave(frames, dim=0).to(device, torch.float32)

    corners, extent, inner = shapes[state.shape[part, sprite]].unbind(1)
    outer = extent * state.radius[part, sprite]
    window = min(side, math.ceil(2 * _WIDEST * config.radius[1] * side) + 3)
    center = state.position[part, :, sprite].flatten(0, 1)
    origin = (center - window / 2).round().clamp(0, side - window).long()
    grid = torch.arange(window, device=home)
    column = origin[:, :1] + grid
    row = origin[:, 1:] + grid
    target = (row[:, :, None] * side + column[:, None, :]).flatten(1).to(device)
    x = (column + 0.5 - center[:, :1]).to(device, torch.float32)[:, None, :]
    y = (row + 0.5 - center[:, 1:]).to(device, torch.float32)[:, :, None]
    angle = state.angle[part, :, sprite].flatten().to(device, torch.float32)[:, None, None]
    across = x * angle.cos() + y * angle.sin()
    along = y * angle.cos() - x * angle.sin()

    half = per_frame(math.pi / corners)[:, None, None]
    outer_n = per_frame(outer)[:, None, None]
    inner_n = outer_n * per_frame(inner)[:, None, None]
    outside = _distance_to_star(across, along, half, outer_n, inner_n)
    alpha = (0.5 - outside).clamp_(0, 1)
    border = side / 64
    ink = (outside + 0.5 + border).clamp_(0, 1)  # a dark rim
    period = per_frame(state.radius[part, sprite])[:, None, None] * 0.8
    stripe = torch.tanh(3 * torch.sin(2 * math.pi / period * across))
    shade = (0.8 + 0.2 * stripe) * (1 - 0.8 * ink)
    colors = upload(torch.tensor(list(COLORS.values())), home)[state.color[part, sprite]]
    paint = shade.flatten(1)[..., None] * per_frame(colors)[:, None, :]
    under = target[..., None].expand(-1, -1, 3)
    behind = image.gather(1, under)
    image.scatter_(1, under, behind.lerp_(paint, alpha.flatten(1)[..., None]))


def _distance_to_star(x: Tensor, y: Tensor, half: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Signed distance in pixels of points to the sides of a star, positive outside.

    half: pi / corners; outer, inner: distances of the vertices, the first outer one on the x axis.
    """
    # Fold the plane into one half-sector, where the outline is the line from the outer vertex
    # (outer, 0) to the inner one.
    length = (x.square() + y.square()).sqrt_()
    folded = torch.atan2(y, x).remainder_(2 * half)
    folded = torch.minimum(folded, 2 * half - folded)
    edge_x, edge_y = inner * half.cos() - outer, inner * half.sin()
    outside = (length * folded.cos() - outer) * edge_y - length * folded.sin() * edge_x
    return outside / torch.hypot(edge_x, edge_y)
