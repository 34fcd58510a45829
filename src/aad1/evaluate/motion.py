"""How much videos move: dense optical flow in plain torch, and the motion ratio M built on it.

Flow is pyramidal Lucas-Kanade: at each pyramid level, coarse to fine, the second frame is warped by
the flow so far and the remaining shift of every window solves a regularised 2x2 least-squares
problem. M sees freezing and runaway motion only, never quality, and noise counts as some motion:
read it beside FDtd and FDnss (frechet.py), as `report.passes_motion_check` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aad1.errors import UserError

LEVELS = 3
WINDOW = 7
REGULARISER = 5.0
"""Added to the diagonal of the structure tensor, in (grey levels per pixel) squared; it keeps the
flow of flat, faintly noisy surfaces near 0."""
COARSE_ITERATIONS = 2
"""Warps at every level but the finest, which has one: more of them fit noise, not motion."""
STATIC_BELOW = 0.25
"""A video counts as static below this share of the real videos' median flow."""

STILL = 1e-3
"""Pixels per frame of mean flow that count as none at all; rounding gives about 1e-7."""
ENERGY_FLOOR = 0.05
"""Mean squares of frame differences below this, in grey levels squared, are rounding, not motion;
it keeps the logarithms of a static video finite and its shares at 0 rather than 0 / 0."""

_PIXELS_AT_ONCE = 2**19  # of frame pairs; small enough to stay near the processor's cache
_SMALLEST_SIDE = 8  # of the coarsest pyramid level


