"""A video's frames in memory, as they are handed over to be written or shown.

Shape letters: T frames, H height, W width in pixels; the last axis is RGB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from aad1.errors import UserError
from aad1.media.images import Pixels

Frames: TypeAlias = torch.Tensor | Pixels

SHORT_SIDE = 240  # smaller videos are enlarged, as players show them as a stamp or a blur


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames a second as files note them; UserError unless in (0, 1000]."""
    if not 0 < fps <= 1000:
        raise UserError(f"fps={fps} must be in (0, 1000]")
    return Fraction(fps).limit_denominator(1001)


def check_frames(array: Pixels) -> None:
    """UserError unless it is uint8 [T, H, W, 3] or [H, W, 3]."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise UserError(f"frames must be uint8 [T, H, W, 3], got {array.dtype} {list(array.shape)}")


def single_frames(frames: Frames | Iterable[Frames]) -> Iterator[Pixels]:
    """Each frame [H, W, 3] of `frames`; UserError for another dtype, or a change of size."""
    size: tuple[int, ...] | None = None
    for piece in frames:
        array = piece.detach().cpu().numpy() if isinstance(piece, torch.Tensor) else piece
        check_frames(array)
        for frame in array[None] if array.ndim == 3 else array:
            size = size or frame.shape
            if frame.shape != size or 0 in size:
                raise UserError(f"a frame has shape {list(frame.shape)}, the first {list(size)}")
            yield frame


def enlarged(
    frames: Iterable[Pixels],
    scale: int | None,
    kernel: Image.Resampling = Image.Resampling.LANCZOS,
) -> Iterator[Image.Image]:
    """Frames as pictures, enlarged by a whole factor.

    scale: None takes the least that brings the shorter side to `SHORT_SIDE` pixels, or 1.
    """
    for frame in frames:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        factor = scale or math.ceil(SHORT_SIDE / min(picture.size))
        if factor > 1:
            picture = picture.resize((picture.width * factor, picture.height * factor), kernel)
        yield picture
