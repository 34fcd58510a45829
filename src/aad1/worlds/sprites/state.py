"""What happens in a clip: where everything is in each frame, drawn by lot."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aad1.core.transfer import upload
from aad1.worlds.sprites.config import SpritesConfig
from aad1.worlds.sprites.lots import Lots, mix
from aad1.worlds.sprites.words import (
    COLORS,
    DIRECTIONS,
    SHAPE_OUTLINES,
    SHAPES,
    SPEEDS,
    write_captions,
)


@dataclass(frozen=True, kw_only=True)
class SpritesState:
    """What truly happened in a batch of clips; float64 and int64 on the CPU, (x, y) in pixels.

    Moving the camera by d moves the background on the screen by -d; shapes live on the screen.
    """

    camera: Tensor
    """[B, T, 2] position of the frame's corner on the texture; (0, 0) at the first frame."""
    position: Tensor
    """[B, T, S, 2] centre of each shape on the screen; pixel centres are at integers + 0.5."""
    velocity: Tensor
    """[B, T, S, 2] pixels per frame, with the sign it has after the bounces so far."""
    angle: Tensor
    """[B, T, S] rotation in radians."""
    color: Tensor
    """[B, S] index into `COLORS`."""
    shape: Tensor
    """[B, S] index into `SHAPES`."""
    radius: Tensor
    """[B, S] nominal radius in pixels."""
    texture: Tensor
    """[B] hash that names the texture."""
    palette: Tensor
    """[B, 3, 3] the texture's mean RGB and the two directions in which it varies."""

    def to(self, device: torch.device | str) -> SpritesState:
        """The same on a device, without waiting for it."""
        return SpritesState(**{f.name: upload(getattr(self, f.name), device) for f in fields(self)})


def draw_state(config: SpritesConfig, keys: Tensor) -> tuple[SpritesState, list[str]]:
    """Draws the clips' numbers and words them."""
    lots = Lots(keys)
    sprites, side = config.num_sprites, config.size
    time = torch.arange(config.frames, dtype=torch.float64)

    # Colours differ within a clip, so a caption can tell the shapes apart: a random first colour,
    # then random ones among those not yet taken.
    color = lots.uniform(len(COLORS)).argsort(dim=1)[:, :sprites]
    shape = lots.integer(len(SHAPES), sprites)
    radius = lots.between(*config.radius, sprites) * side

    heading_word, heading = _draw_heading(config, lots, sprites)
    speed_word = lots.integer(1 + len(SPEEDS), sprites)  # 0: no word
    if sprites > 2:
        speed_word = torch.zeros_like(speed_word)
    ranges = torch.tensor(
        [
            (config.slow_speed[0], config.fast_speed[1]),
            config.slow_speed,
            config.fast_speed,
        ],
        dtype=torch.float64,
    )[speed_word]
    speed = side * (ranges[..., 0] + (ranges[..., 1] - ranges[..., 0]) * lots.uniform(sprites))
    velocity = speed[..., None] * heading

    # Between walls that leave room for the shape. Along its heading a shape starts in the rear
    # 60% of the room, so that it truly moves as the caption says before it bounces.
    outer = torch.tensor([extent for _, extent, _ in SHAPE_OUTLINES.values()], dtype=torch.float64)
    wall = (0.9 * outer[shape] * radius)[..., None]  # [B, S, 1]
    room = side - 2 * wall
    along = torch.stack([heading_word % 2 == 0, heading_word % 2 == 1], dim=-1)
    place = lots.uniform(sprites, 2)
    rear = torch.where(velocity > 0, 0.6 * place, 1 - 0.6 * place)
    place = room * torch.where(along, rear, place)
    position, velocity = _bounce(place[:, None], velocity[:, None], room[:, None], time)
    spin = lots.between(-config.max_spin, config.max_spin, sprites)
    angle = lots.between(-math.pi, math.pi, sprites)[:, None] + spin[:, None] * time[:, None]

    pans = lots.uniform() < config.pan_share
    pan_word, pan = _draw_heading(config, lots)
    pan = pan * (lots.between(*config.pan_speed) * side * pans)[:, None]

    state = SpritesState(
        camera=pan[:, None] * time[:, None],
        position=wall[:, None] + position,
        velocity=velocity,
        angle=angle,
        color=color,
        shape=shape,
        radius=radius,
        texture=mix(keys[:, 0] + keys[:, 1] * 3 + 1),
        palette=_draw_palette(lots, config.texture_contrast),
    )
    captions = write_captions(color, shape, heading_word, speed_word, pans, pan_word)
    return state, captions


def _draw_heading(config: SpritesConfig, lots: Lots, *shape: int) -> tuple[Tensor, Tensor]:
    """Direction words [B, *shape], and unit vectors [B, *shape, 2] within what the words allow."""
    word = lots.integer(len(DIRECTIONS), *shape)
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)[word]
    heading = heading + lots.between(-config.heading_spread, config.heading_spread, *shape)
    return word, torch.stack([heading.cos(), heading.sin()], dim=-1)


def _bounce(start: Tensor, velocity: Tensor, room: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and velocities [B, T, S, 2] of balls between walls at 0 and `room`.

    A triangle wave of the unfolded path; all but time [T] are [B, 1, S, 1 or 2].
    """
    lap = ((start + velocity * time[:, None, None]) / room).remainder(2.0)
    backwards = lap > 1
    position = room * torch.where(backwards, 2 - lap, lap)
    return position, torch.where(backwards, -velocity, velocity)


def _draw_palette(lots: Lots, contrast: float) -> Tensor:
    """[B, 3, 3]: the texture's mean colour and two directions in which it varies, all muted."""
    hue = lots.between(0, 2 * math.pi, 2)
    third = 2 * math.pi / 3
    wheel = torch.tensor([0.0, -third, third], dtype=torch.float64)
    tint = (hue[..., None] + wheel).cos()  # [B, 2, 3]
    brightness = lots.between(0.36, 0.5)[:, None]
    mean = brightness * (1 + 0.2 * tint[:, 0])
    light = brightness * (0.55 + 0.15 * tint[:, 1])
    shift = 0.09 * tint[:, 1] - 0.03 * tint[:, 0]
    return torch.stack([mean, contrast * light, contrast * shift], dim=1)
