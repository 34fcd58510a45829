"""The engine: a map with the player in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aad1.worlds.doom.camera import Camera
from aad1.worlds.doom.config import DoomConfig
from aad1.worlds.doom.physics import MAX_THRUST, thrust_for, wrap
from aad1.worlds.doom.wads import vizdoom, wad_path

_HIDDEN = (
    *("hud", "crosshair", "weapon", "decals", "particles", "effects_sprites"),
    *("messages", "corpses", "screen_flashes"),
)
# A warp is tried for so many tics, until the player is there: map units, units a tic, degrees.
_WARP_TICS = 24
_WARP_POSITION, _WARP_VELOCITY, _WARP_HEADING = 0.5, 0.05, 0.1


class Game:
    """One ViZDoom process on one WAD; `enter` starts a map. Units are those of physics."""

    def __init__(self, config: DoomConfig, wad: str) -> None:
        viz = vizdoom()
        game = viz.DoomGame()
        game.set_doom_game_path(str(wad_path(wad)))
        width, height = config.width * config.supersample, config.height * config.supersample
        game.set_screen_resolution(getattr(viz.ScreenResolution, f"RES_{width}X{height}"))
        game.set_screen_format(viz.ScreenFormat.RGB24)
        for part in _HIDDEN:
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
        self._game = game
        self._variables = viz.GameVariable
        self._camera = Camera(config)

    def close(self) -> None:
        """End the process."""
        self._game.close()

    def enter(self, name: str, seed: int) -> None:
        """Start a map afresh; the player cannot be hurt and is not noticed."""
        self._game.set_doom_map(name)
        self._game.set_seed(seed)
        self._game.new_episode()
        self._game.send_game_command("god")
        self._game.send_game_command("notarget")
        self.play((0, 0, 0), 1)

    @property
    def over(self) -> bool:
        """Whether the level has ended under the player's feet."""
        return bool(self._game.is_episode_finished())

    @property
    def position(self) -> complex:
        """Where the player is."""
        return complex(self._read("POSITION_X"), self._read("POSITION_Y"))

    @property
    def velocity(self) -> complex:
        """How the player moves."""
        return complex(self._read("VELOCITY_X"), self._read("VELOCITY_Y"))

    @property
    def heading(self) -> float:
        """Where the player looks."""
        return self._read("ANGLE")

    def _read(self, variable: str) -> float:
        return float(self._game.get_game_variable(getattr(self._variables, variable)))

    def play(self, control: Sequence[float] | npt.NDArray[np.float64], tics: int) -> None:
        """Play `tics` tics of a control: thrust ahead and to the right, degrees to the right."""
        self._game.set_action([float(value) for value in control])
        self._game.advance_action(tics, True)

    def frame(self, out: npt.NDArray[np.uint8]) -> bool:
        """Write the picture into out, uint8 [height, width, 3]; False if the level has ended."""
        state = self._game.get_state()
        if state is None:
            return False
        self._camera.take(state.screen_buffer, out)
        return True

    def go_to(self, position: complex, heading: float, velocity: complex) -> bool:
        """Put the player somewhere, looking and moving as told. False if that does not succeed."""
        warp = f"warp {position.real:.0f} {position.imag:.0f}"
        for _ in range(_WARP_TICS):
            # The command runs after the tic's motion: the player ends each tic where it should be.
            self._game.send_game_command(warp)
            # The turn comes first, so that the thrust is along the new heading.
            thrust = thrust_for(velocity, self.velocity, heading)
            largest = max(abs(thrust.real), abs(thrust.imag))
            if largest > MAX_THRUST:
                thrust *= MAX_THRUST / largest
            self.play((thrust.real, -thrust.imag, wrap(self.heading - heading)), 1)
            if self.over:
                return False
            if (
                abs(self.velocity - velocity) < _WARP_VELOCITY
                and abs(self.position - position) < _WARP_POSITION
                and abs(wrap(self.heading - heading)) < _WARP_HEADING
            ):
                return True
        return False
