"""Drift: how frame quality wanders over a video, from natural-scene statistics of its frames.

The domain-NIQE of a frame is its distance to the frames of real videos, as Mahalanobis's distance
in the fourteen statistics of `niqe.py`, divided by sqrt(14): about 1 for a real frame. A static
video does not drift, and one that is bad from its first frame on does not either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aad1.errors import UserError

_SMALLEST_VARIANCE = 1e-6  # share of the largest; directions in which real frames never differ


@dataclass(frozen=True, kw_only=True)
class FrameGaussian:
    """The statistics of real frames."""

    mean: Tensor
    """float64 [14]."""
    whiten: Tensor
    """float64 [14, 14]: (features - mean) @ whiten has unit covariance over real frames."""

    @staticmethod
    def of(features: Tensor) -> FrameGaussian:
        """Fits frames [..., 14]; UserError for values that are not finite or too few frames."""
        flat = features.flatten(0, -2).double()
        if not bool(torch.isfinite(flat).all()):
            raise UserError("statistics of the real frames are not finite (NaN or infinity)")
        if len(flat) <= flat.shape[1]:
            raise UserError(f"domain-NIQE needs more than {flat.shape[1]} frames, got {len(flat)}")
        values, vectors = torch.linalg.eigh(torch.cov(flat.T))
        values = values.clamp(min=_SMALLEST_VARIANCE * float(values.max()))
        return FrameGaussian(mean=flat.mean(dim=0), whiten=vectors / values.sqrt())

    def distance(self, features: Tensor) -> Tensor:
        """Domain-NIQE: float64 [...] of frames [..., 14]."""
        white = (features.double() - self.mean) @ self.whiten
        return white.square().mean(dim=-1).sqrt()


def segment_means(scores: Tensor, seconds: float, fps: float) -> Tensor:
    """Mean score of each whole segment: [N, T] -> [N, K]; the given first frame is left out.

    Raises UserError if fewer than two segments of that length fit.
    """
    length = round(seconds * fps)
    frames = scores.shape[1] - 1
    if length < 1:
        raise UserError(f"segments of {seconds:g} s are no whole frame at {fps:g} frames a second")
    count = frames // length
    if count < 2:
        raise UserError(
            f"needs two segments of {seconds:g} s ({length} frames each at {fps:g} fps) after the "
            f"first frame, {frames} frames are there"
        )
    return scores[:, 1 : 1 + count * length].unflatten(1, (count, length)).mean(dim=2)


def drift(scores: Tensor, seconds: float, fps: float) -> Tensor:
    """float64 [N]: population standard deviation of a video's segment means; see there."""
    return segment_means(scores, seconds, fps).std(dim=1, correction=0)


def signed_drift(scores: Tensor, seconds: float, fps: float) -> Tensor:
    """float64 [N]: the last segment's mean less the first's; above 0 frames get worse."""
    means = segment_means(scores, seconds, fps)
    return means[:, -1] - means[:, 0]


def pace(scores: Tensor, points: int) -> Tensor:
    """Mean score over up to `points` equal stretches of the video: [N, T] -> [N, K], for plots."""
    length = math.ceil((scores.shape[1] - 1) / points)
    count = (scores.shape[1] - 1) // length
    return scores[:, 1 : 1 + count * length].unflatten(1, (count, length)).mean(dim=2)
