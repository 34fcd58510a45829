"""Which metric must catch which corruption, and what may pass for real motion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aad1.errors import UserError
from aad1.evaluate.motion import motion_magnitude
from aad1.evaluate.report import (
    MOTION_BAND,
    RealStatistics,
    evaluate_videos,
    measure_real,
    motion_check,
    moving_noise,
)
from aad1.worlds.sprites import SpritesConfig, draw

FRAMES, VIDEOS = 13, 32
CONFIG = SpritesConfig(size=48, frames=FRAMES)


def held_out(config: SpritesConfig = CONFIG) -> torch.Tensor:
    return draw(config, VIDEOS, seed=3)[0].video


@pytest.fixture(scope="module")
def real() -> RealStatistics:
    return measure_real(
        draw(CONFIG, VIDEOS, seed=1)[0].video, draw(CONFIG, VIDEOS, seed=2)[0].video, cheats=True
    )


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    return video.round().clamp(0, 255).to(torch.uint8)


def static(video: torch.Tensor) -> torch.Tensor:
    return video[:, :1].expand_as(video)


def freeze(video: torch.Tensor) -> torch.Tensor:
    return torch.cat([video[:, :8], video[:, 8:9].expand(-1, FRAMES - 8, -1, -1, -1)], dim=1)


def blur(video: torch.Tensor) -> torch.Tensor:
    frames = video.flatten(0, 1).permute(0, 3, 1, 2).float()
    frames = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return to_bytes(frames).permute(0, 2, 3, 1).view_as(video)


def drift_noise(video: torch.Tensor) -> torch.Tensor:
    amount = torch.linspace(0, 16, FRAMES).view(1, -1, 1, 1, 1)
    return to_bytes(video + amount * moving_noise(video.shape[:4], "fresh", seed=9)[..., None])


def flicker(video: torch.Tensor) -> torch.Tensor:
    factor = 1 + 0.1 * torch.randn(VIDEOS, FRAMES, generator=torch.Generator().manual_seed(0))
    return to_bytes(video * factor[:, :, None, None, None])


def swap(video: torch.Tensor) -> torch.Tensor:
    order = list(range(FRAMES))
    for frame in range(1, FRAMES - 1, 2):
        order[frame], order[frame + 1] = order[frame + 1], order[frame]
    return video[:, order]


def double(video: torch.Tensor) -> torch.Tensor:
    del video  # the same clips, drawn for twice as long
    return held_out(replace(CONFIG, frames=2 * FRAMES))[:, ::2]


CORRUPTIONS = {
    "static": static,
    "freeze": freeze,
    "double": double,
    "blur": blur,
    "drift_noise": drift_noise,
    "flicker": flicker,
    "swap": swap,
}
# Which figure must be how many floors high (FDs), or outside the band of M.
CAUGHT = {
    "static": {"M", "late_M", "FDtd"},
    "freeze": {"late_M", "FDtd"},
    "double": {"M", "FDtd"},
    "blur": {"FDtd", "FDnss_early", "FDnss_late"},
    "drift_noise": {"FDtd", "FDnss_late"},
    "flicker": {"FDtd"},
    "swap": {"FDtd"},
}
MISSED = {  # the blind spots: another figure is needed for these
    "static": {"FDnss_early", "FDnss_late"},
    "freeze": {"FDnss_early", "FDnss_late"},
    "double": {"FDnss_early", "FDnss_late"},
    "blur": {"M", "late_M"},
    "drift_noise": {"M"},
    "flicker": {"FDnss_late"},
    "swap": {"FDnss_early", "FDnss_late"},
}


def alarms(figures: dict[str, float]) -> set[str]:
    raised = {name for name in ("M", "late_M") if not MOTION_BAND[0] <= figures[name] <= 1.4}
    for name in ("FDtd", "FDnss_early", "FDnss_late"):
        if figures[name] > 6 * figures[f"floor_{name}"]:
            raised.add(name)
    return raised


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_is_caught(name: str, real: RealStatistics) -> None:
    raised = alarms(evaluate_videos(CORRUPTIONS[name](held_out()), real))
    assert raised >= CAUGHT[name]
    assert not raised & MISSED[name]


def test_other_real_videos_raise_no_alarm_and_pass(real: RealStatistics) -> None:
    figures = evaluate_videos(held_out(), real)
    assert not alarms(figures)
    assert 0.85 < figures["M"] < 1.15
    assert figures["S"] < 0.2
    assert 0 < figures["FDtd"] < 4
    assert figures["num_generated"] == figures["num_real"] == figures["floor_num_videos"] == VIDEOS
    assert motion_check(figures, real).passed


def test_static_videos_count_as_static(real: RealStatistics) -> None:
    figures = evaluate_videos(static(held_out()), real)
    assert figures["S"] == 1.0
    assert figures["M"] < 1e-5
    assert not motion_check(figures, real).passed


@pytest.mark.parametrize("kind", ["fresh", "drifting", "drifting_smooth"])
@pytest.mark.parametrize("amplitude", [6, 13, 20, 28])
def test_a_static_video_with_moving_noise_fails(
    kind: str, amplitude: int, real: RealStatistics
) -> None:
    video = held_out()
    noise = amplitude * moving_noise(video.shape[:4], kind, seed=77)[..., None]
    assert not motion_check(evaluate_videos(to_bytes(static(video) + noise), real), real).passed


def test_some_noise_fools_the_motion_ratio_alone(real: RealStatistics) -> None:
    """Why the check needs the cheats: M in the band, and FDtd below half of the frozen frame's."""
    frozen, *noises = real.cheats
    assert frozen.name == "frozen"
    assert frozen.M < 1e-5
    fooled = [n for n in noises if 0.6 <= n.M <= 1.4 and n.FDtd < frozen.FDtd / 2]
    assert {name.name.rsplit("_", 1)[0] for name in fooled} >= {"frozen_fresh_noise"}


