"""Domain-NIQE and drift, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.drift import FrameGaussian, drift, pace, segment_means, signed_drift


def test_distance_is_mahalanobis() -> None:
    features = torch.randn(500, 14, dtype=torch.float64) @ torch.randn(14, 14, dtype=torch.float64)
    gaussian = FrameGaussian.of(features)
    x = features.numpy()
    inverse = np.linalg.inv(np.cov(x.T))
    off = x[7] * 2 + 1 - x.mean(axis=0)
    expected = math.sqrt(off @ inverse @ off / 14)
    assert float(gaussian.distance(features[7] * 2 + 1)) == pytest.approx(expected, rel=1e-6)
    assert float(gaussian.distance(features).square().mean()) == pytest.approx(1, rel=0.01)


def test_segments_against_a_plain_loop() -> None:
    scores = torch.rand(3, 21, dtype=torch.float64)
    means = segment_means(scores, 1.5, 4.0)  # 6 frames each, 3 of them in 20
    expected = [[scores[n, 1 + 6 * k : 7 + 6 * k].mean() for k in range(3)] for n in range(3)]
    assert torch.allclose(means, torch.tensor(expected))
    assert drift(scores, 1.5, 4.0)[0] == pytest.approx(np.std(expected[0]))
    assert signed_drift(scores, 1.5, 4.0)[1] == pytest.approx(
        float(expected[1][2] - expected[1][0])
    )
    assert pace(scores, 40).shape == (3, 20)
    assert pace(scores, 5).shape == (3, 5)


def test_the_given_first_frame_does_not_count() -> None:
    scores = torch.ones(1, 9)
    scores[0, 0] = 100
    assert float(drift(scores, 1.0, 4.0)) == 0


def test_too_short_for_two_segments_says_how_long() -> None:
    with pytest.raises(UserError, match="two segments of 2 s.*20 frames are there"):
        drift(torch.rand(2, 21), 2.0, 6.0)
    with pytest.raises(UserError, match="no whole frame"):
        drift(torch.rand(2, 21), 0.01, 4.0)


def test_bad_frames_are_refused() -> None:
    with pytest.raises(UserError, match="finite"):
        FrameGaussian.of(torch.full((40, 14), math.nan))
    with pytest.raises(UserError, match="more than 14 frames"):
        FrameGaussian.of(torch.rand(10, 14))
