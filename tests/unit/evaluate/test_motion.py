"""Flow against known shifts, against the drawn world's true camera, and against OpenCV."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.motion import (
    check_videos,
    flow,
    grey,
    motion,
    motion_magnitude,
    motion_ratio,
    static_share,
)
from aad1.worlds.sprites import SpritesConfig, draw, render

CONFIG = SpritesConfig(size=64, frames=9)


def pan(dx: float, dy: float, *, frames: int = 2) -> torch.Tensor:
    """Bare texture whose content moves by (dx, dy) pixels per frame: uint8 [6, T, 64, 64, 3]."""
    config = SpritesConfig(size=64, frames=frames)
    _, state = draw(config, 6, seed=0)
    time = torch.arange(frames, dtype=torch.float64)[:, None]
    camera = -time * torch.tensor([dx, dy], dtype=torch.float64)
    return render(
        config, replace(state, camera=camera.expand(6, -1, -1), radius=state.radius * 1e-3)
    )


@pytest.mark.parametrize("shift", [(0.3, 0.0), (0.0, -1.2), (2.4, 1.1), (-5.0, 3.0)])
def test_a_pan_is_measured_with_its_sign(shift: tuple[float, float]) -> None:
    light = grey(pan(*shift))
    vectors = flow(light[:, 0], light[:, 1])
    median = vectors.flatten(2).median(dim=2).values.mean(dim=0)
    error = math.hypot(float(median[0]) - shift[0], float(median[1]) - shift[1])
    assert error < 0.05 + 0.02 * math.hypot(*shift)
    measured = motion(pan(*shift, frames=5))
    assert torch.allclose(
        measured.direction.mean(dim=0), torch.tensor(shift).double(), atol=0.1 + 0.15 * max(shift)
    )


def test_equal_frames_have_no_flow() -> None:
    video = pan(1.0, 0.0)[:, :1].expand(-1, 6, -1, -1, -1)
    measured = motion(video)
    assert measured.magnitude.max() < 1e-5
    assert measured.predictability.abs().max() < 1e-5


def test_flow_follows_the_true_camera_and_the_true_speed() -> None:
    clips, state = draw(CONFIG, 32, seed=1)
    light = grey(clips.video)
    errors = []
    for clip in range(32):
        camera = state.camera[clip].diff(dim=0)
        vectors = flow(light[clip, :-1], light[clip, 1:])
        background = vectors.flatten(2).median(dim=2).values
        if camera[0].norm() > 0:
            errors.append((background + camera).norm(dim=1))
    error = torch.cat(errors)
    assert error.median() < 0.04
    assert error.quantile(0.9) < 0.1
    # Spin and the pull of edges come on top of this truth, so the measured mean lies above it.
    area = math.pi * state.radius.square() / CONFIG.size**2  # [B, S]
    truth = state.camera[:, 1].norm(dim=-1) * (1 - area.sum(dim=1))
    truth = truth + (area * state.velocity[:, 0].norm(dim=-1)).sum(dim=1)
    measured = motion_magnitude(clips.video)
    assert torch.corrcoef(torch.stack([measured, truth]))[0, 1] > 0.98
    assert (measured - truth).mean().abs() < 0.15 * truth.mean()


def test_flow_agrees_with_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    clips, _ = draw(CONFIG, 12, seed=2)
    light = grey(clips.video).round().to(torch.uint8).numpy()
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    theirs = []
    for clip in light:
        vectors = [dis.calc(a, b, None) for a, b in pairwise(clip)]
        lengths = [torch.from_numpy(v).norm(dim=-1).mean() for v in vectors]
        theirs.append(torch.stack(lengths).mean().double())
    ours = motion_magnitude(clips.video)
    assert torch.corrcoef(torch.stack([ours, torch.stack(theirs)]))[0, 1] > 0.97
    assert 0.7 < float(ours.mean() / torch.stack(theirs).mean()) < 1.3


def test_late_sees_the_last_quarter_only() -> None:
    moving = pan(1.0, 0.0, frames=9)
    stops = moving.clone()
    stops[:, 6:] = stops[:, 6:7]  # the last two pairs are still
    measured, whole = motion(stops), motion(moving)
    assert measured.late.max() < 1e-5
    assert (measured.magnitude > 0.6 * whole.magnitude).all()
    assert torch.allclose(whole.late, whole.magnitude, rtol=0.1)


def test_what_moves_on_is_predictable_and_noise_is_not() -> None:
    moving = pan(1.0, 0.5, frames=9)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(moving.shape[:-1], generator=generator)[..., None]
    noisy = (moving[:, :1] + 24 * noise).clamp(0, 255).to(torch.uint8)
    assert (motion(moving).predictability > 0.8).all()
    assert (motion(noisy).predictability.abs() < 0.3).all()
    shuffled = moving[:, [0, 2, 1, 4, 3, 6, 5, 8, 7]]
    assert (motion(shuffled).predictability < 0).all()


def test_a_stride_measures_nearly_the_same() -> None:
    clips, _ = draw(replace(CONFIG, frames=17), 6, seed=3)
    assert torch.allclose(
        motion_magnitude(clips.video, stride=4), motion_magnitude(clips.video), rtol=0.15
    )


def test_flow_takes_small_and_odd_sizes() -> None:
    light = grey(draw(SpritesConfig(size=16, frames=5), 2, seed=0)[0].video)
    assert flow(light[:, 0], light[:, 1]).shape == (2, 2, 16, 16)
    wide = torch.rand(1, 21, 50) * 255
    assert flow(wide, wide).shape == (1, 2, 21, 50)
    assert flow(wide, wide).abs().max() < 1e-5


def test_ratio_and_static_share() -> None:
    real = torch.tensor([1.0, 2.0, 3.0])
    assert motion_ratio(real / 2, real) == pytest.approx(0.5)
    assert static_share(torch.tensor([0.0, 0.49, 0.51, 9.0]), real_median=2.0) == 0.5
    with pytest.raises(UserError, match="must move more"):
        motion_ratio(real, real * 0)


def test_unfit_videos_are_refused() -> None:
    video = torch.zeros(4, 6, 16, 20, 3, dtype=torch.uint8)
    check_videos(video, "real", least=4)
    for bad, message in (
        (video.float(), "must be uint8"),
        (video[0], r"\[N, T, H, W, 3\]"),
        (video[:, :4], "at least 5 frames, got 4"),
        (video[:, :, :8], "at least 16x16 pixels, got 20x8"),
        (video[:3], "at least 4 real videos are needed, got 3"),
    ):
        with pytest.raises(UserError, match=message):
            check_videos(bad, "real", least=4)
    for stride in (0, 5):
        with pytest.raises(UserError, match=f"between 1 and 4, got {stride}"):
            motion(video, stride=stride)
