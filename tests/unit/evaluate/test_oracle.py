"""The drawn world's decoder against its exact state, and off it."""

from __future__ import annotations

import torch

from aad1.evaluate.oracle import camera_velocity, color_places
from aad1.worlds.sprites import COLORS, SpritesConfig, draw

CLIPS, STATE = draw(SpritesConfig(), 12, seed=8)


def test_camera_velocity_is_the_true_one() -> None:
    true = (STATE.camera[:, -1] - STATE.camera[:, 0]) / 20
    error = (camera_velocity(CLIPS.video) - true).norm(dim=1)
    assert float(error.median()) < 0.05
    assert float(error.max()) < 0.2
    assert float(true.norm(dim=1).max()) > 0.5


def test_a_frozen_camera_does_not_move() -> None:
    frozen = CLIPS.video[:2, :1].expand(-1, 9, -1, -1, -1)
    assert float(camera_velocity(frozen).norm(dim=1).max()) < 1e-6


def test_shapes_are_found_where_they_are_and_not_elsewhere() -> None:
    names = list(COLORS)
    errors, seen, strangers = [], [], []
    for clip in range(12):
        own = STATE.color[clip].tolist()
        for number, name in enumerate(names):
            places = color_places(CLIPS.video[clip : clip + 1], COLORS[name])[0]
            found = torch.isfinite(places[:, 0])
            if number in own:
                true = STATE.position[clip, :, own.index(number)]
                errors.append((places - true)[found].norm(dim=1))
                seen.append(found.double().mean())
            else:
                strangers.append(found.double().mean())
    assert float(torch.cat(errors).median()) < 1
    assert float(torch.stack(seen).mean()) > 0.9
    assert float(torch.stack(strangers).mean()) < 0.1
