"""A clip's script: what the player will do, where that leads, and a place that has the space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aad1.worlds.doom.actions import ACTIONS, CAPTIONS, STILL
from aad1.worlds.doom.config import DoomConfig
from aad1.worlds.doom.physics import WALK_THRUST, direction, steady_velocity, tic
from aad1.worlds.doom.space import MapSpace

_Reals = npt.NDArray[np.float64]

# A walk needs a view: this far ahead of the eyes there is floor too, not a wall.
_VIEW_AHEAD = 72.0
_STARTS_TRIED = 1024


@dataclass(frozen=True)
class Walk:
    """A script, as if it started at the origin looking along +x, one tic before frame 0.

    captions: one per chunk, the image included.
    controls: [1 + tics, 3] thrust ahead, thrust to the right, degrees to the right, per tic; the
        first one leads to frame 0 (after a warp it takes the engine a tic to raise the eyes).
    velocity: at the start: the steady motion of the first action.
    path: [frames] complex positions.
    headings: [frames] degrees.
    """

    captions: list[str]
    controls: _Reals
    velocity: complex
    path: npt.NDArray[np.complex128]
    headings: _Reals


class Start(NamedTuple):
    """Where on a map a walk begins, in map units and degrees."""

    position: complex
    heading: float


def draw_captions(config: DoomConfig, rng: np.random.Generator) -> list[str]:
    """One caption per chunk, the image included: one action, or two with one change."""
    moving = [caption for caption in CAPTIONS if caption != STILL]

    def draw() -> str:
        if rng.uniform() < config.still_share:
            return STILL
        return moving[rng.integers(len(moving))]

    first = draw()
    captions = [first] * (config.chunks + 1)
    if config.chunks > 1 and rng.uniform() < config.switch_share:
        second = draw()
        while second == first:
            second = draw()
        at = int(rng.integers(2, config.chunks + 1))
        captions[at:] = [second] * (config.chunks + 1 - at)
    return captions


def draw_walk(config: DoomConfig, captions: list[str], rng: np.random.Generator) -> Walk:
    """Script the captions at a speed drawn at random."""
    # The engine takes whole numbers: of thrust, and of 65536ths of a full turn.
    walk = float(round(rng.uniform(*config.walk_speed) * WALK_THRUST))
    turn = rng.uniform(*config.turn_speed) / config.tics_per_frame
    turn = round(turn * 65536 / 360) * 360 / 65536
    return script(config, captions, walk, turn)


def script(config: DoomConfig, captions: list[str], walk: float, turn: float) -> Walk:
    """Play the captions at a walking thrust and a turn in degrees per tic."""
    actions = [ACTIONS[caption] for caption in captions[1:]]
    chunks = [[action.ahead * walk, action.right * walk, action.turn * turn] for action in actions]
    controls = np.repeat(np.array(chunks), config.tics_per_frame * config.chunk_frames, axis=0)
    controls = np.concatenate([controls[:1], controls])
    ahead, right, degrees = controls[0]
    velocity = steady_velocity(complex(ahead, -right), -degrees)
    heading, position, speed = 0.0, 0j, velocity
    path, headings = [], []
    for number, (ahead, right, degrees) in enumerate(controls):
        heading -= degrees
        moved, speed = tic(speed, complex(ahead, -right), heading)
        position += moved
        if number % config.tics_per_frame == 0:
            path.append(position)
            headings.append(heading)
    return Walk(captions, controls, velocity, np.array(path), np.array(headings))


def find_start(space: MapSpace, walk: Walk, rng: np.random.Generator) -> Start | None:
    """A start from which the whole walk has space and a view; None if none drawn has."""
    ahead = _VIEW_AHEAD * direction(walk.headings)
    relative = np.concatenate([walk.path, (walk.path + ahead)[::4]])
    positions = space.sample(rng, _STARTS_TRIED).round()  # the game's warp takes whole map units
    headings = rng.uniform(-180, 180, _STARTS_TRIED)
    # A few points first: most starts fail early.
    for points_of_path in (relative[::16], relative):
        turned = points_of_path[None] * direction(headings)[:, None]
        points = np.stack([turned.real, turned.imag], axis=-1) + positions[:, None]
        fits = space.is_free(points).all(axis=1)
        positions, headings = positions[fits], headings[fits]
    if not len(positions):
        return None
    return Start(complex(*positions[0]), float(headings[0]))
