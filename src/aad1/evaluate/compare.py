"""Generated videos against real ones: every figure, its interval, and what real videos get.

A figure is computed three times in the same way: of the generated videos; of resampled generated
videos, for the interval; and of groups of other real videos, as many as were generated, for the
floor. What cannot be computed carries its reason and no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aad1.errors import UserError
from aad1.evaluate.drift import FrameGaussian, drift, signed_drift
from aad1.evaluate.frechet import LEAST_VIDEOS
from aad1.evaluate.intervals import RESAMPLES, bootstrap, wilson
from aad1.evaluate.measure import Measured, check_alike
from aad1.evaluate.motion import STATIC_BELOW, quarter, real_motion
from aad1.evaluate.networks import CONSISTENCY as CONSISTENCY_NAMES
from aad1.evaluate.niqe import NSS_NAMES
from aad1.evaluate.report import Gaussian

SEGMENTS = (2.0, 1.0, 5.0)
"""Seconds; the first one is the figure that counts."""
MOST_FLOORS = 16
"""Groups of real videos from which a floor is taken."""

_SHARPNESS = NSS_NAMES.index("sharpness")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real videos, and what is fitted to them."""

    videos: Measured
    frames: FrameGaussian
    """Of all frames of real videos; for long videos it may come from shorter ones."""
    temporal: Gaussian
    early: Gaussian
    late: Gaussian
    motion: Gaussian | None
    """Of the motion network's features; None without them."""
    real_of: Mapping[str, int]
    """Key -> number of the real video that a generated one continues."""

    @staticmethod
    def of(videos: Measured, frames: FrameGaussian | None = None) -> Reference:
        """Fits real videos. UserError for fewer than two, no motion, or values not finite."""
        real_motion(videos.magnitude)
        return Reference(
            videos=videos,
            frames=frames or FrameGaussian.of(videos.nss[:, 1:]),
            temporal=Gaussian.of(videos.temporal),
            early=Gaussian.of(_early(videos).flatten(0, 1)),
            late=Gaussian.of(_late(videos).flatten(0, 1)),
            motion=Gaussian.of(videos.motion.flatten(0, 1)) if videos.motion.shape[1] else None,
            real_of={key: number for number, key in enumerate(videos.keys)},
        )

    def paired(self, videos: Measured, name: str) -> Tensor:
        """[N, 2]: a number of each video, and that of its real continuation.

        If one video has none, every video is set beside the mean of all real ones.
        """
        own, real = getattr(videos, name), getattr(self.videos, name)
        if all(key in self.real_of for key in videos.keys):
            beside = real[[self.real_of[key] for key in videos.keys]]
        else:
            beside = real.mean().expand(len(videos))
        return torch.stack([own, beside], dim=1)


def _early(videos: Measured) -> Tensor:
    return videos.nss[:, 1 : 1 + quarter(videos.frames)]


def _late(videos: Measured) -> Tensor:
    return videos.nss[:, -quarter(videos.frames) :]


