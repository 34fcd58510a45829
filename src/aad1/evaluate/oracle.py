"""Reading the drawn world's state from pixels: camera by phase correlation, shapes by colour.

Nothing is trained. The decoder errs on real frames too, so its figures are given for real videos
beside generated ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aad1.evaluate.motion import check_videos, grey

_LOW_PASS = 0.18  # cycles per pixel; above it there is little texture, and noise
_MIN_SATURATION = 0.45
_MIN_LIKENESS = 0.985  # cosine of a pixel's RGB with the colour's
_WHITE_FROM = 0.62
_LEAST_AREA = 0.006  # of the frame; a shape covers 0.03 to 0.05


def camera_velocity(videos: Tensor, gap: int = 2) -> Tensor:
    """float64 [N, 2]: mean (x, y) camera speed of each video, in pixels per frame.

    videos: uint8 [N, T, H, W, 3]. Phase correlation of frames `gap` apart, the normalised spectra
    averaged over the video; its peak is the background's shift, and the camera moves against it.
    """
    check_videos(videos, "decoded")
    light = grey(videos)
    _, _, height, width = light.shape
    window = torch.outer(_hann(height), _hann(width)).to(light.device)
    light = (light - light.mean(dim=(2, 3), keepdim=True)) * window
    spectrum = torch.fft.fft2(light)
    cross = spectrum[:, gap:] * spectrum[:, :-gap].conj()
    cross = (cross / cross.abs().clamp(min=1e-6)).mean(dim=1)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    keep = torch.exp(-((frequency / _LOW_PASS) ** 2)).to(light.device)
    surface = torch.fft.ifft2(cross * keep).real
    shift = torch.stack([_peak(one) for one in surface.cpu().double()])
    return -shift / gap


def _hann(size: int) -> Tensor:
    return torch.hann_window(size, periodic=False)


def _peak(surface: Tensor) -> Tensor:
    """(x, y) of the highest point of a wrapped surface [H, W], to a fraction of a pixel."""
    height, width = surface.shape
    row, column = divmod(int(surface.argmax()), width)

    def refine(before: Tensor, at: Tensor, after: Tensor) -> float:
        bend = float(before - 2 * at + after)
        return 0.0 if bend >= 0 else float(before - after) / (2 * bend)

    y = row + refine(surface[row - 1, column], surface[row, column],
                     surface[(row + 1) % height, column])  # fmt: skip
    x = column + refine(surface[row, column - 1], surface[row, column],
                        surface[row, (column + 1) % width])  # fmt: skip
    x, y = (x + width / 2) % width - width / 2, (y + height / 2) % height - height / 2
    return torch.tensor([x, y], dtype=torch.float64)


def color_places(videos: Tensor, color: tuple[float, float, float]) -> Tensor:
    """float64 [N, T, 2]: where a colour is, (x, y) in pixels; NaN where it is not.

    videos: uint8 [N, T, H, W, 3]; color: RGB in [0, 1], saturated or white. The place is the median
    of the pixels that have it, if they cover enough of the frame.
    """
    pixels = videos.float() / 255
    target = torch.tensor(color, device=videos.device)
    high, low = pixels.amax(dim=-1), pixels.amin(dim=-1)
    if min(color) > 0.9:
        alike = (low > _WHITE_FROM) & (low > 0.93 * high)
    else:
        length = pixels.norm(dim=-1).clamp(min=1e-6)
        likeness = (pixels @ target) / (length * target.norm())
        alike = (likeness > _MIN_LIKENESS) & (high - low > _MIN_SATURATION * max(color))
    number, frames, height, width = alike.shape
    places = torch.full((number, frames, 2), math.nan, dtype=torch.float64)
    least = _LEAST_AREA * height * width
    for video in range(number):
        for frame in range(frames):
            rows, columns = torch.nonzero(alike[video, frame], as_tuple=True)
            if len(rows) >= least:
                places[video, frame, 0] = columns.double().median() + 0.5
                places[video, frame, 1] = rows.double().median() + 0.5
    return places
