"""The `doom` world: scripted walks through Freedoom's maps, recorded with ViZDoom.

A clip is 81 frames of 128x96, one every 2 tics (17.5 a second): one image and 5 chunks of 16. A
player without weapon, HUD or enemies does one thing throughout ("walk forward", "turn left while
walking", ...), or, in a third of the clips, changes to another at a chunk boundary. What the
captions say is what happens: a walk is planned on a grid of the map's walls, so that the player
has the space for it, played, and thrown away if the game's own position and angle readings differ
from the plan or if the picture is too dark, too plain or too still.

Training and held-out clips come from different maps.

Recording runs in worker processes, one game each. A shard's content depends on the config, split,
seed and its own number alone: not on the number of workers, nor on which shards were there before.

Needs `vizdoom` (the `doom` extra), which brings the engine and the Freedoom data.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from aad1.data import shards as shard_files
from aad1.errors import UserError

if TYPE_CHECKING:
    from aad1.data.batch import Clips

Split = Literal["train", "heldout"]
_Bools = npt.NDArray[np.bool_]
_Bytes = npt.NDArray[np.uint8]
_Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Action:
    """What a caption asks for: thrust ahead and to the right (1 = walking), turn to the right."""

    ahead: float = 0.0
    right: float = 0.0
    turn: float = 0.0

    @property
    def moves(self) -> bool:
        return self.ahead != 0 or self.right != 0


ACTIONS: dict[str, _Action] = {
    "walk forward": _Action(ahead=1),
    "walk backward": _Action(ahead=-1),
    "turn left": _Action(turn=-1),
    "turn right": _Action(turn=1),
    "turn left while walking": _Action(ahead=1, turn=-1),
    "turn right while walking": _Action(ahead=1, turn=1),
    "strafe left": _Action(right=-1),
    "strafe right": _Action(right=1),
    "stand still": _Action(),
}
CAPTIONS: tuple[str, ...] = tuple(ACTIONS)
WORDS: tuple[str, ...] = tuple(sorted({word for caption in CAPTIONS for word in caption.split()}))

# Maps with rooms or grounds large enough for a walk of 5 seconds, and light enough to see it; the
# held-out ones are of the same kinds (base, town, hell, forest) as those for training.
MAPS_TRAIN: tuple[str, ...] = (
    *("MAP08", "MAP12", "MAP14", "MAP17", "MAP18", "MAP19", "MAP26", "MAP28", "MAP29", "MAP32"),
    *("E1M1", "E1M5", "E1M7", "E2M1", "E2M7", "E3M4", "E3M5", "E4M1", "E4M3", "E4M8"),
)
MAPS_HELDOUT: tuple[str, ...] = ("MAP07", "MAP10", "MAP13", "E1M6", "E2M8", "E3M1", "E4M5")


@dataclass(frozen=True, kw_only=True)
class DoomConfig:
    """What is recorded. Every field takes part in the identity of a recording.

    width, height: size of a frame in pixels, 128x96 or 160x120.
    supersample: the game draws this many times larger each way (2 or 4), and each pixel is the
        mean of what it covers. 4 flickers less on far floors and takes about twice the time.
    softness: standard deviation in pixels of a Gaussian lens before sampling. The game samples its
        textures without any filter; what aliases is noise that no codec or generator can follow.
    frames: frames of a clip, 1 + chunk_frames * chunks.
    chunk_frames: frames of a chunk; captions change at chunk boundaries only.
    tics_per_frame: game tics (35 a second) from frame to frame.
    switch_share: share of clips that change their action once.
    still_share: share of actions drawn as "stand still".
    walk_speed: range of walking speed as a fraction of the game's walk (8.33 map units a tic);
        drawn once per clip.
    turn_speed: range of turning speed in degrees per frame; drawn once per clip.
    gamma: brightening, out = in ** (1 / gamma) on [0, 1]; Doom's rooms are dark.
    min_brightness, min_contrast: mean and standard deviation (0-255) below which a frame is too
        dark or too plain; looked at in the first frame and at the end of each chunk.
    min_change: least mean absolute difference (0-255) between frames 8 apart, unless standing.
    monsters: leave the monsters in (they take no notice of the player).
    maps_train, maps_heldout: maps by name, "MAP01".."MAP32" (Freedoom phase 2) or
        "E1M1".."E4M9" (phase 1); no map may be in both.
    maps_per_shard, clips_per_shard: a shard's clips come from this many maps in turn.

    Raises UserError where a value is out of range.
    """

    width: int = 128
    height: int = 96
    supersample: int = 2
    softness: float = 0.8
    frames: int = 81
    chunk_frames: int = 16
    tics_per_frame: int = 2
    switch_share: float = 1 / 3
    still_share: float = 0.015
    walk_speed: tuple[float, float] = (0.55, 0.75)
    turn_speed: tuple[float, float] = (3.2, 4.8)
    gamma: float = 1.7
    min_brightness: float = 45.0
    min_contrast: float = 14.0
    min_change: float = 3.0
    monsters: bool = False
    maps_train: tuple[str, ...] = MAPS_TRAIN
    maps_heldout: tuple[str, ...] = MAPS_HELDOUT
    maps_per_shard: int = 4
    clips_per_shard: int = 32

    def __post_init__(self) -> None:
        if (self.width, self.height, self.supersample) not in _RENDER_SIZES:
            raise UserError(
                f"doom frame size {self.width}x{self.height}, supersample {self.supersample}: "
                f"allowed are 128x96 and 160x120, supersample 2 or 4"
            )
        if self.chunk_frames < 1 or self.frames < 1 or (self.frames - 1) % self.chunk_frames:
            raise UserError(
                f"doom frames {self.frames}: must be 1 + a multiple of chunk_frames "
                f"({self.chunk_frames})"
            )
        if self.frames == 1:
            raise UserError(f"doom frames 1: at least one chunk, {1 + self.chunk_frames}")
        if not 1 <= self.tics_per_frame <= 35:
            raise UserError(f"doom tics_per_frame {self.tics_per_frame}: allowed are 1 to 35")
        for name in ("switch_share", "still_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"doom {name} {getattr(self, name)}: allowed are 0 to 1")
        for name, top in (("walk_speed", 2.0), ("turn_speed", 45.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise UserError(
                    f"doom {name} {low}, {high}: must be a range within (0, {top:g}], low first"
                )
        if not 0 <= self.softness <= 4:
            raise UserError(f"doom softness {self.softness}: allowed are 0 to 4")
        if not 0.5 <= self.gamma <= 4:
            raise UserError(f"doom gamma {self.gamma}: allowed are 0.5 to 4")
        if self.maps_per_shard < 1 or self.clips_per_shard < 1:
            raise UserError("doom maps_per_shard and clips_per_shard must be at least 1")
        for name in (*self.maps_train, *self.maps_heldout):
            _wad_of(name)
        if not self.maps_train or not self.maps_heldout:
            raise UserError("doom maps_train and maps_heldout must each name a map")
        both = set(self.maps_train) & set(self.maps_heldout)
        if both:
            raise UserError(f"doom maps {sorted(both)} are both for training and held out")

    @property
    def chunks(self) -> int:
        """Chunks after the image."""
        return (self.frames - 1) // self.chunk_frames

    def maps(self, split: Split) -> tuple[str, ...]:
        """The maps of a split, "train" or "heldout". Raises UserError for another name."""
        if split not in ("train", "heldout"):
            raise UserError(f"doom split {split!r}: allowed are 'train' and 'heldout'")
        return self.maps_train if split == "train" else self.maps_heldout

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON keeps them (lists for tuples)."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def config_from_dict(values: dict[str, Any]) -> DoomConfig:
    """The inverse of DoomConfig.as_dict, as found under "config" in a manifest."""
    fields: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in values.items()}
    return DoomConfig(**fields)


# Frame size and supersampling -> the game's resolution.
_RENDER_SIZES = {
    (128, 96, 2): "RES_256X192",
    (128, 96, 4): "RES_512X384",
    (160, 120, 2): "RES_320X240",
    (160, 120, 4): "RES_640X480",
}


def _wad_of(map_name: str) -> str:
    if re.fullmatch(r"MAP(0[1-9]|[12][0-9]|3[0-2])", map_name):
        return "freedoom2.wad"
    if re.fullmatch(r"E[1-4]M[1-9]", map_name):
        return "freedoom1.wad"
    raise UserError(f"doom map {map_name!r}: allowed are 'MAP01'..'MAP32' and 'E1M1'..'E4M9'")


def _vizdoom() -> Any:
    try:
        return import_module("vizdoom")
    except ImportError as error:
        raise UserError(f"the doom world needs ViZDoom ({error}): pip install aad1[doom]") from None


# --- The map: where there is space ---------------------------------------------------------------

_CELL = 16.0  # map units per grid cell
# The player is a box of half-width 16 that steps up 24 units and needs 56 units of height. The
# planned path keeps a little more distance from walls than the player needs.
_CLEARANCE = 22.0
_STEP = 24
_HEADROOM = 56
# Crossing these lines teleports the player or ends the level (Doom and Boom line types).
_TELEPORTS = (39, 97, 125, 126, 174, 195, *range(207, 211), 243, 244, *range(262, 270))
_EXITS = (52, 124, 197, 198)
# Decorations that stand in the way (Doom thing numbers): pillars, trees, lamps, torches, barrels,
# and what hangs or is impaled.
_SOLID_THINGS = (
    *(*range(25, 34), 35, 36, 37, *range(41, 58), 70, *range(73, 79)),
    *(85, 86, 2028, 2035),
)


class _MapSpace:
    """The cells of a map on which the player can stand, on a grid of 16 map units.

    Read from the map's lumps in the WAD: walls, steps too high to climb (or to fall off
    unnoticed), low ceilings, closed doors and solid decorations are filled in, and what cannot be
    reached from where the map places its things is left out.
    """

    def __init__(self, wad: Path, name: str) -> None:
        lumps = _read_map(wad, name)
        things = np.frombuffer(lumps["THINGS"], "<i2").reshape(-1, 5)
        lines = np.frombuffer(lumps["LINEDEFS"], "<u2").reshape(-1, 7).astype(np.int64)
        sides = np.frombuffer(lumps["SIDEDEFS"], "<u2").reshape(-1, 15)[:, 14].astype(np.int64)
        vertexes = np.frombuffer(lumps["VERTEXES"], "<i2").reshape(-1, 2).astype(np.float64)
        heights = np.frombuffer(lumps["SECTORS"], "<i2").reshape(-1, 13)[:, :2].astype(np.int64)

        one_sided = (lines[:, 5] == 0xFFFF) | (lines[:, 6] == 0xFFFF)
        front = heights[sides[np.where(one_sided, 0, lines[:, 5])]]
        back = heights[sides[np.where(one_sided, 0, lines[:, 6])]]
        step = np.abs(front[:, 0] - back[:, 0])
        opening = np.minimum(front[:, 1], back[:, 1]) - np.maximum(front[:, 0], back[:, 0])
        blocking = (
            one_sided
            | (lines[:, 2] & 1 != 0)
            | (step > _STEP)
            | (opening < _HEADROOM)
            | np.isin(lines[:, 3], _TELEPORTS + _EXITS)
        )
        starts, ends = vertexes[lines[blocking, 0]], vertexes[lines[blocking, 1]]
        self.origin = vertexes.min(axis=0) - 4 * _CELL
        size = np.ceil((vertexes.max(axis=0) - self.origin) / _CELL).astype(int) + 4
        solid = np.zeros((size[1], size[0]), bool)

        # Fill every cell that has a piece of wall within the clearance box around some point of
        # it: points along the wall every 8 units, each spread over the box.
        counts = np.maximum(np.ceil(np.hypot(*(ends - starts).T) / 8).astype(int), 1) + 1
        line = np.repeat(np.arange(len(counts)), counts)
        along = np.concatenate([np.linspace(0, 1, n) for n in counts])[:, None]
        points = starts[line] * (1 - along) + ends[line] * along
        pillars = things[np.isin(things[:, 3], _SOLID_THINGS), :2].astype(np.float64)
        for box, centres in ((_CLEARANCE, points), (_CLEARANCE + 16, pillars)):
            offsets = np.linspace(-box, box, 2 * math.ceil(box / _CELL) + 1)
            for dx in offsets:
                for dy in offsets:
                    row, column = self._cells(centres + (dx, dy))
                    solid[row, column] = True
        self.free = _reachable(~solid, *self._cells(things[:, :2].astype(np.float64)))
        self._free_cells = np.nonzero(self.free)

    def _cells(self, points: _Reals) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
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


def _read_map(wad: Path, name: str) -> dict[str, bytes]:
    """The lumps that follow the marker `name` in a WAD, by their names."""
    with wad.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, directory = struct.unpack_from("<ii", data, 4)
        entries = [struct.unpack_from("<ii8s", data, directory + 16 * i) for i in range(count)]
        names = [entry[2].rstrip(b"\0").decode("ascii", "replace") for entry in entries]
        if name not in names:
            raise UserError(f"doom map {name!r} is not in {wad.name}")
        first = names.index(name) + 1
        return {
            names[i]: data[entries[i][0] : entries[i][0] + entries[i][1]]
            for i in range(first, min(first + 10, count))
        }


def _reachable(free: _Bools, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> _Bools:
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


# --- The walk: what the player will do -----------------------------------------------------------

# The engine's motion, per tic: the player turns, gains thrust / 32 map units a tic in the
# direction asked for, moves by the velocity, and the velocity is multiplied by the friction.
_FRICTION = 0.90625
_WALK_THRUST = 25.0
_MAX_THRUST = 50.0
_THRUST_UNITS = 32.0
# A walk needs a view: this far ahead of the eyes there is floor too, not a wall.
_VIEW_AHEAD = 72.0


@dataclass(frozen=True)
class _Walk:
    """A clip's script, as if it started at the origin looking along +x, one tic before frame 0.

    captions: one per chunk, the image included.
    controls: [1 + tics, 3] thrust ahead, thrust to the right, degrees to the right, per tic; the
        first one leads to frame 0 (after a warp it takes the engine a tic to raise the eyes).
    velocity: map units a tic at the start (x + iy): the steady motion of the first action.
    path: [frames] complex positions.
    headings: [frames] degrees, counter-clockwise.
    """

    captions: list[str]
    controls: _Reals
    velocity: complex
    path: npt.NDArray[np.complex128]
    headings: _Reals


def _draw_captions(config: DoomConfig, rng: np.random.Generator) -> list[str]:
    """One caption per chunk, the image included: one action, or two with one change."""
    moving = [c for c in CAPTIONS if c != "stand still"]

    def draw() -> str:
        if rng.uniform() < config.still_share:
            return "stand still"
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


def _draw_walk(config: DoomConfig, captions: list[str], rng: np.random.Generator) -> _Walk:
    # The engine takes whole numbers: of thrust, and of 65536ths of a full turn.
    walk = float(round(rng.uniform(*config.walk_speed) * _WALK_THRUST))
    turn = rng.uniform(*config.turn_speed) / config.tics_per_frame
    turn = round(turn * 65536 / 360) * 360 / 65536
    return _script(config, captions, walk, turn)


def _script(config: DoomConfig, captions: list[str], walk: float, turn: float) -> _Walk:
    """Play the captions at a walking thrust and a turn in degrees per tic."""
    tics = config.tics_per_frame * config.chunk_frames
    rows = []
    for caption in captions[1:]:
        action = ACTIONS[caption]
        rows.append([action.ahead * walk, action.right * walk, action.turn * turn])
    controls = np.repeat(np.array(rows), tics, axis=0)
    controls = np.concatenate([controls[:1], controls])
    # Steady motion of the first action: in the player's frame, which turns by `spin` each tic, the
    # velocity after friction repeats itself.
    thrust = complex(rows[0][0], -rows[0][1]) / _THRUST_UNITS
    spin = np.exp(-1j * math.radians(rows[0][2]))
    velocity = thrust * spin * _FRICTION / (1 - _FRICTION / spin) / spin
    heading, position, speed = 0.0, 0j, velocity
    path, headings = [], []
    for tic, (ahead, right, degrees) in enumerate(controls):
        heading -= degrees
        speed += complex(ahead, -right) / _THRUST_UNITS * np.exp(1j * math.radians(heading))
        position += speed
        speed *= _FRICTION
        if tic % config.tics_per_frame == 0:
            path.append(position)
            headings.append(heading)
    return _Walk(captions, controls, velocity, np.array(path), np.array(headings))


def _place_walk(
    space: _MapSpace, walk: _Walk, rng: np.random.Generator, tries: int = 1024
) -> tuple[complex, float] | None:
    """A start (position, heading in degrees) from which the whole walk has space and a view.

    None if none of `tries` random starts has.
    """
    ahead = _VIEW_AHEAD * np.exp(1j * np.radians(walk.headings))
    # A few points first: most starts fail early.
    relative = np.concatenate([walk.path, (walk.path + ahead)[::4]])
    starts = space.sample(rng, tries).round()  # the game's warp takes whole map units
    headings = rng.uniform(-180, 180, tries)
    for points_of_path in (relative[::16], relative):
        turned = points_of_path[None] * np.exp(1j * np.radians(headings))[:, None]
        points = np.stack([turned.real, turned.imag], axis=-1) + starts[:, None]
        fits = space.is_free(points).all(axis=1)
        starts, headings = starts[fits], headings[fits]
    if not len(starts):
        return None
    return complex(*starts[0]), float(headings[0])


# --- The game ------------------------------------------------------------------------------------


class _Game:
    """One ViZDoom process on one WAD."""

    def __init__(self, config: DoomConfig, wad: str) -> None:
        viz = _vizdoom()
        game = viz.DoomGame()
        game.set_doom_game_path(str(_wad_path(wad)))
        game.set_screen_resolution(
            getattr(
                viz.ScreenResolution, _RENDER_SIZES[config.width, config.height, config.supersample]
            )
        )
        game.set_screen_format(viz.ScreenFormat.RGB24)
        for part in ("hud", "crosshair", "weapon", "decals", "particles", "effects_sprites"):
            getattr(game, f"set_render_{part}")(False)
        for part in ("messages", "corpses", "screen_flashes"):
            getattr(game, f"set_render_{part}")(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_mode(viz.Mode.PLAYER)
        game.set_episode_timeout(0)
        game.set_episode_start_time(1)
        game.set_available_buttons(
            [
                viz.Button.MOVE_FORWARD_BACKWARD_DELTA,
                viz.Button.MOVE_LEFT_RIGHT_DELTA,
                viz.Button.TURN_LEFT_RIGHT_DELTA,
            ]
        )
        # The view's swaying with each step has a phase that no first frame shows.
        game.add_game_args("+movebob 0")
        game.add_game_args("+cl_showsecretmessage 0 +con_midtime 0")
        if not config.monsters:
            game.add_game_args("-nomonsters")
        game.set_doom_map("MAP01" if wad == "freedoom2.wad" else "E1M1")
        game.set_seed(1)
        game.init()
        variable = viz.GameVariable
        self._where = (variable.POSITION_X, variable.POSITION_Y)
        self._speed = (variable.VELOCITY_X, variable.VELOCITY_Y)
        self._angle = variable.ANGLE
        self._game = game
        self._config = config
        self._lookup = _brighten(config.gamma, config.supersample**2)
        self._sums = np.empty((config.height, config.width, 3), np.uint16)
        self._down = _lens(config.height, config.softness)
        self._across = _lens(config.width, config.softness)

    def close(self) -> None:
        self._game.close()

    def enter(self, name: str, seed: int) -> None:
        """Start a map afresh; the player cannot be hurt and is not noticed."""
        self._game.set_doom_map(name)
        self._game.set_seed(seed)
        self._game.new_episode()
        self._game.send_game_command("god")
        self._game.send_game_command("notarget")
        self.tic((0, 0, 0), 1)

    @property
    def over(self) -> bool:
        """Whether the level has ended under the player's feet."""
        return bool(self._game.is_episode_finished())

    def tic(self, control: Sequence[float] | _Reals, tics: int) -> None:
        """Play `tics` tics of a control: thrust ahead and to the right, degrees to the right."""
        self._game.set_action([float(value) for value in control])
        self._game.advance_action(tics, True)

    def position(self) -> complex:
        x, y = (self._game.get_game_variable(v) for v in self._where)
        return complex(x, y)

    def velocity(self) -> complex:
        x, y = (self._game.get_game_variable(v) for v in self._speed)
        return complex(x, y)

    def heading(self) -> float:
        return float(self._game.get_game_variable(self._angle))

    def frame(self, out: _Bytes) -> bool:
        """Write the picture into out, uint8 [height, width, 3]; False if the level has ended.

        Each pixel is the mean of the k x k drawn ones it covers, softened and brightened.
        """
        state = self._game.get_state()
        if state is None:
            return False
        screen, k = state.screen_buffer, self._config.supersample
        rows = np.add(screen[0::k], screen[1::k], dtype=np.uint16)
        for offset in range(2, k):
            rows += screen[offset::k]
        rows = rows.reshape(rows.shape[0], -1)
        # One channel at a time: numpy is slow where the innermost dimension is 3 long.
        for channel in range(3):
            total = self._sums[:, :, channel]
            np.add(rows[:, channel :: 3 * k], rows[:, channel + 3 :: 3 * k], out=total)
            for offset in range(2, k):
                total += rows[:, channel + 3 * offset :: 3 * k]
        sums = self._sums
        if self._config.softness:
            soft = self._down @ sums.reshape(len(sums), -1).astype(np.float32)
            soft = soft.reshape(sums.shape).transpose(0, 2, 1) @ self._across.T
            sums[:] = np.rint(soft).transpose(0, 2, 1)
        np.take(self._lookup, sums, out=out, mode="clip")
        return True

    def go_to(self, position: complex, heading: float, velocity: complex) -> bool:
        """Put the player somewhere, looking and moving as told. False if that does not succeed."""
        warp = f"warp {position.real:.0f} {position.imag:.0f}"
        for _ in range(24):
            # The command runs after the tic's motion: the player ends each tic where it should be.
            self._game.send_game_command(warp)
            # Turn first, thrust along the new heading: the order in which the engine does it.
            facing = np.exp(1j * math.radians(heading))
            lacking = (velocity / _FRICTION - self.velocity()) / facing * _THRUST_UNITS
            largest = max(abs(lacking.real), abs(lacking.imag))
            if largest > _MAX_THRUST:
                lacking *= _MAX_THRUST / largest
            self.tic((lacking.real, -lacking.imag, _wrap(self.heading() - heading)), 1)
            if self.over:
                return False
            if (
                abs(self.velocity() - velocity) < 0.05
                and abs(self.position() - position) < 0.5
                and abs(_wrap(self.heading() - heading)) < 0.1
            ):
                return True
        return False


