"""The grid of free cells, on maps made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aad1.worlds.doom.space import MapSpace, _reachable

Lumps = Callable[..., dict[str, bytes]]


def _free(space: MapSpace, x: float, y: float) -> bool:
    return bool(space.is_free(np.array([x, y])))


@pytest.mark.parametrize(
    ("change", "opens"),
    [
        ({}, True),
        ({"floor": 24}, True),
        ({"floor": 25}, False),  # too high to climb
        ({"floor": -24}, True),
        ({"floor": -25}, False),
        ({"ceiling": 56}, True),
        ({"ceiling": 55}, False),
        ({"floor": 24, "ceiling": 79}, False),  # 55 units of air over the step
        ({"flags": 4 | 1}, False),  # impassable
        ({"special": 39}, False),  # a teleport
        ({"special": 52}, False),  # an exit
        ({"special": 48}, True),  # a scrolling wall
    ],
)
def test_what_lies_between_two_rooms(
    make_lumps: Lumps, change: dict[str, Any], opens: bool
) -> None:
    space = MapSpace(make_lumps(**change))
    assert _free(space, 128, 256)
    assert _free(space, 384, 256) == _free(space, 256, 256) == opens


def test_free_points_keep_their_distance_from_walls(make_lumps: Lumps) -> None:
    points = MapSpace(make_lumps()).sample(np.random.default_rng(0), 20_000)
    assert points.shape == (20_000, 2)
    assert 22 <= points.min() < 22 + 16  # the clearance, and less than a cell more
    assert 512 - 22 - 16 < points.max() <= 512 - 22
    quarters = np.histogram2d(*points.T, bins=[[0, 256, 512]] * 2)[0] / len(points)
    assert np.allclose(quarters, 0.25, atol=0.015)


def test_only_solid_things_are_in_the_way(make_lumps: Lumps) -> None:
    space = MapSpace(make_lumps(things=((133, 256, 2028), (389, 256, 2014))))  # a lamp, a potion
    # 22 + 16 to the left of the lamp is x = 95, the last unit of the cell from 80 to 96.
    for dx, dy in ((0, 0), (-48, 0), (36, 0), (0, -36), (-36, 36)):
        assert not _free(space, 133 + dx, 256 + dy)
        assert _free(space, 389 + dx, 256 + dy)
    assert _free(space, 133 - 64, 256)
    assert _free(space, 133 + 56, 256)


def test_outside_the_map_nothing_is_free(make_lumps: Lumps) -> None:
    space = MapSpace(make_lumps())
    points = np.array([[[-1e4, 256], [256, -1e4]], [[1e4, 256], [256, 1e4]]])
    assert space.is_free(points).shape == (2, 2)
    assert not space.is_free(points).any()


def test_reachable_keeps_to_connected_cells() -> None:
    free = np.zeros((7, 9), bool)
    free[1:6, 1:4] = True  # a room
    free[3, 4:7] = True  # a corridor, winding
    free[1:4, 6] = True
    free[5, 6:8] = True  # another room, touching by a corner only
    reached = _reachable(free, np.array([1]), np.array([1]))
    expected = free.copy()
    expected[5, 6:8] = False
    assert np.array_equal(reached, expected)
