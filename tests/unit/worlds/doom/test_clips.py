"""What the captions say is what the frames show, and what is not fit to keep is noticed."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from aad1.worlds.doom import DoomConfig
from aad1.worlds.doom.clips import Recorder, film, picture_fault
from aad1.worlds.doom.walk import Start, draw_walk, find_start

needs_vizdoom = pytest.mark.skipif(find_spec("vizdoom") is None, reason="vizdoom is not installed")

CONFIG = DoomConfig()


# --- without the game ---


def _noise(count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 96, 128, 3), dtype=np.uint8)


def test_a_picture_in_motion_has_no_fault() -> None:
    assert picture_fault(CONFIG, _noise(81), 16, "turn left") is None


def test_dark_and_plain_pictures_are_noticed() -> None:
    video = _noise(81)
    video[0] //= 4
    video[16] = 200
    assert picture_fault(CONFIG, video, 0, "turn left") == "dark"
    assert picture_fault(CONFIG, video, 16, "stand still") == "plain"


def test_what_does_not_move_is_noticed_unless_it_should_stand() -> None:
    video = np.repeat(_noise(1), 81, axis=0)
    assert picture_fault(CONFIG, video, 32, "turn left") == "still"
    assert picture_fault(CONFIG, video, 32, "stand still") is None
    assert picture_fault(CONFIG, video, 0, "turn left") is None  # nothing before it
    video[24] = _noise(2)[1]  # 8 frames earlier
    assert picture_fault(CONFIG, video, 32, "turn left") is None
    short = replace(CONFIG, frames=9, chunk_frames=4)  # within the chunk: 4 frames earlier
    assert picture_fault(short, video[20:29], 8, "turn left") is None


# --- with the game ---


def _recorder_clips(captions: list[list[str]], config: DoomConfig = CONFIG) -> torch.Tensor:
    """Clips [N, T, H, W, 3] that follow these captions, recorded in this process on MAP29."""
    with closing(Recorder(config)) as recorder:
        game, space = recorder.game("MAP29"), recorder.space("MAP29")
        game.enter("MAP29", 1)
        rng = np.random.default_rng(0)
        video = np.empty((len(captions), config.frames, config.height, config.width, 3), np.uint8)
        for row, captions_of_clip in enumerate(captions):
            for _ in range(200):
                walk = draw_walk(config, captions_of_clip, rng)
                start = find_start(space, walk, rng)
                if start and film(config, game, walk, start, video[row]) is None:
                    break
            else:
                raise AssertionError(f"no place for {captions_of_clip}")
        return torch.from_numpy(video)


def _shift(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> int:
    """Whole pixels by which the picture moved to the right, by least absolute difference."""
    a, b = (x.astype(np.float32).mean(-1) for x in (before, after))
    costs = {s: np.abs(b[:, 16 + s : 112 + s] - a[:, 16:112]).mean() for s in range(-10, 11)}
    return min(costs, key=lambda s: float(costs[s]))


@needs_vizdoom
def test_frames_move_as_captions_say() -> None:
    video = _recorder_clips(
        [[c] * 6 for c in ("turn left", "turn right", "turn left while walking", "stand still")]
        + [["turn right"] * 3 + ["turn left"] * 3]
    ).numpy()

    def shifts(clip: int, first: int, last: int) -> float:
        return float(
            np.median([_shift(video[clip, t - 1], video[clip, t]) for t in range(first, last)])
        )

    # Turning left by 3.2 to 4.8 of 90 degrees moves the picture right by 4 to 7 pixels.
    assert 3 <= shifts(0, 1, 81) <= 8
    assert -8 <= shifts(1, 1, 81) <= -3
    assert shifts(2, 1, 81) >= 2
    assert np.abs(video[3, 0].astype(int) - video[3, -1]).mean() < 2
    # The change comes at the chunk boundary: frame 32 is the last of the old action.
    assert shifts(4, 24, 33) <= -3
    assert shifts(4, 33, 42) >= 3


@needs_vizdoom
def test_walk_forward_approaches_and_backward_recedes() -> None:
    video = _recorder_clips([["walk forward"] * 6, ["walk backward"] * 6]).float()

    def zoom_gain(clip: int) -> float:
        """How much better a frame 4 later matches when enlarged than when shrunk by 6 %."""
        costs = []
        for t in range(4, 77, 8):
            now, later = (video[clip, f].permute(2, 0, 1)[None] for f in (t, t + 4))
            for scale, sign in ((1 / 1.06, 1), (1.06, -1)):
                theta = torch.tensor([[[scale, 0, 0], [0, scale, 0]]])
                grid = torch.nn.functional.affine_grid(theta, list(now.shape), align_corners=False)
                warped = torch.nn.functional.grid_sample(
                    now, grid, padding_mode="border", align_corners=False
                )
                costs.append(-sign * float((warped - later)[..., 16:80, 20:108].abs().mean()))
        return sum(costs)

    assert zoom_gain(0) > 0 > zoom_gain(1)


@needs_vizdoom
def test_a_held_up_player_is_noticed() -> None:
    with closing(Recorder(CONFIG)) as recorder:
        game, space = recorder.game("MAP29"), recorder.space("MAP29")
        game.enter("MAP29", 1)
        rng = np.random.default_rng(0)
        video = np.empty((81, 96, 128, 3), np.uint8)
        walk = draw_walk(CONFIG, ["walk forward"] * 6, rng)
        faults = []
        while len(faults) < 8:
            start = Start(complex(*space.sample(rng, 1)[0].round()), float(rng.uniform(-180, 180)))
            path = start.position + walk.path * np.exp(1j * np.radians(start.heading))
            if not space.is_free(np.stack([path.real, path.imag], axis=1)).all():
                faults.append(film(CONFIG, game, walk, start, video))
        # The grid is careful, so a few of these walks may pass; a wall stops most of them.
        assert sum(fault == "held up" for fault in faults) >= 5
        assert faults.count(None) <= 2