def _wad_path(name: str) -> Path:
    return Path(str(_vizdoom().__path__[0])) / name


def _lens(size: int, softness: float) -> npt.NDArray[np.float32]:
    """[size, size] matrix that blurs a row of pixels; every row of it sums to 1, also at edges."""
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weight = np.exp(-0.5 * (distance / max(softness, 1e-3)) ** 2) * (abs(distance) <= 3)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def _brighten(gamma: float, count: int) -> _Bytes:
    """Table from the sum of `count` drawn values, 0 to 255 each, to the brightened mean."""
    table = 255 * np.linspace(0, 1, 255 * count + 1) ** (1 / gamma)
    return table.round().astype(np.uint8)


def _wrap(degrees: float) -> float:
    return (degrees + 180) % 360 - 180


# --- Recording -----------------------------------------------------------------------------------

# A reading may differ from the plan by this much before the clip is thrown away: map units of
# position (the player was held up, slid along something or was carried), degrees of heading.
_POSITION_TOLERANCE = 12.0
_HEADING_TOLERANCE = 1.0
_ATTEMPTS_PER_CLIP = 600
_ATTEMPTS_PER_CAPTION = 60


@dataclass
class _Tally:
    """Why attempts at a clip came to nothing."""

    kept: int = 0
    thrown_away: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        self.thrown_away[reason] = self.thrown_away.get(reason, 0) + 1


