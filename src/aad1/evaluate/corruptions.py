"""Eleven ways to spoil real videos, each of which some metric must see.

All take uint8 [N, T, H, W, 3] and return the same shape; chance comes from a seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 1.0
"""Standard deviation in pixels of `blur`."""
DRIFT_BLUR = 1.5
DRIFT_CONTRAST = 0.6
"""What is left of the contrast at the end."""
DRIFT_NOISE = 12.0
"""Grey levels, root mean square, at the end."""
FLICKER = 0.08
"""Standard deviation of the factor of a frame's brightness."""
FREEZE_AT = 8
PING_PONG = 6
"""Frames from one turn to the next."""


def static(videos: Tensor) -> Tensor:
    """The first frame throughout."""
    return videos[:, :1].expand_as(videos).contiguous()


def freeze(videos: Tensor) -> Tensor:
    """Nothing moves after frame 8."""
    last = min(FREEZE_AT, videos.shape[1] - 1)
    order = torch.arange(videos.shape[1]).clamp(max=last)
    return videos[:, order]


def doubled(videos: Tensor) -> Tensor:
    """Every frame twice: the first half of the video at half its speed."""
    return videos[:, torch.arange(videos.shape[1]) // 2]


def ping_pong(videos: Tensor) -> Tensor:
    """The first frames forwards and backwards, again and again."""
    length = PING_PONG
    position = torch.arange(videos.shape[1]) % (2 * length)
    return videos[:, torch.where(position <= length, position, 2 * length - position)]


def blur(videos: Tensor) -> Tensor:
    """Every frame but the first is soft."""
    return torch.cat([videos[:, :1], _blurred(videos[:, 1:], BLUR)], dim=1)


def drift_blur(videos: Tensor) -> Tensor:
    """Frames grow soft."""
    soft = _blurred(videos, DRIFT_BLUR).float()
    return _bytes(videos.float().lerp(soft, _ramp(videos)))


def drift_contrast(videos: Tensor) -> Tensor:
    """Frames fade towards their mean."""
    pixels = videos.float()
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return _bytes(mean + (pixels - mean) * (1 - (1 - DRIFT_CONTRAST) * _ramp(videos)))


def drift_noise(videos: Tensor, seed: int = 0) -> Tensor:
    """Frames grow noisy."""
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(seed))
    return _bytes(videos + DRIFT_NOISE * _ramp(videos) * noise.to(videos.device))


def flicker(videos: Tensor, seed: int = 0) -> Tensor:
    """Brightness jumps from frame to frame; the first frame stays."""
    number, frames = videos.shape[:2]
    factor = torch.randn(number, frames, generator=torch.Generator().manual_seed(seed))
    factor[:, 0] = 0
    return _bytes(videos * (1 + FLICKER * factor.to(videos.device))[:, :, None, None, None])


def swap_order(videos: Tensor) -> Tensor:
    """Neighbouring frames trade places."""
    order = list(range(videos.shape[1]))
    for frame in range(1, len(order) - 1, 2):
        order[frame], order[frame + 1] = order[frame + 1], order[frame]
    return videos[:, order]


def swap_identity(videos: Tensor) -> Tensor:
    """Half-way it becomes another video."""
    middle = videos.shape[1] // 2
    return torch.cat([videos[:, :middle], videos.roll(1, dims=0)[:, middle:]], dim=1)


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "static": static,
    "freeze@8": freeze,
    "doubled": doubled,
    "ping-pong": ping_pong,
    "blur": blur,
    "drift-blur": drift_blur,
    "drift-contrast": drift_contrast,
    "drift-noise": drift_noise,
    "flicker": flicker,
    "swap order": swap_order,
    "swap identity": swap_identity,
}


def _ramp(videos: Tensor) -> Tensor:
    """0 at the first frame, 1 at the last: [1, T, 1, 1, 1]."""
    return torch.linspace(0, 1, videos.shape[1], device=videos.device).view(1, -1, 1, 1, 1)


def _bytes(videos: Tensor) -> Tensor:
    return videos.round().clamp(0, 255).to(torch.uint8)


def _blurred(videos: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32, device=videos.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2).flatten(0, 1)[:, None].float()
    frames = F.conv2d(F.pad(frames, (reach, reach, 0, 0), mode="replicate"), kernel)
    frames = F.conv2d(F.pad(frames, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3))
    number, length, height, width, _ = videos.shape
    frames = frames.view(number, length, 3, height, width).permute(0, 1, 3, 4, 2)
    return _bytes(frames)
