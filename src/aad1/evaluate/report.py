"""One table of figures per model: M, late M, S, FDtd, FDnss, and the floors and cheats beside them.

Real videos are measured once (`measure_real`) and kept as a small JSON file, so that generated ones
can be judged without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.evaluate.frechet import (
    LEAST_VIDEOS,
    NSS_NAMES,
    TD_NAMES,
    frame_features,
    frechet_of_moments,
    moments,
    temporal_features,
)
from aad1.evaluate.motion import check_videos, motion, motion_ratio, real_motion, static_share

MOTION_BAND = (0.6, 1.4)
"""M between these counts as real motion."""
BASELINE_SHARE = 0.5
"""FDtd must be at most this share of a baseline's."""
NOISE_SHARE = 0.75
"""FDtd must be at most this share of that of the best static video with moving noise on it."""

# Grey levels, root mean square. More than this no longer lies on the picture but hides it.
_NOISE_AMPLITUDES = (8.0, 11.0, 16.0, 23.0, 32.0)
_NOISES = ("fresh", "drifting", "drifting_smooth")
_MOST_CHEATS = 32  # videos per cheat; their distances are large, so few tell enough
_SPREAD_FLOOR = 1e-3  # of a statistic over real videos, below which a deviation is rounding

_Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """What a Fréchet distance keeps of real features, in units of their own deviations."""

    center: tuple[float, ...]
    """Mean of each statistic over the real videos."""
    scale: tuple[float, ...]
    """Standard deviation of each."""
    covariance: _Matrix
    """Covariance after centring and scaling."""

    @staticmethod
    def of(features: Tensor) -> Gaussian:
        """Fits features [N, D]; raises UserError as `frechet.moments` does."""
        center, covariance = moments(features)
        scale = covariance.diagonal().sqrt().clamp(min=_SPREAD_FLOOR)
        return Gaussian(
            center=tuple(center.tolist()),
            scale=tuple(scale.tolist()),
            covariance=tuple(map(tuple, (covariance / (scale[:, None] * scale)).tolist())),
        )

    def distance(self, features: Tensor) -> float:
        """Fréchet distance of features [N, D] to this, standardised by its scale."""
        center = torch.tensor(self.center, dtype=torch.float64)
        scale = torch.tensor(self.scale, dtype=torch.float64)
        mean, covariance = moments((features.double() - center) / scale)
        zero = torch.zeros_like(center)
        own = torch.tensor(self.covariance, dtype=torch.float64)
        return frechet_of_moments(mean, covariance, zero, own)


@dataclass(frozen=True, kw_only=True)
class Cheat:
    """A video made without any model from real first frames, and how well it scores."""

    name: str
    M: float
    FDtd: float


@dataclass(frozen=True, kw_only=True)
class RealStatistics:
    """All that judging generated videos needs of the real ones."""

    num_videos: int
    frames: int
    height: int
    width: int
    stride: int
    """Every stride-th pair of frames was measured; generated videos are measured alike."""
    mean_motion: float
    """Mean flow in pixels per frame."""
    median_motion: float
    late_motion: float
    """Mean flow over the last quarter of the frames."""
    temporal: Gaussian
    early: Gaussian
    late: Gaussian
    floor_num_videos: int
    """Videos on either side of the floors."""
    floors: dict[str, float]
    """M, late_M, FDtd and both FDnss of other real videos: what a perfect model gets."""
    cheats: tuple[Cheat, ...] = ()
    """The frozen first frame, then the frozen frame with moving noise of several kinds."""

    def save(self, path: Path) -> None:
        """Writes JSON, by way of a temporary file."""
        with replace_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> RealStatistics:
        """Reads what `save` wrote; raises UserError for a file that is missing or not such JSON."""
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            for name, statistics in (
                ("temporal", TD_NAMES),
                ("early", NSS_NAMES),
                ("late", NSS_NAMES),
            ):
                record[name] = _gaussian(record[name], len(statistics))
            record["cheats"] = tuple(Cheat(**cheat) for cheat in record["cheats"])
            return RealStatistics(**record)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read real statistics from {path}: {error}") from error


def _gaussian(record: Mapping[str, Any], size: int) -> Gaussian:
    center, scale = tuple(record["center"]), tuple(record["scale"])
    covariance = tuple(map(tuple, record["covariance"]))
    if {len(center), len(scale), len(covariance), *map(len, covariance)} != {size}:
        raise ValueError(f"{size} statistics are wanted, {len(center)} are there")
    return Gaussian(center=center, scale=scale, covariance=covariance)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    magnitude: Tensor
    late_magnitude: Tensor
    temporal: Tensor
    early: Tensor
    late: Tensor