class _Recorder:
    """Records shards; keeps its games and maps from one shard to the next."""

    def __init__(self, config: DoomConfig) -> None:
        self.config = config
        self.tally = _Tally()
        self._games: dict[str, _Game] = {}
        self._spaces: dict[str, _MapSpace] = {}

    def close(self) -> None:
        for game in self._games.values():
            game.close()
        self._games.clear()

    def _game(self, name: str) -> _Game:
        wad = _wad_of(name)
        if wad not in self._games:
            self._games[wad] = _Game(self.config, wad)
        return self._games[wad]

    def _space(self, name: str) -> _MapSpace:
        if name not in self._spaces:
            self._spaces[name] = _MapSpace(_wad_path(_wad_of(name)), name)
        return self._spaces[name]

    def shard(
        self, split: Split, seed: int, index: int, clips: int
    ) -> tuple[_Bytes, list[list[str]]]:
        """Record the first `clips` clips of shard `index`: video [clips, T, H, W, 3], captions."""
        config = self.config
        rng = np.random.default_rng([seed, ("train", "heldout").index(split), index])
        maps = config.maps(split)
        order = rng.permutation(len(maps))
        video = np.empty((clips, config.frames, config.height, config.width, 3), np.uint8)
        captions: list[list[str]] = []
        per_map = math.ceil(config.clips_per_shard / config.maps_per_shard)
        for clip in range(clips):
            if clip % per_map == 0:
                name = maps[order[clip // per_map % len(maps)]]
                game, space = self._game(name), self._space(name)
                game.enter(name, int(rng.integers(1, 2**31)))
            captions.append(self._clip(game, space, name, rng, video[clip]))
        return video, captions

    def _clip(
        self,
        game: _Game,
        space: _MapSpace,
        name: str,
        rng: np.random.Generator,
        video: _Bytes,
    ) -> list[str]:
        # The captions are kept while speed and place are drawn anew, so that an action that needs
        # much space does not become rarer; only where a map has no place for it do they change.
        captions = _draw_captions(self.config, rng)
        for attempt in range(_ATTEMPTS_PER_CLIP):
            if attempt and attempt % _ATTEMPTS_PER_CAPTION == 0:
                self.tally.add("captions changed")
                captions = _draw_captions(replace(self.config, still_share=0), rng)
            walk = _draw_walk(self.config, captions, rng)
            start = _place_walk(space, walk, rng)
            if start is None:
                self.tally.add("no space")
                continue
            reason = self._play(game, walk, *start, video)
            if game.over:
                game.enter(name, int(rng.integers(1, 2**31)))
            if reason is None:
                self.tally.kept += 1
                return captions
            self.tally.add(reason)
        raise UserError(
            f"doom map {name}: no clip in {_ATTEMPTS_PER_CLIP} attempts "
            f"({self.tally.thrown_away}); leave the map out or ask for less"
        )

    def _play(
        self, game: _Game, walk: _Walk, position: complex, heading: float, video: _Bytes
    ) -> str | None:
        """Play a walk and write its frames into `video`; the reason if it is to be thrown away."""
        config = self.config
        facing = complex(np.exp(1j * math.radians(heading)))
        if not game.go_to(position, heading, walk.velocity * facing):
            return "start"
        game.tic(walk.controls[0], 1)
        for index in range(config.frames):
            if index:
                game.tic(walk.controls[index * config.tics_per_frame], config.tics_per_frame)
            frame = video[index]
            if not game.frame(frame):
                return "level ended"
            planned = position + walk.path[index] * facing
            if abs(game.position() - planned) > _POSITION_TOLERANCE:
                return "held up"
            turned = _wrap(game.heading() - heading - float(walk.headings[index]))
            if abs(turned) > _HEADING_TOLERANCE:
                return "heading"
            if index % config.chunk_frames == 0:
                if frame.mean() < config.min_brightness:
                    return "dark"
                if frame.std(axis=(0, 1)).mean() < config.min_contrast:
                    return "plain"
                chunk = index // config.chunk_frames
                if index and walk.captions[chunk] != "stand still":
                    ago = video[index - min(8, config.chunk_frames)].astype(np.int16)
                    if np.abs(frame - ago).mean() < config.min_change:
                        return "still"
        return None


def record_clips(config: DoomConfig, *, split: Split = "train", clips: int, seed: int = 0) -> Clips:
    """Record clips with one worker and hand them over in memory (3 MB each).

    They are the first `clips` clips of what `record` writes for the same arguments.

    Raises UserError as `record` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        return record(
            config, split=split, clips=clips, seed=seed, out=Path(folder), workers=1
        ).read_all()


def record(
    config: DoomConfig,
    *,
    split: Split,
    clips: int,
    seed: int,
    out: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> shard_files.ClipShards:
    """Record `clips` clips into shards in the folder `out`, with `workers` processes.

    Complete shards that are there already, of the same config, split and seed, are kept. A worker
    that dies is replaced, and its shard tried once more; a second death or any other error stops
    the recording after the shards in hand.

    progress: called with (clips done, clips in all) as shards come in.

    Raises UserError if vizdoom is missing, an argument is out of range, `out` holds another
    recording, a map has no place for what is asked, or a worker failed.
    """
    if clips < 1:
        raise UserError(f"doom clips {clips}: at least 1")
    if workers < 1:
        raise UserError(f"doom workers {workers}: at least 1")
    config.maps(split)
    _vizdoom()
    identity = _identity(config, split, seed)
    if (out / shard_files.MANIFEST).exists():
        manifest = shard_files.read_manifest(out)
        found = (manifest["world"], manifest["split"], manifest["seed"], manifest["config"])
        if found != ("doom", split, seed, config.as_dict()):
            raise UserError(
                f"{out} holds another recording ({found[0]}, split {found[1]}, seed {found[2]}): "
                f"give an empty folder, or delete that one"
            )
    sizes = _shard_sizes(config, clips)
    todo: deque[tuple[int, int]] = deque()
    for index, count in sizes:
        header = shard_files.read_header(out / shard_files.shard_name(index))
        wanted = {"identity": identity, "clips": str(count)}
        if header is None or any(header.get(k) != v for k, v in wanted.items()):
            todo.append((index, count))
    done = clips - sum(count for _, count in todo)
    if progress is not None:
        progress(done, clips)
    if todo:
        out.mkdir(parents=True, exist_ok=True)
        _run_workers(config, split, seed, out, todo, workers, done, clips, progress)
    shard_files.write_manifest(
        out,
        world="doom",
        split=split,
        seed=seed,
        config=config.as_dict(),
        shards=[(shard_files.shard_name(index), count) for index, count in sizes],
    )
    return shard_files.ClipShards(out)


def _shard_sizes(config: DoomConfig, clips: int) -> list[tuple[int, int]]:
    whole, rest = divmod(clips, config.clips_per_shard)
    sizes = [(index, config.clips_per_shard) for index in range(whole)]
    return sizes + ([(whole, rest)] if rest else [])


def _identity(config: DoomConfig, split: Split, seed: int) -> str:
    content = json.dumps([_RECORDING, config.as_dict(), split, seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# Part of a recording's identity: raise it when the same config comes to mean other clips.
_RECORDING = 1


def _run_workers(
    config: DoomConfig,
    split: Split,
    seed: int,
    out: Path,
    todo: deque[tuple[int, int]],
    workers: int,
    done: int,
    clips: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Hand the shards out to worker processes, one thread of this process per worker.

    Worker processes are started with subprocess, not multiprocessing: nothing of the caller's
    `__main__` is imported again, and a game that takes its process down is seen as an end of file.
    """
    lock = threading.Lock()
    died: set[int] = set()
    errors: list[str] = []
    job = json.dumps(
        {"config": config.as_dict(), "split": split, "seed": seed, "out": str(out.resolve())}
    )

    def take() -> tuple[int, int] | None:
        with lock:
            return todo.popleft() if todo and not errors else None

    def settle(shard: tuple[int, int], answer: _Answer) -> None:
        nonlocal done
        name = shard_files.shard_name(shard[0])
        with lock:
            if answer.error is None:
                done += shard[1]
                if progress is not None:
                    progress(done, clips)
            elif answer.alive:  # the same shard would fail the same way again
                errors.append(f"{name}: {answer.error}")
            elif shard[0] in died:
                errors.append(f"{name}, twice: {answer.error}")
            else:
                died.add(shard[0])
                todo.append(shard)

    def attend() -> None:
        worker: _Worker | None = None
        try:
            while (shard := take()) is not None:
                if worker is None:
                    worker = _Worker(job)
                answer = worker.ask(*shard)
                if not answer.alive:
                    worker.close()
                    worker = None
                settle(shard, answer)
        except Exception as error:
            with lock:
                errors.append(f"{type(error).__name__}: {error}")
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=attend) for _ in range(min(workers, len(todo)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # such as Ctrl-C: the threads stop after the shard in hand
        with lock:
            errors.append("interrupted")
        raise
    if errors:
        raise UserError(
            f"doom recording stopped at {done} of {clips} clips by {errors[0]} "
            f"(what is recorded stays; start again to go on)"
        )


@dataclass(frozen=True)
class _Answer:
    """How a shard went: the error, if any, and whether the worker can go on."""

    error: str | None = None
    alive: bool = True


_WORKER = "from aad1.worlds.doom import _worker; _worker()"


class _Worker:
    """A process that records the shards it is asked for, one at a time."""

    def __init__(self, job: str) -> None:
        source = str(Path(__file__).resolve().parents[2])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        # The engine leaves its settings, and reports of crashes on exit, where it is started.
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self._folder.name,
        )
        self._errors: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self._send(job)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._errors.append(line.strip())

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def ask(self, index: int, clips: int) -> _Answer:
        """Have a shard recorded and written."""
        self._send(f"{index} {clips}")
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Whatever else a library prints, an answer is a line that begins with our word.
            if line.startswith("done "):
                return _Answer()
            if line.startswith("error "):
                return _Answer(error=line.removeprefix("error ").strip())
        code = self._process.wait()
        self._reader.join(timeout=1)
        last = self._errors[-1] if self._errors else "no message"
        return _Answer(error=f"the process ended with code {code}: {last}", alive=False)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._reader.join(timeout=1)
        self._folder.cleanup()


def _worker() -> None:
    """Main of a worker process: a job in JSON on the first line, then "index clips" lines."""
    job = json.loads(sys.stdin.readline())
    config, split, seed = config_from_dict(job["config"]), job["split"], job["seed"]
    folder, identity = Path(job["out"]), _identity(config, split, seed)
    recorder = _Recorder(config)
    try:
        for line in sys.stdin:
            index, clips = (int(word) for word in line.split())
            try:
                video, captions = recorder.shard(split, seed, index, clips)
                shard_files.write_shard(
                    folder / shard_files.shard_name(index),
                    video,
                    captions,
                    metadata={"identity": identity, "clips": str(clips)},
                )
                answer = f"done {index}"
            except Exception as error:  # the parent decides what to do about it
                answer = f"error {type(error).__name__}: " + " ".join(str(error).split())
            print(answer, flush=True)
    finally:
        recorder.close()
