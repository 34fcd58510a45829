"""The drawn world's oracle: does the camera pan, and do the shapes move, as the prompt says?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from aad1.evaluate.compare import Figure, not_computed
from aad1.evaluate.intervals import wilson
from aad1.evaluate.motion import quarter
from aad1.evaluate.oracle import camera_velocity, color_places
from aad1.evaluation.result import Section
from aad1.evaluation.worlds import RealVideos, Start
from aad1.worlds.sprites import COLORS, DIRECTIONS, SpritesState

_CONE = math.cos(math.pi / 4)
_STAYS_BELOW = 0.004
"""Frame sides per frame; the slowest pan is twice as fast."""
_SETS_OUT = 4
"""Frames over which a shape's first direction is taken; bounces come later."""
_SHAPE = re.compile(rf"({'|'.join(COLORS)}) \w+ moves ({'|'.join(DIRECTIONS)})")
_PAN = re.compile(rf"camera (?:pans ({'|'.join(DIRECTIONS)})|stays)")


def oracle_section(
    made: Tensor, starts: Sequence[Start], truth: Tensor, state: SpritesState, real: RealVideos
) -> Section:
    """Shares of videos that do what their prompt says, generated and real alike decoded.

    made: uint8 [N, T, H, W, 3] of the starts, in their order; truth: real videos of `state`, whose
    prompts are those of `real.other`.
    """
    prompts = [start.prompt for start in starts]
    found = obedience(made, prompts)
    known = obedience(truth, real.other.prompts if real.other else [])
    figures = {name: _share(found[name], known[name]) for name in found}
    error = (camera_velocity(truth) - true_camera_velocity(state)).norm(dim=1)
    note = (
        "Decoded from pixels; of real videos the same decoder's result stands beside. Its median "
        f"error for the camera of real videos is {float(error.median()):.2f} pixels per frame, "
        f"its 90th percentile {float(error.quantile(0.9)):.2f}."
    )
    return Section(
        name="oracle", title="Does it do what the prompt says?", figures=figures, note=note
    )


def obedience(videos: Tensor, prompts: Sequence[str]) -> dict[str, list[bool]]:
    """For each kind of statement in the prompts, whether each one came true."""
    side = videos.shape[3]
    out: dict[str, list[bool]] = {
        name: [] for name in ("camera_direction", "camera_stays", "colors", "directions")
    }
    late = quarter(videos.shape[1])
    # Flow on the videos' device; colours frame by frame, which is for the CPU.
    cameras = camera_velocity(videos)
    for video, prompt, camera in zip(videos.cpu(), prompts, cameras, strict=True):
        if pan := _PAN.search(prompt):
            speed = float(camera.norm())
            if pan[1] is None:
                out["camera_stays"].append(speed < _STAYS_BELOW * side)
            else:
                along = _along(camera, pan[1])
                out["camera_direction"].append(
                    speed >= _STAYS_BELOW * side and along > _CONE * speed
                )
        for color, direction in _SHAPE.findall(prompt):
            places = color_places(video[None], COLORS[color])[0]
            seen = torch.isfinite(places[:, 0])
            out["colors"].append(bool(seen[-late:].double().mean() > 0.5))
            if bool(seen[0]) and bool(seen[_SETS_OUT]):
                step = places[_SETS_OUT] - places[0]
                moved = float(step.norm())
                out["directions"].append(moved > 0.5 and _along(step, direction) > _CONE * moved)
            elif bool(seen[0]):
                out["directions"].append(False)
    return out


def _along(vector: Tensor, direction: str) -> float:
    angle = DIRECTIONS[direction]
    return float(vector[0]) * math.cos(angle) + float(vector[1]) * math.sin(angle)


def pan_speed(video: Tensor) -> Tensor:
    """Camera speed of one video uint8 [T, H, W, 3], pixels per frame."""
    return camera_velocity(video[None])[0].norm()


def true_camera_velocity(state: SpritesState) -> Tensor:
    """float64 [N, 2], pixels per frame; a clip's camera moves evenly."""
    return (state.camera[:, -1] - state.camera[:, 0]) / (state.camera.shape[1] - 1)


def true_pan_deviation(state: SpritesState) -> float:
    """Standard deviation of the camera's speed over clips that pan, pixels per frame.

    The prompt names a pan's direction and nothing tells its speed, so this is also the deviation
    between the futures of one first frame and prompt.
    """
    speed = true_camera_velocity(state).norm(dim=1)
    return float(speed[speed > 0].std())


def _share(hits: list[bool], real: list[bool]) -> Figure:
    if not hits:
        return not_computed("no prompt says this, or the shape cannot be seen in the first frame")
    share = sum(real) / len(real) if real else None
    return Figure(
        value=sum(hits) / len(hits), interval=wilson(sum(hits), len(hits)),
        floor=share, floor_range=wilson(sum(real), len(real)) if real else None,
        videos=len(hits), floor_videos=len(real),
    )  # fmt: skip