@dataclass(frozen=True, kw_only=True)
class Motion:
    """The flow of N videos, averaged over pixels and frame pairs, in pixels per frame."""

    magnitude: Tensor
    """float64 [N]: mean length of the flow vectors."""
    late: Tensor
    """float64 [N]: the same over the last quarter of the frames."""
    direction: Tensor
    """float64 [N, 2]: mean (x, y) flow; x above 0 means that the image content moves right."""
    predictability: Tensor
    """float64 [N]: share of the energy of the change from frame t to t + 1 that the flow between
    t - 1 and t foretells. Near 1 for things that move on, 0 for static videos, about 0 to 0.25 for
    fresh noise, below 0 for flicker and shuffled frames."""


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Optical flow from one batch of grey frames to another.

    first, second: float [B, H, W] with values 0..255.
    Returns float [B, 2, H, W]: (x, y) displacement in pixels of what each pixel of `first` shows.
    """
    pyramid = [(first[:, None], second[:, None])]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[2:]) >= 2 * _SMALLEST_SIDE:
        fine_first, fine_second = pyramid[-1]
        pyramid.append((_halve(fine_first), _halve(fine_second)))
    estimate = torch.zeros(
        first.shape[0], 2, *pyramid[-1][0].shape[2:], device=first.device, dtype=first.dtype
    )
    for level_first, level_second in reversed(pyramid):
        size = level_first.shape[2:]
        if estimate.shape[2:] != size:
            grow = torch.tensor(
                [size[1] / estimate.shape[3], size[0] / estimate.shape[2]],
                device=first.device,
                dtype=first.dtype,
            )
            estimate = F.interpolate(estimate, size=size, mode="bilinear", align_corners=False)
            estimate = estimate * grow[:, None, None]
        iterations = 1 if size == first.shape[1:] else COARSE_ITERATIONS
        estimate = _refine(level_first, level_second, estimate, iterations)
    return estimate


def _halve(image: Tensor) -> Tensor:
    smooth = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return F.interpolate(smooth, scale_factor=0.5, mode="area")


def _window_mean(image: Tensor) -> Tensor:
    """The mean over WINDOW x WINDOW pixels around each, fewer at the border."""
    return _mean_along(_mean_along(image, 2), 3)


def _mean_along(image: Tensor, axis: int) -> Tensor:
    """The mean over WINDOW pixels along an axis, as a few shifted sums (pooling is far slower)."""
    size, reach = image.shape[axis], WINDOW // 2
    padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
    total = F.pad(image, padding)
    sums, width = [total], 1
    while 2 * width <= WINDOW:  # sums of 1, 2, 4, ... neighbours
        last = sums[-1]
        length = last.shape[axis] - width
        sums.append(last.narrow(axis, 0, length) + last.narrow(axis, width, length))
        width *= 2
    total, covered = sums.pop().narrow(axis, 0, size), width
    for part in reversed(sums):
        width //= 2
        if covered + width <= WINDOW:
            total = total + part.narrow(axis, covered, size)
            covered += width
    place = torch.arange(size, device=image.device)
    count = (place + reach).clamp(max=size - 1) - (place - reach).clamp(min=0) + 1
    return total / (count[:, None] if axis == 2 else count)


def _gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, one-sided at the border."""
    wide = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return (
        (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2,
        (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2,
    )


def _refine(first: Tensor, second: Tensor, estimate: Tensor, iterations: int) -> Tensor:
    """One pyramid level: first, second [B, 1, H, W]; estimate [B, 2, H, W] in its pixels."""
    slope_x, slope_y = _gradient(first)
    tensor = _window_mean(torch.cat([slope_x * slope_x, slope_x * slope_y, slope_y * slope_y], 1))
    xx, xy, yy = tensor[:, :1] + REGULARISER, tensor[:, 1:2], tensor[:, 2:] + REGULARISER
    inverse = 1 / (xx * yy - xy * xy)
    for _ in range(iterations):
        warped, inside = warp(second, estimate)
        # What leaves the frame has no match: it must not pull at the windows near the border.
        change = (first - warped) * inside
        pull = _window_mean(torch.cat([slope_x * change, slope_y * change], dim=1))
        step_x = (yy * pull[:, :1] - xy * pull[:, 1:]) * inverse
        step_y = (xx * pull[:, 1:] - xy * pull[:, :1]) * inverse
        estimate = estimate + torch.cat([step_x, step_y], dim=1)
    return estimate


def warp(image: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """A picture as its displaced neighbours give it.

    image: float [B, C, H, W]; displacement: float [B, 2, H, W], (x, y) in pixels.
    Returns the image read at x + displacement [B, C, H, W], clamped at the border, and where that
    lies inside the image: bool [B, 1, H, W].
    """
    height, width = image.shape[2:]
    x = displacement[:, 0] + torch.arange(width, device=image.device)
    y = displacement[:, 1] + torch.arange(height, device=image.device)[:, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    # Clamped by hand: not every device offers grid_sample's border padding.
    grid_x = (2 * x.clamp(0, width - 1) + 1) / width - 1
    grid_y = (2 * y.clamp(0, height - 1) + 1) / height - 1
    grid = torch.stack([grid_x, grid_y], dim=-1)
    return F.grid_sample(image, grid, align_corners=False), inside[:, None]


def grey(videos: Tensor) -> Tensor:
    """uint8 [..., 3] -> float32 [...] luminance in 0..255 (Rec. 601 weights)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=videos.device)
    return videos.float() @ weights


def quarter(frames: int) -> int:
    """Frames in a quarter of a video; the given first frame is not counted."""
    return max(1, (frames - 1) // 4)


def check_videos(videos: Tensor, what: str, *, least: int = 1) -> None:
    """Raises UserError unless videos is uint8 [N >= least, T >= 5, H >= 16, W >= 16, 3]."""
    if videos.dtype != torch.uint8 or videos.dim() != 5 or videos.shape[-1] != 3:
        raise UserError(
            f"{what} videos must be uint8 [N, T, H, W, 3], got {videos.dtype} {list(videos.shape)}"
        )
    number, frames, height, width, _ = videos.shape
    if number < least:
        raise UserError(f"at least {least} {what} videos are needed, got {number}")
    if frames < 5:
        raise UserError(f"{what} videos must have at least 5 frames, got {frames}")
    if min(height, width) < 16:
        raise UserError(f"{what} videos must be at least 16x16 pixels, got {width}x{height}")


def motion(videos: Tensor, *, stride: int = 1) -> Motion:
    """The motion of each video.

    videos: uint8 [N, T, H, W, 3].
    stride: measures every stride-th pair of neighbouring frames, to save time on long videos.
    Raises UserError for other shapes or a stride that leaves fewer than two pairs.
    """
    check_videos(videos, "measured")
    number, frames, height, width, _ = videos.shape
    if not 1 <= stride <= frames - 2:
        raise UserError(f"the stride of the flow must be between 1 and {frames - 2}, got {stride}")
    # Flow runs from each measured frame to the one before it. Frames are counted from the end, so
    # that the last quarter is always seen.
    measured = torch.arange(frames - 1, 0, -stride).flip(0)
    video = torch.arange(number).repeat_interleave(len(measured))
    frame = measured.repeat(number)
    sums = []  # per measured frame: length, x, y; energy of the next change, and of its prediction
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    for some, now in zip(video.split(at_once), frame.split(at_once), strict=True):
        light = grey(videos[some, now])
        back = flow(light, grey(videos[some, now - 1]))
        length = torch.hypot(back[:, 0], back[:, 1]).mean(dim=(1, 2))
        onward = -back.mean(dim=(2, 3))
        last = now == frames - 1
        energy = _foretold(light, grey(videos[some, (now + 1).clamp(max=frames - 1)]), -back)
        energy = energy * ~last[:, None].to(energy.device)
        sums.append(torch.cat([length[:, None], onward, energy], dim=1).cpu().double())
    table = torch.cat(sums).view(number, len(measured), -1)
    late = measured >= frames - quarter(frames)
    energy = table[..., 3:].sum(dim=1)
    return Motion(
        magnitude=table[..., 0].mean(dim=1),
        late=table[:, late, 0].mean(dim=1),
        direction=table[..., 1:3].mean(dim=1),
        predictability=energy[:, 1] / energy[:, 0],
    )


def _foretold(frame: Tensor, following: Tensor, onward: Tensor) -> Tensor:
    """[K, 2]: energy of the change from frame to following [K, H, W], and how much of it goes on.

    onward: [K, 2, H, W], where each pixel goes if its motion goes on.
    """
    found, inside = warp(following[:, None], onward)
    change = ((following - frame).square() * inside[:, 0]).sum(dim=(1, 2))
    missed = ((found[:, 0] - frame).square() * inside[:, 0]).sum(dim=(1, 2))
    floor = ENERGY_FLOOR * inside.sum(dim=(1, 2, 3))
    return torch.stack([change + floor, change - missed], dim=1)


def motion_magnitude(videos: Tensor, *, stride: int = 1) -> Tensor:
    """float64 [N]: mean flow of each video in pixels per frame; see `motion`."""
    return motion(videos, stride=stride).magnitude


def motion_ratio(generated: Tensor, real: Tensor) -> float:
    """M: mean motion of generated videos over that of real ones (same prompts); both float [N].

    Raises UserError if the real videos do not move.
    """
    return float(generated.mean()) / real_motion(real)


def real_motion(real: Tensor) -> float:
    """The mean of real videos' flow, float [N]; raises UserError if they do not move."""
    reference = float(real.mean())
    if not reference > STILL:
        raise UserError(
            f"real videos must move more than {STILL:g} pixels per frame to measure M against "
            f"them, got {reference:g}"
        )
    return reference


def static_share(generated: Tensor, real_median: float) -> float:
    """S: the share of videos that move less than a quarter of the real median; float [N]."""
    return float((generated < STATIC_BELOW * real_median).double().mean())
