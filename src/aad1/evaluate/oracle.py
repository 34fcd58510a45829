"""Reading the drawn world's state from pixels: the camera by flow, the shapes by colour.

Nothing is trained. The decoder errs on real frames too, so its figures are given for real videos
beside generated ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aad1.evaluate.motion import check_videos, flow, grey

_MIN_SATURATION = 0.45
_MIN_LIKENESS = 0.985  # cosine of a pixel's RGB with the colour's
_WHITE_FROM = 0.62
_LEAST_AREA = 0.006  # of the frame; a shape covers 0.03 to 0.05


def camera_velocity(videos: Tensor, gap: int = 2) -> Tensor:
    """float64 [N, 2]: mean (x, y) camera speed of each video, in pixels per frame.

    videos: uint8 [N, T, H, W, 3]. The shapes cover a tenth of a frame, so the median of its flow
    over `gap` frames is the background's, and the camera moves against it. On the drawn world this
    errs by 0.01 pixels per frame; phase correlation erred by 0.1 to 0.5.
    """
    check_videos(videos, "decoded")
    speeds = []
    for video in videos:
        light = grey(video)
        middle = flow(light[:-gap], light[gap:]).flatten(2).median(dim=2).values
        speeds.append(-middle.double().mean(dim=0).cpu() / gap)
    return torch.stack(speeds)


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
