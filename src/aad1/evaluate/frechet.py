"""Fréchet distances of videos to real ones, without any network: FDtd (motion) and FDnss (frames).

FDtd compares ten statistics of how neighbouring frames differ, FDnss fourteen natural-scene
statistics of single frames. Both are standardised by the real videos, so one unit is one real
standard deviation. A Fréchet distance between finite samples is above 0 even for equal
distributions: compare at equal numbers of videos, and always beside the floor (`report.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aad1.errors import UserError
from aad1.evaluate.motion import ENERGY_FLOOR, check_videos, grey, motion, quarter
from aad1.evaluate.niqe import NSS_NAMES, nss_features

TD_NAMES = (
    "d1_energy",
    "d2_energy",
    "d1_sparsity",
    "d1_concentration",
    "d1_smoothness",
    "d1_memory",
    "predictability",
    "unsteadiness",
    "trend",
    "chroma_energy",
)
"""The statistics of FDtd, in the order of `temporal_features`."""

LEAST_VIDEOS = 16
"""Fewest videos from which the covariance of ten statistics may be taken."""

_BLOCK = 8
_VIDEO_PIXELS_AT_ONCE = 2**21


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) between two feature sets.

    first, second: [N, D] and [M, D]; computed in float64. The square roots are taken of symmetric
    matrices by eigh, so the result is real, and singular covariances are no trouble.
    Raises UserError for fewer than two rows or values that are not finite.
    """
    return frechet_of_moments(*moments(first), *moments(second))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] (float64, unbiased) of features [N, D]."""
    if features.dim() != 2 or features.shape[0] < 2:
        raise UserError(f"features must be [N >= 2, D], got {list(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise UserError("features of the videos are not finite (NaN or infinity)")
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_of_moments(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The Fréchet distance of two Gaussians; means [D], covariances [D, D], float64."""
    root = _sqrt(cov1)
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def temporal_features(videos: Tensor, predictability: Tensor | None = None) -> Tensor:
    """The ten statistics of FDtd: float64 [N, 10] of uint8 [N, T, H, W, 3] at native frame rate.

    With d1 and d2 the first and second differences of luminance between neighbouring frames:
    d1_energy, d2_energy: log root mean square. Speed and contrast; freezing, jerks, flicker.
    d1_sparsity: mean |d1| / rms d1. Few large changes against many small ones.
    d1_concentration: variation over blocks of 8 pixels of the energy of d1, relative to its mean.
        Motion here and there against change everywhere.
    d1_smoothness: correlation of neighbouring pixels. About 0 for noise.
    d1_memory: correlation of d1 with the d1 of two frames later. About 0 for noise.
    predictability: share of d1 that the flow one frame earlier foretells (`motion.Motion`).
    unsteadiness: standard deviation over time of the log energy of d1. Flicker, freezing midway.
    trend: log energy of d1 in the last quarter less that in the first.
    chroma_energy: log root mean square of the difference of R - G and of B - Y. Colour flicker.

    A static video takes the floor of each logarithm and 0 for each correlation and share.
    predictability: float [N] from `motion.motion`, if it has been measured already.
    Raises UserError as `check_videos` does.
    """
    check_videos(videos, "measured")
    if predictability is None:
        predictability = motion(videos).predictability
    parts = _parts(videos)
    shares = predictability.split(parts[0].shape[0])
    features = [_temporal_of(part, share) for part, share in zip(parts, shares, strict=True)]
    return torch.cat(features).cpu().double()


def _parts(videos: Tensor) -> tuple[Tensor, ...]:
    pixels = videos[0, ..., 0].numel()
    return videos.split(max(1, _VIDEO_PIXELS_AT_ONCE // pixels))


def _temporal_of(videos: Tensor, predictability: Tensor) -> Tensor:
    light = grey(videos)
    d1 = light.diff(dim=1)
    d2 = d1.diff(dim=1)
    square1 = d1.square()
    energy_of_frame = square1.mean(dim=(2, 3)) + ENERGY_FLOOR  # [N, T - 1]
    energy1 = energy_of_frame.mean(dim=1)
    energy2 = d2.square().mean(dim=(1, 2, 3)) + ENERGY_FLOOR
    blocks = F.avg_pool2d(square1.mean(dim=1, keepdim=True), _BLOCK).flatten(1)
    color = videos.float()
    red_green = (color[..., 0] - color[..., 1]).diff(dim=1)
    blue_yellow = (color[..., 2] - light).diff(dim=1)
    chroma = (red_green.square() + blue_yellow.square()).mean(dim=(1, 2, 3)) + ENERGY_FLOOR
    log_energy = energy_of_frame.log()
    part = quarter(videos.shape[1])
    return torch.stack(
        [
            0.5 * energy1.log(),
            0.5 * energy2.log(),
            d1.abs().mean(dim=(1, 2, 3)) / energy1.sqrt(),
            blocks.std(dim=1) / (blocks.mean(dim=1) + ENERGY_FLOOR),
            _neighbour_correlation(d1, energy1),
            (d1[:, 2:] * d1[:, :-2]).mean(dim=(1, 2, 3)) / energy1,
            predictability.to(energy1),
            log_energy.std(dim=1),
            log_energy[:, -part:].mean(dim=1) - log_energy[:, :part].mean(dim=1),
            0.5 * chroma.log(),
        ],
        dim=1,
    )


def _neighbour_correlation(difference: Tensor, energy: Tensor) -> Tensor:
    across = (difference[..., 1:] * difference[..., :-1]).mean(dim=(1, 2, 3))
    down = (difference[..., 1:, :] * difference[..., :-1, :]).mean(dim=(1, 2, 3))
    return 0.5 * (across + down) / energy


def frame_features(videos: Tensor, part: str) -> Tensor:
    """The statistics of FDnss: float64 [N * q, 14] of the frames of one quarter of each video.

    part: "early" for the first quarter (without frame 0, which is given), "late" for the last.
    Raises UserError for another part, and as `check_videos` does.
    """
    check_videos(videos, "measured")
    frames = quarter(videos.shape[1])
    if part == "early":
        chosen = videos[:, 1 : 1 + frames]
    elif part == "late":
        chosen = videos[:, -frames:]
    else:
        raise UserError(f'part must be "early" or "late", got "{part}"')
    return torch.cat([nss_features(grey(some.flatten(0, 1))) for some in _parts(chosen)])


__all__ = [
    "LEAST_VIDEOS",
    "NSS_NAMES",
    "TD_NAMES",
    "frame_features",
    "frechet_distance",
    "frechet_of_moments",
    "moments",
    "temporal_features",
]
