"""The engine's motion, against closed forms."""

from __future__ import annotations

import cmath
import math

import pytest

from aad1.worlds.doom.physics import direction, steady_velocity, thrust_for, tic, wrap


def test_directions_are_counter_clockwise() -> None:
    assert direction(90) == pytest.approx(1j)
    assert direction(-45) == pytest.approx((1 - 1j) / math.sqrt(2))


@pytest.mark.parametrize(
    ("degrees", "wrapped"), [(0, 0), (190, -170), (-190, 170), (720 + 5, 5), (180, -180)]
)
def test_angles_wrap_at_the_half_turn(degrees: float, wrapped: float) -> None:
    assert wrap(degrees) == pytest.approx(wrapped)


def test_thrust_from_rest_decays_as_a_geometric_series() -> None:
    moved, velocity = tic(0j, 32 + 0j, 30)
    assert moved == pytest.approx(cmath.rect(1, math.radians(30)))
    distance = moved
    for _ in range(400):
        moved, velocity = tic(velocity, 0j, 77)
        distance += moved
    assert distance == pytest.approx(cmath.rect(1 / (1 - 0.90625), math.radians(30)))


def test_a_thrust_to_the_left_goes_left() -> None:
    assert tic(0j, 32j, 0)[0] == pytest.approx(1j)


def test_the_thrust_for_a_velocity_gives_it() -> None:
    wanted, velocity, heading = 3 - 4j, -1 + 2j, 123.0
    thrust = thrust_for(wanted, velocity, heading)
    assert tic(velocity, thrust, heading)[1] == pytest.approx(wanted)


@pytest.mark.parametrize("turn", [0.0, 2.0, -2.4])
def test_a_player_at_rest_comes_to_the_steady_velocity(turn: float) -> None:
    thrust, velocity, heading = 17 - 9j, 0j, 0.0
    for _ in range(400):
        heading += turn
        velocity = tic(velocity, thrust, heading)[1]
    steady = steady_velocity(thrust, turn)
    assert velocity == pytest.approx(steady * cmath.rect(1, math.radians(heading)))