def _measure(videos: Tensor, stride: int) -> _Measured:
    moving = motion(videos, stride=stride)
    return _Measured(
        magnitude=moving.magnitude,
        late_magnitude=moving.late,
        temporal=temporal_features(videos, moving.predictability),
        early=frame_features(videos, "early"),
        late=frame_features(videos, "late"),
    )


def measure_real(
    real: Tensor, other: Tensor | None = None, *, stride: int = 1, cheats: bool = False
) -> RealStatistics:
    """Measures real videos once and for all.

    real: uint8 [N, T, H, W, 3], the reference.
    other: further real videos of the same shape, best as many as are going to be generated; the
        floors are their distances to the reference. Without them the floors are those between
        two halves of `real`, about twice as high as at N against N.
    stride: measures motion on every stride-th pair of frames.
    cheats: also measures the static videos that `motion_check` holds generated ones against; this
        costs as much as measuring 16 x min(N, 32) videos.
    Raises UserError for too few videos (16; 32 without `other`), wrong shapes or no motion.
    """
    check_videos(real, "real", least=LEAST_VIDEOS * (1 if other is not None else 2))
    measured = _measure(real, stride)
    if other is None:
        half = real.shape[0] // 2
        one, two = _part(measured, slice(0, half)), _part(measured, slice(half, 2 * half))
    else:
        check_videos(other, "other real", least=LEAST_VIDEOS)
        _check_same_shape(other, tuple(real.shape[1:4]))
        half = other.shape[0]
        one, two = measured, _measure(other, stride)
    statistics = RealStatistics(
        num_videos=real.shape[0],
        frames=real.shape[1],
        height=real.shape[2],
        width=real.shape[3],
        stride=stride,
        mean_motion=real_motion(measured.magnitude),
        median_motion=float(measured.magnitude.median()),
        late_motion=real_motion(measured.late_magnitude),
        temporal=Gaussian.of(measured.temporal),
        early=Gaussian.of(measured.early),
        late=Gaussian.of(measured.late),
        floor_num_videos=half,
        floors={
            "M": motion_ratio(two.magnitude, one.magnitude),
            "late_M": motion_ratio(two.late_magnitude, one.late_magnitude),
            "FDtd": Gaussian.of(one.temporal).distance(two.temporal),
            "FDnss_early": Gaussian.of(one.early).distance(two.early),
            "FDnss_late": Gaussian.of(one.late).distance(two.late),
        },
    )
    if not cheats:
        return statistics
    source = real if other is None else other
    return _with_cheats(statistics, source[:_MOST_CHEATS, 0])


def _part(measured: _Measured, videos: slice) -> _Measured:
    number = measured.magnitude.shape[0]

    def frames_of(features: Tensor) -> Tensor:
        return features.unflatten(0, (number, -1))[videos].flatten(0, 1)

    return _Measured(
        magnitude=measured.magnitude[videos],
        late_magnitude=measured.late_magnitude[videos],
        temporal=measured.temporal[videos],
        early=frames_of(measured.early),
        late=frames_of(measured.late),
    )


def evaluate_videos(generated: Tensor, real: RealStatistics | Tensor) -> dict[str, float]:
    """The figures of generated videos, with floors.

    generated: uint8 [N, T, H, W, 3] with N >= 16; compare at the N of the real videos.
    real: their statistics, or real videos of the same shape (N >= 32).
    Returns M, late_M, S, FDtd, FDnss_early, FDnss_late; floor_* of each but S; num_generated,
    num_real, floor_num_videos.
    Raises UserError for too few videos, or for another shape than the real ones'.
    """
    statistics = real if isinstance(real, RealStatistics) else measure_real(real)
    check_videos(generated, "generated", least=LEAST_VIDEOS)
    _check_same_shape(generated, (statistics.frames, statistics.height, statistics.width))
    measured = _measure(generated, statistics.stride)
    figures = {
        "M": float(measured.magnitude.mean()) / statistics.mean_motion,
        "late_M": float(measured.late_magnitude.mean()) / statistics.late_motion,
        "S": static_share(measured.magnitude, statistics.median_motion),
        "FDtd": statistics.temporal.distance(measured.temporal),
        "FDnss_early": statistics.early.distance(measured.early),
        "FDnss_late": statistics.late.distance(measured.late),
    }
    unfit = [name for name, value in figures.items() if not math.isfinite(value)]
    if unfit:
        raise UserError(f"{', '.join(unfit)} of the generated videos are not finite")
    return {
        **figures,
        **{f"floor_{name}": value for name, value in statistics.floors.items()},
        "num_generated": generated.shape[0],
        "num_real": statistics.num_videos,
        "floor_num_videos": statistics.floor_num_videos,
    }


