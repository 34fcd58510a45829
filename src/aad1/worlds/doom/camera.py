"""From the screen as the game draws it to a frame: averaged, softened and brightened."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aad1.worlds.doom.config import DoomConfig

_Bytes = npt.NDArray[np.uint8]


class Camera:
    """Makes frames of one config; keeps its tables and working memory from frame to frame."""

    def __init__(self, config: DoomConfig) -> None:
        self._supersample = config.supersample
        self._softness = config.softness
        self._lookup = _brighten(config.gamma, config.supersample**2)
        self._sums = np.empty((config.height, config.width, 3), np.uint16)
        self._down = _lens(config.height, config.softness)
        self._across = _lens(config.width, config.softness)

    def take(self, screen: _Bytes, out: _Bytes) -> None:
        """Write the frame [height, width, 3] of a screen [k height, k width, 3] into out.

        Each pixel is the mean of the k x k drawn ones it covers, softened and brightened.
        """
        k, sums = self._supersample, self._sums
        rows = np.add(screen[0::k], screen[1::k], dtype=np.uint16)
        for offset in range(2, k):
            rows += screen[offset::k]
        rows = rows.reshape(rows.shape[0], -1)
        # One channel at a time: numpy is slow where the innermost dimension is 3 long.
        for channel in range(3):
            total = sums[:, :, channel]
            np.add(rows[:, channel :: 3 * k], rows[:, channel + 3 :: 3 * k], out=total)
            for offset in range(2, k):
                total += rows[:, channel + 3 * offset :: 3 * k]
        if self._softness:
            soft = self._down @ sums.reshape(len(sums), -1).astype(np.float32)
            soft = soft.reshape(sums.shape).transpose(0, 2, 1) @ self._across.T
            sums[:] = np.rint(soft).transpose(0, 2, 1)
        np.take(self._lookup, sums, out=out, mode="clip")  # "raise" would buffer out


def _lens(size: int, softness: float) -> npt.NDArray[np.float32]:
    """[size, size] matrix that blurs a row of pixels; every row of it sums to 1, also at edges."""
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weight = np.exp(-0.5 * (distance / max(softness, 1e-3)) ** 2) * (abs(distance) <= 3)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def _brighten(gamma: float, count: int) -> _Bytes:
    """Table from the sum of `count` drawn values, 0 to 255 each, to the brightened mean."""
    table = 255 * np.linspace(0, 1, 255 * count + 1) ** (1 / gamma)
    return table.round().astype(np.uint8)