Extract = Callable[[Measured, Reference], Tensor]
Reduce = Callable[[Tensor, Reference], float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a figure is made: numbers of each video, and one number of all of them."""

    name: str
    extract: Extract
    """[N, ...]: one row per video."""
    reduce: Reduce
    label: str
    ideal: str
    """What a perfect model gets: "1", "0", "real" (what real videos get) or "floor"."""
    blind: str
    """What it does not see."""
    least: int = 1
    """Fewest videos."""
    share: bool = False
    """Rows are hits; the interval is Wilson's."""
    distance: bool = False
    static_wins: bool = False
    """A static video scores as well as a real one or better: M must stand beside it."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of N generated videos; `value` is None where there is a `reason`."""

    value: float | None
    interval: tuple[float, float] | None
    floor: float | None
    """What other real videos get: the mean over groups of `floor_videos` each."""
    floor_range: tuple[float, float] | None
    videos: int
    floor_videos: int
    reason: str = ""
    M: float | None = None
    """Beside what a static video would win."""


def _mean(rows: Tensor, _: Reference) -> float:
    return float(rows.mean())


def _ratio(rows: Tensor, _: Reference) -> float:
    return float(rows[:, 0].mean()) / real_motion(rows[:, 1])


def wasserstein(one: Tensor, other: Tensor) -> float:
    """Wasserstein-1 distance of two samples of numbers, [N] and [M]; exact for any N and M."""
    values = torch.cat([one, other]).double().sort().values
    below = values[:-1]
    first = torch.searchsorted(one.double().sort().values, below, right=True).double()
    second = torch.searchsorted(other.double().sort().values, below, right=True).double()
    return float(((first / len(one) - second / len(other)).abs() * values.diff()).sum())


def _scores(videos: Measured, reference: Reference) -> Tensor:
    return reference.frames.distance(videos.nss)


def _flicker_ratio(rows: Tensor, reference: Reference) -> float:
    real = float(reference.videos.flicker.mean())
    if not real > 0:
        raise UserError("the real videos do not flicker at all: no ratio to them")
    return float(rows.mean()) / real


def _drift_of(seconds: float) -> Extract:
    return lambda v, r: drift(_scores(v, r), seconds, v.fps)


def _drift_ratio(seconds: float) -> Reduce:
    def reduce(rows: Tensor, reference: Reference) -> float:
        videos = reference.videos
        real = float(drift(_scores(videos, reference), seconds, videos.fps).mean())
        if not real > 0:
            raise UserError("the real videos do not drift at all: no ratio to them")
        return float(rows.mean()) / real

    return reduce


_NO_NETWORKS = "there are no metric networks for this world (runs/train_metrics.py)"


def _consistency_of(name: str) -> Extract:
    def extract(videos: Measured, _: Reference) -> Tensor:
        if videos.consistency.shape[1] == 0:
            raise UserError(_NO_NETWORKS)
        return videos.consistency[:, CONSISTENCY_NAMES.index(name)]

    return extract


def _motion_windows(videos: Measured, reference: Reference) -> Tensor:
    if videos.motion.shape[2] == 0:
        raise UserError(_NO_NETWORKS)
    if videos.motion.shape[1] == 0 or reference.motion is None:
        raise UserError(f"the motion network sees more than {videos.frames} frames at once")
    return videos.motion


def _motion_distance(rows: Tensor, reference: Reference) -> float:
    assert reference.motion is not None
    return reference.motion.distance(rows.flatten(0, 1))


_STILL = "a static video scores as well or better"

MOTION: tuple[Metric, ...] = (
    Metric(
        name="M", label="motion ratio M", ideal="1",
        extract=lambda v, r: r.paired(v, "magnitude"), reduce=_ratio,
        blind="quality and direction; noise counts as some motion",
    ),
    Metric(
        name="late_M", label="motion ratio, last quarter", ideal="1",
        extract=lambda v, r: r.paired(v, "late"), reduce=_ratio,
        blind="as M",
    ),
    Metric(
        name="S", label="share of static videos", ideal="real", share=True,
        extract=lambda v, r: (
            v.magnitude < STATIC_BELOW * r.videos.magnitude.median()
        ).double(), reduce=_mean,
        blind="videos that move a little",
    ),
    Metric(
        name="W1_flow", label="Wasserstein-1 of flow, pixels per frame", ideal="floor",
        extract=lambda v, r: v.magnitude,
        reduce=lambda rows, r: wasserstein(rows, r.videos.magnitude),
        blind="direction, quality", distance=True, least=8,
    ),
    Metric(
        name="smoothness", label="smoothness (proxy)", ideal="real", static_wins=True,
        extract=lambda v, r: v.smoothness, reduce=_mean, blind=_STILL,
    ),
    Metric(
        name="flicker", label="flicker, ratio to real", ideal="1", static_wins=True,
        extract=lambda v, r: v.flicker, reduce=_flicker_ratio,
        blind=f"slow change; {_STILL}",
    ),
)  # fmt: skip

QUALITY: tuple[Metric, ...] = (
    Metric(
        name="niqe", label="domain-NIQE of frames", ideal="real", static_wins=True,
        extract=lambda v, r: _scores(v, r)[:, 1:].mean(dim=1), reduce=_mean,
        blind="motion, meaning; a static video keeps its frame's",
    ),
    Metric(
        name="sharpness", label="sharpness, ratio to real", ideal="1", static_wins=True,
        extract=lambda v, r: v.nss[:, 1:, _SHARPNESS].mean(dim=1),
        reduce=lambda rows, r: math.exp(
            float(rows.mean()) - float(r.videos.nss[:, 1:, _SHARPNESS].mean())
        ),
        blind="noise counts as sharp; a static video keeps its frame's",
    ),
    Metric(
        name="FDtd", label="Fréchet distance of frame differences", ideal="floor",
        extract=lambda v, r: v.temporal,
        reduce=lambda rows, r: r.temporal.distance(rows),
        blind="what a single frame looks like", distance=True, least=LEAST_VIDEOS,
    ),
    Metric(
        name="FD_motion", label="Fréchet distance of motion features", ideal="floor",
        extract=_motion_windows, reduce=_motion_distance,
        blind="appearance; what the motion network was not taught", distance=True,
        least=LEAST_VIDEOS,
    ),
    Metric(
        name="FDnss_early", label="Fréchet distance of frames, first quarter", ideal="floor",
        extract=lambda v, r: _early(v),
        reduce=lambda rows, r: r.early.distance(rows.flatten(0, 1)),
        blind="motion: a static video is near the floor", distance=True, least=LEAST_VIDEOS,
        static_wins=True,
    ),
    Metric(
        name="FDnss_late", label="Fréchet distance of frames, last quarter", ideal="floor",
        extract=lambda v, r: _late(v),
        reduce=lambda rows, r: r.late.distance(rows.flatten(0, 1)),
        blind="motion: a static video is near the floor", distance=True, least=LEAST_VIDEOS,
        static_wins=True,
    ),
)  # fmt: skip

CONSISTENCY: tuple[Metric, ...] = tuple(
    Metric(
        name=f"consistency_{name}", label=label, ideal="real", static_wins=True,
        extract=_consistency_of(name), reduce=_mean,
        blind="motion, and what the frame encoder was not taught: a static video is 1",
    )
    for name, label in zip(
        CONSISTENCY_NAMES,
        (
            "subject consistency (proxy)", "background consistency (proxy)",
            "likeness to the first frame (proxy)", "likeness of the last frame to the first",
        ),
        strict=True,
    )
)  # fmt: skip

_DRIFT_BLIND = "static is best of all, and bad from the start does not drift"
DRIFT: tuple[Metric, ...] = (
    *(
        Metric(
            name=f"drift_{s:g}s", label=f"drift over segments of {s:g} s", ideal="real",
            extract=_drift_of(s), reduce=_mean, blind=_DRIFT_BLIND, static_wins=True,
        )
        for s in SEGMENTS
    ),
    *(
        Metric(
            name=f"drift_ratio_{s:g}s", label=f"drift, ratio to real, segments of {s:g} s",
            ideal="1", extract=_drift_of(s), reduce=_drift_ratio(s), blind=_DRIFT_BLIND,
            static_wins=True,
        )
        for s in SEGMENTS
    ),
    Metric(
        name="signed_drift", label="last 2 s less first 2 s, domain-NIQE", ideal="real",
        extract=lambda v, r: signed_drift(_scores(v, r), SEGMENTS[0], v.fps), reduce=_mean,
        blind="what gets worse and better again; static is 0", static_wins=True,
    ),
    Metric(
        name="color_shift", label="colour shift, last quarter against first", ideal="real",
        extract=lambda v, r: v.color_shift, reduce=_mean,
        blind="real videos shift as new things come into view; static is 0", static_wins=True,
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {m.name: m for m in (*MOTION, *QUALITY, *CONSISTENCY, *DRIFT)}


def groups_of(number: int, size: int, most: int = MOST_FLOORS) -> list[range]:
    """Disjoint groups of `size` out of `number` videos; one smaller group if there is no more."""
    if size >= number:
        return [range(number)]
    return [range(k, k + size) for k in range(0, number - size + 1, size)][:most]


def compare(
    generated: Measured,
    reference: Reference,
    other: Measured | None,
    metrics: Sequence[Metric],
    *,
    floor_reference: Reference | None = None,
    any_length: bool = False,
    resamples: int = RESAMPLES,
) -> dict[str, Figure]:
    """Each metric's figure of the generated videos.

    other: real videos that are not in the reference, for the floors; None leaves floors out.
    floor_reference: what the floors are measured against, if not the reference.
    any_length: lets videos be of another length than the real ones; for metrics that are means
        over frames, no others.
    resamples: of the bootstrap; 0 leaves intervals out.
    Raises UserError if the videos differ in shape or rate from the real ones. A metric that cannot
    be computed raises nothing: its figure says why.
    """
    if not any_length:
        for videos in (generated, *([] if other is None else [other])):
            check_alike(videos, reference.videos)
    against = floor_reference or reference
    groups = [] if other is None else groups_of(len(other), len(generated))
    out: dict[str, Figure] = {}
    for metric in metrics:
        floors: list[float] = []
        for group in groups:
            assert other is not None
            try:
                floors.append(_value(metric, other.select(group), against))
            except UserError:
                floors = []
                break
        shared: dict[str, Any] = {
            "floor": sum(floors) / len(floors) if floors else None,
            "floor_range": (min(floors), max(floors)) if floors else None,
        }
        numbers: dict[str, Any] = {
            "videos": len(generated),
            "floor_videos": len(groups[0]) if groups else 0,
        }
        try:
            value = _value(metric, generated, reference)
            interval = _interval(metric, generated, reference, resamples) if resamples else None
            out[metric.name] = Figure(value=value, interval=interval, **shared, **numbers)
        except UserError as error:
            out[metric.name] = not_computed(str(error), **numbers)
    return out


def not_computed(reason: str, videos: int = 0, floor_videos: int = 0) -> Figure:
    """A figure without a number, and why."""
    return Figure(
        value=None, interval=None, floor=None, floor_range=None,
        videos=videos, floor_videos=floor_videos, reason=reason,
    )  # fmt: skip


def _rows(metric: Metric, videos: Measured, reference: Reference) -> Tensor:
    if len(videos) < metric.least:
        raise UserError(f"needs at least {metric.least} videos, {len(videos)} are there")
    rows = metric.extract(videos, reference)
    if not bool(torch.isfinite(rows).all()):
        raise UserError("the statistics of some videos are not finite (NaN or infinity)")
    return rows


def _value(metric: Metric, videos: Measured, reference: Reference) -> float:
    value = metric.reduce(_rows(metric, videos, reference), reference)
    if not math.isfinite(value):
        raise UserError("the result is not finite (NaN or infinity)")
    return value


def _interval(
    metric: Metric, videos: Measured, reference: Reference, resamples: int
) -> tuple[float, float] | None:
    rows = _rows(metric, videos, reference)
    if metric.share:
        return wilson(int(rows.sum()), len(rows))
    if metric.name.startswith("drift_ratio"):  # the real part is the same in every resample
        scale = metric.reduce(torch.ones(1), reference)
        return bootstrap(
            lambda index: scale * float(rows[index].mean()), videos.keys, resamples=resamples
        )
    return bootstrap(
        lambda index: metric.reduce(rows[index], reference),
        videos.keys,
        centered=metric.distance,
        resamples=resamples,
    )


def beside(figures: dict[str, Figure], motion: Figure) -> dict[str, Figure]:
    """The figures, with M noted at each that a static video would win."""
    return {
        name: replace(figure, M=motion.value)
        if name not in METRICS or METRICS[name].static_wins
        else figure
        for name, figure in figures.items()
    }
