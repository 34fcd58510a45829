from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine leaves its settings in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_lumps() -> Callable[..., dict[str, bytes]]:
    """Lumps of a map of two rooms, 512 x 512 in all, with a line between them at x = 256.

    floor, ceiling: of the right room; the left one has 0 and 128.
    flags, special: of the line between.
    things: (x, y, type); the player's start is at (64, 64).
    """

    def make(
        *,
        floor: int = 0,
        ceiling: int = 128,
        flags: int = 4,
        special: int = 0,
        things: tuple[tuple[int, int, int], ...] = (),
    ) -> dict[str, bytes]:
        corners = [(0, 0), (0, 512), (256, 512), (512, 512), (512, 0), (256, 0)]
        solid = 0xFFFF
        # Ends, flags, special, tag, front side, back side. The first three walls are the left's.
        outline = [(0, 1), (1, 2), (5, 0), (2, 3), (3, 4), (4, 5)]
        lines = [(a, b, 1, 0, 0, i // 3, solid) for i, (a, b) in enumerate(outline)]
        lines.append((2, 5, flags, special, 0, 0, 1))
        sides = [[0] * 14 + [sector] for sector in (0, 1)]
        sectors = [[0, 128] + [0] * 11, [floor, ceiling] + [0] * 11]
        placed = [(x, y, 0, kind, 7) for x, y, kind in ((64, 64, 1), *things)]
        return {
            "THINGS": np.array(placed, "<i2").tobytes(),
            "LINEDEFS": np.array(lines, "<u2").tobytes(),
            "SIDEDEFS": np.array(sides, "<u2").tobytes(),
            "VERTEXES": np.array(corners, "<i2").tobytes(),
            "SECTORS": np.array(sectors, "<i2").tobytes(),
        }

    return make