def _check_same_shape(videos: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(videos.shape[1:4]) != shape:
        raise UserError(
            "videos must have the real ones' frames, height and width, "
            f"{list(shape)}, got {list(videos.shape[1:4])}"
        )


@dataclass(frozen=True, kw_only=True)
class MotionCheck:
    """Whether videos truly move as real ones do, and why not."""

    passed: bool
    failures: tuple[str, ...]
    bound: float
    """The highest FDtd that would have passed."""


def motion_check(
    figures: Mapping[str, float],
    real: RealStatistics,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> MotionCheck:
    """Do generated videos move as much as real ones, and in the same manner?

    figures: from `evaluate_videos`; real: from `measure_real(..., cheats=True)`; baselines: figures
        of models to beat, by name (an untrained one, an earlier stage).
    Passes if M is within MOTION_BAND, FDtd is at most half that of the frozen first frame and of
    each baseline, and at most NOISE_SHARE of that of every cheat: a frozen frame under moving noise
    whose amplitude gives it an M within the band. M alone would pass such noise, and FDtd alone
    puts it well below the frozen frame, whose logarithms of 0 lie far out. Noise is tried at up to
    32 grey levels root mean square, fresh, drifting, and drifting in larger grains.
    Raises UserError if real was measured without cheats, or figures are missing.
    """
    if not real.cheats:
        raise UserError("the real statistics hold no cheats: measure them with cheats=True")
    try:
        ratio, distance = figures["M"], figures["FDtd"]
        bounds = {
            f"{BASELINE_SHARE} of {name}": BASELINE_SHARE * baseline["FDtd"]
            for name, baseline in (baselines or {}).items()
        }
    except KeyError as error:
        raise UserError(f"the figures lack {error}") from error
    frozen, *noises = real.cheats
    bounds[f"{BASELINE_SHARE} of {frozen.name}"] = BASELINE_SHARE * frozen.FDtd
    for noise in noises:
        if _in_band(noise.M):
            bounds[f"{NOISE_SHARE} of {noise.name}"] = NOISE_SHARE * noise.FDtd
    failures = []
    if not _in_band(ratio):
        failures.append(f"M = {ratio:.2f} is outside {MOTION_BAND[0]} to {MOTION_BAND[1]}")
    for name, bound in bounds.items():
        if not distance <= bound:
            failures.append(f"FDtd = {distance:.1f} is above {bound:.1f}, {name}")
    return MotionCheck(passed=not failures, failures=tuple(failures), bound=min(bounds.values()))


def _in_band(ratio: float) -> bool:
    return MOTION_BAND[0] <= ratio <= MOTION_BAND[1]


def _with_cheats(statistics: RealStatistics, images: Tensor) -> RealStatistics:
    """Measures what needs no model: images [N, H, W, 3] frozen, and frozen under moving noise."""

    def judge(name: str, videos: Tensor) -> Cheat:
        moving = motion(videos, stride=statistics.stride)
        features = temporal_features(videos, moving.predictability)
        return Cheat(
            name=name,
            M=float(moving.magnitude.mean()) / statistics.mean_motion,
            FDtd=statistics.temporal.distance(features),
        )

    frozen = images[:, None].expand(-1, statistics.frames, -1, -1, -1)
    cheats = [judge("frozen", frozen)]
    for kind in _NOISES:
        noise = moving_noise(frozen.shape[:4], kind).to(images.device)
        for amplitude in _NOISE_AMPLITUDES:
            videos = (frozen + amplitude * noise[..., None]).round().clamp(0, 255)
            name = f"frozen_{kind}_noise_{amplitude:g}"
            cheats.append(judge(name, videos.to(torch.uint8)))
    return replace(statistics, cheats=tuple(cheats))


def moving_noise(shape: tuple[int, ...], kind: str, seed: int = 0) -> Tensor:
    """Noise of unit variance, float [N, T, H, W], the same for a seed on any device.

    kind: "fresh" (drawn anew for each frame), "drifting" (white, one pixel to the right per frame)
    or "drifting_smooth" (the same, of grain size about 5 pixels).
    """
    generator = torch.Generator().manual_seed(seed)
    number, frames, height, width = shape
    if kind == "fresh":
        return torch.randn(number, frames, height, width, generator=generator)
    if kind not in _NOISES:
        raise UserError(f"the kind of noise must be one of {', '.join(_NOISES)}, got {kind}")
    noise = torch.randn(number, 1, height, width, generator=generator)
    if kind == "drifting_smooth":
        for _ in range(2):
            noise = F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="circular"), 5, 1)
        noise = noise / noise.std(dim=(2, 3), keepdim=True)
    return torch.cat([noise.roll(frame, dims=3) for frame in range(frames)], dim=1)


__all__ = [
    "BASELINE_SHARE",
    "MOTION_BAND",
    "NOISE_SHARE",
    "Cheat",
    "Gaussian",
    "MotionCheck",
    "RealStatistics",
    "evaluate_videos",
    "measure_real",
    "motion_check",
    "moving_noise",
]
