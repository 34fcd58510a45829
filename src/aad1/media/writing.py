"""Videos out: frames to .mp4, .gif, or .png with a sheet of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.media.frames import Frames, enlarged, frame_rate, single_frames
from aad1.media.mp4 import Mp4Encoder
from aad1.media.sheet import SHEET_COLUMNS, contact_sheet, spread

VIDEO_SUFFIXES = (".mp4", ".gif", ".png")
SHEET_FRAMES = 24


def check_video_path(path: str | Path) -> Path:
    """The path, if `write_video` can write there; worth a call before minutes of generation.

    Raises:
        UserError: another suffix than those of `VIDEO_SUFFIXES`, a folder, or a parent that is a
            file or may not be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        allowed = ", ".join(VIDEO_SUFFIXES)
        raise UserError(f"{path} must end in one of {allowed}, not in {path.suffix!r}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a name for a video file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {parent} is not a folder one may write to")
    return path


def write_video(
    path: str | Path,
    frames: Frames | Iterable[Frames],
    fps: float,
    *,
    scale: int | None = None,
) -> int:
    """Write frames as .mp4 (H.264), .gif or .png (a sheet of frames) and return their number.

    Memory stays constant for .mp4 however long `frames` runs. The file appears under its name
    when it is complete.

    frames: uint8 [T, H, W, 3], or an iterable of such pieces and of single frames [H, W, 3].
    fps: frames a second, in (0, 1000].
    scale: whole factor of enlargement; None takes the least that brings the shorter side to
        `SHORT_SIDE` pixels, 1 for larger videos. An odd size gets one more row or column in .mp4.

    Raises:
        UserError: a path that `check_video_path` refuses, no frames, frames of another dtype or
            of changing size, fps or scale out of range.
    """
    path = check_video_path(path)
    rate = frame_rate(fps)
    if scale is not None and not 1 <= scale <= 64:
        raise UserError(f"scale={scale} must be in 1..64")
    pictures = enlarged(single_frames(frames), scale)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_sheet}[path.suffix.lower()]
    with replace_file(path) as temporary:
        count = write(temporary, pictures, rate)
        if count == 0:
            raise UserError(f"there are no frames to write to {path}")
    return count


def _write_mp4(path: Path, pictures: Iterator[Image.Image], fps: Fraction) -> int:
    with Mp4Encoder(path, fps) as encoder:
        for picture in pictures:
            encoder.write(np.asarray(picture))
    return encoder.count


def _write_gif(path: Path, pictures: Iterator[Image.Image], fps: Fraction) -> int:
    palettes = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    if palettes:
        # A GIF counts hundredths of a second: 16 fps is 6.25 of them, so durations alternate.
        ticks = [round(100 * k / fps) for k in range(len(palettes) + 1)]
        durations = [10 * max(1, b - a) for a, b in pairwise(ticks)]
        first, *rest = palettes
        first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)
    return len(palettes)


def _write_sheet(path: Path, pictures: Iterator[Image.Image], fps: Fraction) -> int:
    frames = [np.asarray(picture) for picture in pictures]
    if frames:
        picked = [frames[k] for k in spread(len(frames), SHEET_FRAMES)]
        rows = [picked[k : k + SHEET_COLUMNS] for k in range(0, len(picked), SHEET_COLUMNS)]
        contact_sheet([np.stack(row) for row in rows]).save(path)
    return len(frames)
