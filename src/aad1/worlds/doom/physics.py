"""How the engine moves the player on flat ground.

Positions and velocities are complex, x + iy, in map units and map units a tic; headings are degrees
counter-clockwise from +x. A thrust is complex in the player's frame: ahead + i left, in the
engine's own numbers, of which 25 is walking.

In each tic the player turns, gains thrust / 32 in the direction asked for, moves by the velocity,
and the velocity is multiplied by the friction. It cuts thrusts to whole numbers, and those of a
steady walk are whole but for rounding: reordering an operation here changes recorded clips.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FRICTION = 0.90625
_THRUST_PER_UNIT = 32.0  # of velocity gained
WALK_THRUST = 25.0  # moves by 8.33 units a tic in the end
MAX_THRUST = 50.0  # the engine takes no more along either axis


def direction(heading: float | npt.NDArray[np.float64]) -> Any:
    """The unit vector of a heading, complex; for an array of headings, an array."""
    return np.exp(1j * np.radians(heading))


def wrap(degrees: float) -> float:
    """The same angle within [-180, 180)."""
    return (degrees + 180) % 360 - 180


def tic(velocity: complex, thrust: complex, heading: float) -> tuple[complex, complex]:
    """How far a player moves within a tic, and the velocity after it; `heading` is the new one."""
    moved = velocity + thrust / _THRUST_PER_UNIT * direction(heading)
    return moved, moved * _FRICTION


def thrust_for(wanted: complex, velocity: complex, heading: float) -> complex:
    """The thrust that takes a player from a velocity to the wanted one within a tic."""
    return (wanted / _FRICTION - velocity) / direction(heading) * _THRUST_PER_UNIT


def steady_velocity(thrust: complex, turn: float) -> complex:
    """The velocity at heading 0 that `thrust` and a turn of `turn` degrees, tic after tic, keep.

    The velocity u after a tic that ends at heading `turn` is F (u / e + T e), with friction F,
    T = thrust / 32 and e = exp(i turn); the one before, which was at heading 0, is u / e.
    """
    spin = direction(turn)
    after = thrust / _THRUST_PER_UNIT * spin * _FRICTION / (1 - _FRICTION / spin)
    return after / spin