def test_coloured_noise_fails_too(real: RealStatistics) -> None:
    video = held_out()
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(5))
    for amplitude in (12, 24, 48):
        figures = evaluate_videos(to_bytes(static(video) + amplitude * noise), real)
        assert not motion_check(figures, real).passed


def test_a_blurred_moving_video_passes_but_not_beside_a_better_baseline(
    real: RealStatistics,
) -> None:
    figures = evaluate_videos(blur(held_out()), real)
    assert motion_check(figures, real).passed
    fine = evaluate_videos(held_out(), real)
    verdict = motion_check(figures, real, {"stage I": fine})
    assert not verdict.passed
    assert "stage I" in verdict.failures[0]
    assert verdict.bound == pytest.approx(0.5 * fine["FDtd"])
    assert motion_check(fine, real, {"stage I": figures}).passed


def test_a_check_needs_its_figures_and_its_cheats(real: RealStatistics) -> None:
    with pytest.raises(UserError, match="cheats=True"):
        motion_check({"M": 1.0, "FDtd": 1.0}, replace(real, cheats=()))
    with pytest.raises(UserError, match="FDtd"):
        motion_check({"M": 1.0}, real)
    assert not motion_check({"M": 1.0, "FDtd": float("nan")}, real).passed
    assert not motion_check({"M": float("nan"), "FDtd": 0.0}, real).passed


def test_floors_sit_near_what_real_videos_get_and_fall_with_their_number(
    real: RealStatistics,
) -> None:
    halves = measure_real(draw(CONFIG, VIDEOS, seed=1)[0].video)
    assert halves.floor_num_videos == VIDEOS // 2
    assert halves.floors["FDtd"] > real.floors["FDtd"] > 0
    assert 0.8 < real.floors["M"] < 1.2


def test_statistics_survive_a_file(real: RealStatistics, tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    real.save(path)
    assert RealStatistics.load(path) == real
    assert path.stat().st_size < 40_000
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"real\.json"):
        RealStatistics.load(path)
    real.save(path)
    record = json.loads(path.read_text())
    record["early"]["center"].pop()
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="14 statistics"):
        RealStatistics.load(path)
    with pytest.raises(UserError, match="nothing"):
        RealStatistics.load(tmp_path / "nothing.json")


def test_too_few_or_unlike_videos_are_refused(real: RealStatistics) -> None:
    video = held_out()
    with pytest.raises(UserError, match="at least 16 generated videos are needed, got 15"):
        evaluate_videos(video[:15], real)
    with pytest.raises(UserError, match="at least 32 real videos are needed, got 31"):
        measure_real(video[:31])
    with pytest.raises(UserError, match=r"\[13, 48, 48\], got \[12, 48, 48\]"):
        evaluate_videos(video[:, :12], real)
    with pytest.raises(UserError, match="must move more"):
        measure_real(static(video))


def test_real_videos_may_be_given_instead_of_their_statistics() -> None:
    reference = draw(replace(CONFIG, frames=9), VIDEOS, seed=1)[0].video
    video = draw(replace(CONFIG, frames=9), 16, seed=3)[0].video
    figures = evaluate_videos(video, reference)
    assert figures == evaluate_videos(video, measure_real(reference))
    expected = motion_magnitude(video).mean() / motion_magnitude(reference).mean()
    assert figures["M"] == pytest.approx(float(expected))
