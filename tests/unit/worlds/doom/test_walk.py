"""Scripts: captions in their shares, motion at the speeds asked for, starts with space."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from aad1.worlds.doom import CAPTIONS, DoomConfig
from aad1.worlds.doom.space import MapSpace
from aad1.worlds.doom.walk import draw_captions, draw_walk, find_start, script


def test_captions_follow_the_shares() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_captions(DoomConfig(), rng) for _ in range(4000)]
    changed = [c for c in drawn if len(set(c)) > 1]
    assert abs(len(changed) / len(drawn) - 1 / 3) < 0.03
    for captions in drawn:
        assert len(captions) == 6
        assert captions[0] == captions[1]
        assert sum(a != b for a, b in pairwise(captions)) <= 1
    words = [caption for captions in drawn for caption in captions[1:]]
    assert words.count("stand still") / len(words) <= 0.03
    for caption in CAPTIONS[:-1]:
        assert abs(words.count(caption) / len(words) - 1 / 8) < 0.02


def test_script_walks_at_walking_speed_and_turns_left_counter_clockwise() -> None:
    config = DoomConfig()
    forward = script(config, ["walk forward"] * 6, 25.0, 2.0)
    # Doom's walk: 25/32 units of thrust a tic, friction 0.90625, so 8.33 units a tic.
    assert np.allclose(np.diff(forward.path), 2 * 25 / 32 / (1 - 0.90625))
    strafe = script(config, ["strafe left"] * 6, 25.0, 2.0)
    assert np.allclose(np.diff(strafe.path) / np.diff(forward.path), 1j)
    turn = script(config, ["turn left"] * 6, 25.0, 2.0)
    assert np.allclose(np.diff(turn.headings), 4.0)
    assert np.allclose(turn.path, 0)
    circle = script(config, ["turn left while walking"] * 6, 25.0, 2.0)
    steps = np.diff(circle.path)
    assert np.allclose(np.abs(steps), np.abs(steps[0]))  # steady from the first frame on
    assert np.allclose(np.angle(steps[1:] / steps[:-1]), math.radians(4))


@pytest.mark.parametrize("seed", range(5))
def test_walks_start_where_all_of_them_has_space_and_a_view(
    make_lumps: Callable[..., dict[str, bytes]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    walk = draw_walk(DoomConfig(frames=33), ["turn left while walking"] * 3, rng)
    start = find_start(MapSpace(make_lumps()), walk, rng)
    assert start is not None
    assert start.position == complex(round(start.position.real), round(start.position.imag))
    path = start.position + walk.path * cmath.rect(1, math.radians(start.heading))
    eyes = np.radians(start.heading + walk.headings)
    seen = path + 72 * (np.cos(eyes) + 1j * np.sin(eyes))
    for points in (path, seen[::4]):
        for along in (points.real, points.imag):
            assert along.min() >= 22
            assert along.max() <= 512 - 22


def test_a_walk_longer_than_the_room_has_no_start(
    make_lumps: Callable[..., dict[str, bytes]],
) -> None:
    rng = np.random.default_rng(0)
    walk = draw_walk(DoomConfig(), ["walk forward"] * 6, rng)
    assert abs(walk.path[-1]) > math.hypot(512, 512)
    assert find_start(MapSpace(make_lumps()), walk, rng) is None
