"""Frames against the same optics written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from aad1.worlds.doom import DoomConfig
from aad1.worlds.doom.camera import Camera


def _blurred(image: npt.NDArray[Any], softness: float, axis: int) -> npt.NDArray[Any]:
    """A Gaussian of 7 taps along an axis; at the edges, of the taps that are inside."""
    size = image.shape[axis]
    total, weight = np.zeros_like(image), np.zeros(size)
    moved = np.moveaxis(total, axis, -1)
    source = np.moveaxis(image, axis, -1)
    for tap in range(-3, 4):
        gain = np.exp(-(tap**2) / (2 * softness**2))
        for pixel in range(max(0, -tap), min(size, size - tap)):
            moved[..., pixel] += gain * source[..., pixel + tap]
            weight[pixel] += gain
    moved /= weight
    return total


@pytest.mark.parametrize(
    ("width", "height", "supersample", "softness", "gamma"),
    [(128, 96, 2, 0.8, 1.7), (160, 120, 4, 1.5, 1.0), (128, 96, 4, 0.0, 1.7)],
)
def test_frames_are_means_softened_and_brightened(
    width: int, height: int, supersample: int, softness: float, gamma: float
) -> None:
    k = supersample
    config = DoomConfig(width=width, height=height, supersample=k, softness=softness, gamma=gamma)
    rng = np.random.default_rng(0)
    screen = rng.integers(0, 256, (k * height, k * width, 3), dtype=np.uint8)
    screen[:20, :20] = 255
    camera, out = Camera(config), np.empty((height, width, 3), np.uint8)
    camera.take(np.zeros_like(screen), out)  # nothing of it stays
    assert not out.any()
    camera.take(screen, out)

    wanted = screen.reshape(height, k, width, k, 3).astype(np.float64).mean(axis=(1, 3))
    if softness:
        wanted = _blurred(_blurred(wanted, softness, 0), softness, 1)
    wanted = 255 * (wanted / 255) ** (1 / gamma)
    # Sums are rounded to 1 / k^2 of a level before they are brightened, and once more after.
    assert np.abs(out - wanted).max() <= (1.0 if softness else 0.5 + 1e-9)
