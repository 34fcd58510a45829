"""What is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aad1.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SpritesConfig:
    """The drawn world's knobs; lengths are shares of the frame's side, so they fit any size."""

    size: int = 64
    """Height and width of a frame in pixels."""
    frames: int = 21
    """Frames per clip; 21 stand for 5 s, 81 for 20 s."""
    num_sprites: int = 2
    """Shapes per clip, 1 to 3; with 3 the captions leave out the speed word to stay short."""
    frames_per_chunk: int = 4
    """Frames that share one caption; the first frame is a chunk of its own."""
    texture_frequency: float = 1.0
    """Multiplies the spatial frequencies of the texture; at 1 its cells are 1/4, 1/8 and 1/16."""
    texture_contrast: float = 1.0
    """Multiplies the texture's contrast."""
    pan_share: float = 0.8
    """Share of the clips in which the camera pans."""
    pan_speed: tuple[float, float] = (0.008, 0.022)
    """Camera speed, least and most, in frame sides per frame."""
    slow_speed: tuple[float, float] = (0.006, 0.016)
    """What "slow" allows, in frame sides per frame."""
    fast_speed: tuple[float, float] = (0.022, 0.036)
    """What "fast" allows; without a speed word all from the least slow to the most fast is open."""
    heading_spread: float = 0.3
    """Half-width in radians of the cone of headings that one direction word allows."""
    max_spin: float = 0.12
    """Fastest rotation of a shape, in radians per frame."""
    radius: tuple[float, float] = (0.095, 0.13)
    """Nominal radius of a shape, least and most, in frame sides."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("size", 16, 1024),
            ("frames", 1, 100_000),
            ("num_sprites", 1, 3),
            ("frames_per_chunk", 1, 1024),
            ("texture_frequency", 0.1, 8.0),
            ("texture_contrast", 0.0, 4.0),
            ("pan_share", 0.0, 1.0),
            ("heading_spread", 0.0, math.pi / 4),
            ("max_spin", 0.0, math.pi),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"sprites {name} must be between {low} and {high:g}, got {value}")
        for name, most in (
            ("pan_speed", 0.25),
            ("slow_speed", 0.25),
            ("fast_speed", 0.25),
            ("radius", 0.2),
        ):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise UserError(
                    f"sprites {name} must rise within 0 and {most}, got ({low:g}, {high:g})"
                )
        if self.radius[0] <= 0:
            raise UserError(f"sprites radius must be above 0, got {self.radius[0]:g}")

    @property
    def num_chunks(self) -> int:
        """Captions per clip: the image's and one per chunk begun."""
        return 1 + math.ceil((self.frames - 1) / self.frames_per_chunk)
