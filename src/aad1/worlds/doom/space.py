"""Where on a map the player can stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import numpy as np
import numpy.typing as npt

_Bools = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]
_Reals = npt.NDArray[np.float64]

_CELL = 16.0  # map units per grid cell
# The player is a box of half-width 16 that steps up 24 units and needs 56 units of height. The
# planned path keeps a little more distance from walls than the player needs.
_CLEARANCE = 22.0
_STEP = 24
_HEADROOM = 56
_THING_RADIUS = 16.0
# Crossing these lines teleports the player or ends the level (Doom and Boom line types).
_TELEPORTS = (39, 97, 125, 126, 174, 195, *range(207, 211), 243, 244, *range(262, 270))
_EXITS = (52, 124, 197, 198)
# Decorations that stand in the way (Doom thing numbers): pillars, trees, lamps, torches, barrels,
# and what hangs or is impaled.
_SOLID_THINGS = (
    *(*range(25, 34), 35, 36, 37, *range(41, 58), 70, *range(73, 79)),
    *(85, 86, 2028, 2035),
)


class MapSpace:
    """The cells of a map on which the player can stand, on a grid of 16 map units.

    Read from the map's lumps: walls, steps too high to climb (or to fall off unnoticed), low
    ceilings, closed doors and solid decorations are filled in, and what cannot be reached from
    where the map places its things is left out.

    lumps: as wads.read_map gives them.
    free: bool [rows, columns], rows along y; its border is never free.
    origin: (x, y) of the grid's corner in map units.
    """

    def __init__(self, lumps: Mapping[str, bytes]) -> None:
        vertexes = np.frombuffer(lumps["VERTEXES"], "<i2").reshape(-1, 2).astype(np.float64)
        things = np.frombuffer(lumps["THINGS"], "<i2").reshape(-1, 5)
        places = things[:, :2].astype(np.float64)
        obstacles = (
            (_CLEARANCE, _points_along(vertexes[_walls(lumps)])),
            (_CLEARANCE + _THING_RADIUS, places[np.isin(things[:, 3], _SOLID_THINGS)]),
        )
        self.origin = vertexes.min(axis=0) - 4 * _CELL
        columns, rows = np.ceil((vertexes.max(axis=0) - self.origin) / _CELL).astype(int) + 4
        free = np.ones((rows, columns), bool)
        # No cell is free that has an obstacle within the clearance box around some point of it.
        for box, centres in obstacles:
            offsets = np.linspace(-box, box, 2 * math.ceil(box / _CELL) + 1)
            for offset in product(offsets, offsets):
                free[self._cells(centres + offset)] = False
        self.free = _reachable(free, *self._cells(places))
        self._free_cells = np.nonzero(self.free)

    def _cells(self, points: _Reals) -> tuple[_Ints, _Ints]:
        """Rows and columns [...] of points [..., 2]."""
        cell = np.floor((points - self.origin) / _CELL).astype(np.int64)
        return cell[..., 1], cell[..., 0]

    def is_free(self, points: _Reals) -> _Bools:
        """Whether the player can stand at points [..., 2] (map units); False outside the map."""
        row, column = self._cells(points)
        height, width = self.free.shape
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        found: _Bools = inside & self.free[np.where(inside, row, 0), np.where(inside, column, 0)]
        return found

    def sample(self, rng: np.random.Generator, count: int) -> _Reals:
        """Free points [count, 2], uniform over the free area."""
        rows, columns = self._free_cells
        pick = rng.integers(len(rows), size=count)
        cells = np.stack([columns[pick], rows[pick]], axis=1)
        return self.origin + (cells + rng.uniform(0, 1, (count, 2))) * _CELL


def _walls(lumps: Mapping[str, bytes]) -> _Ints:
    """The lines that a walk must not cross, as the numbers [n, 2] of their end points."""
    lines = np.frombuffer(lumps["LINEDEFS"], "<u2").reshape(-1, 7).astype(np.int64)
    sides = np.frombuffer(lumps["SIDEDEFS"], "<u2").reshape(-1, 15)[:, 14].astype(np.int64)
    heights = np.frombuffer(lumps["SECTORS"], "<i2").reshape(-1, 13)[:, :2].astype(np.int64)
    one_sided = (lines[:, 5] == 0xFFFF) | (lines[:, 6] == 0xFFFF)
    # [lines, 2] floor and ceiling on either side; what they are for one-sided lines is not used.
    front = heights[sides[np.where(one_sided, 0, lines[:, 5])]]
    back = heights[sides[np.where(one_sided, 0, lines[:, 6])]]
    step = np.abs(front[:, 0] - back[:, 0])
    opening = np.minimum(front[:, 1], back[:, 1]) - np.maximum(front[:, 0], back[:, 0])
    impassable = lines[:, 2] & 1 != 0
    leads_away = np.isin(lines[:, 3], _TELEPORTS + _EXITS)
    blocking = one_sided | impassable | (step > _STEP) | (opening < _HEADROOM) | leads_away
    return lines[blocking, :2]


def _points_along(walls: _Reals) -> _Reals:
    """Points [m, 2] at most 8 units apart along walls [n, 2 ends, 2]."""
    starts, ends = walls[:, 0], walls[:, 1]
    counts = np.maximum(np.ceil(np.hypot(*(ends - starts).T) / 8).astype(int), 1) + 1
    wall = np.repeat(np.arange(len(counts)), counts)
    along = np.concatenate([np.linspace(0, 1, n) for n in counts])[:, None]
    return starts[wall] * (1 - along) + ends[wall] * along


def _reachable(free: _Bools, rows: _Ints, columns: _Ints) -> _Bools:
    """The part of `free` that is 4-connected to the given cells.

    Alternately along rows and columns, every run of free cells that holds a reached cell is
    reached as a whole; a few dozen passes settle a map.
    """
    reached = np.zeros_like(free)
    reached[rows, columns] = True
    reached &= free
    while True:
        before = np.count_nonzero(reached)
        for transpose in (False, True):
            inside = free.T if transpose else free
            seen = (reached.T if transpose else reached).ravel()
            run = np.cumsum(~inside.ravel())  # constant along a run of free cells
            # The border is never free, so a run cannot wrap round to the next line.
            hit = np.zeros(run[-1] + 1, bool)
            hit[run[seen]] = True
            filled = (hit[run] & inside.ravel()).reshape(inside.shape)
            reached = filled.T if transpose else filled
        if np.count_nonzero(reached) == before:
            return np.ascontiguousarray(reached)
