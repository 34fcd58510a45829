"""Fréchet distances against closed forms, and the features on videos with known answers."""

from __future__ import annotations

import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.frechet import (
    TD_NAMES,
    frame_features,
    frechet_distance,
    frechet_of_moments,
    moments,
    temporal_features,
)
from aad1.worlds.sprites import SpritesConfig, draw


def gaussian(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(size, generator=generator, dtype=torch.float64), root @ root.T


def test_diagonal_gaussians_have_the_textbook_distance() -> None:
    mean1, mean2 = torch.tensor([0.0, 1.0]).double(), torch.tensor([3.0, 1.0]).double()
    cov1, cov2 = torch.diag(torch.tensor([4.0, 1.0]).double()), torch.eye(2).double()
    # 3^2 + (2 - 1)^2 + (1 - 1)^2
    assert frechet_of_moments(mean1, cov1, mean2, cov2) == pytest.approx(10.0)


def test_general_gaussians_agree_with_the_eigenvalues_of_the_product() -> None:
    (mean1, cov1), (mean2, cov2) = gaussian(0, 6), gaussian(1, 6)
    cross = torch.linalg.eigvals(cov1 @ cov2).real.sqrt().sum()  # tr (C1 C2)^1/2
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    assert frechet_of_moments(mean1, cov1, mean2, cov2) == pytest.approx(float(expected))


def test_equal_sets_have_no_distance_and_singular_ones_no_trouble() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, features[:, :2], torch.ones(50, 1)], dim=1)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    moved = features + torch.tensor([2.0, 0, 0, 0, 0, 0, 0])
    assert frechet_distance(features, moved) == pytest.approx(4.0, abs=1e-5)
    assert frechet_distance(features, 0 * features[:3]) > 0


def test_features_that_are_not_finite_or_too_few_are_refused() -> None:
    features = torch.randn(8, 3)
    bad = features.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(features, bad)
    with pytest.raises(UserError, match="N >= 2"):
        moments(features[:1])


def test_temporal_features_of_a_ramp_in_closed_form() -> None:
    """All pixels rise by 4 grey levels a frame: d1 = 4 everywhere, d2 = 0."""
    ramp = (40 + 4 * torch.arange(9, dtype=torch.uint8)).view(1, 9, 1, 1, 1)
    video = ramp.expand(2, 9, 24, 24, 3)
    values = dict(zip(TD_NAMES, temporal_features(video)[0].tolist(), strict=True))
    assert values["d1_energy"] == pytest.approx(torch.tensor(4.0).log().item(), abs=2e-3)
    assert values["d2_energy"] == pytest.approx(torch.tensor(0.05).log().item() / 2, abs=1e-3)
    assert values["d1_sparsity"] == pytest.approx(1.0, abs=2e-3)
    assert values["d1_concentration"] == pytest.approx(0.0, abs=1e-3)
    assert values["d1_smoothness"] == pytest.approx(23 / 24 * 24 / 24, abs=0.06)
    assert values["d1_memory"] == pytest.approx(1.0, abs=5e-3)
    assert values["unsteadiness"] == pytest.approx(0.0, abs=1e-3)
    assert values["trend"] == pytest.approx(0.0, abs=1e-3)
    assert values["chroma_energy"] == pytest.approx(torch.tensor(0.05).log().item() / 2, abs=1e-3)


def test_speeding_up_shows_as_trend_and_colour_flicker_as_chroma() -> None:
    clips, _ = draw(SpritesConfig(size=32, frames=9), 4, seed=0)
    steps = torch.tensor([0, 0, 0, 1, 2, 3, 4, 6, 8])
    column = {name: index for index, name in enumerate(TD_NAMES)}
    plain = temporal_features(clips.video)
    faster = temporal_features(clips.video[:, steps])
    assert (faster[:, column["trend"]] > plain[:, column["trend"]] + 1).all()
    tinted = clips.video.clone()
    tinted[:, ::2, ..., 0] = (tinted[:, ::2, ..., 0].int() - 30).clamp(min=0).to(torch.uint8)
    chroma = temporal_features(tinted)[:, column["chroma_energy"]]
    assert (chroma > plain[:, column["chroma_energy"]]).all()


def test_static_videos_have_finite_features() -> None:
    video = torch.full((3, 9, 32, 32, 3), 77, dtype=torch.uint8)
    assert torch.isfinite(temporal_features(video)).all()
    assert torch.isfinite(frame_features(video, "late")).all()


def test_features_do_not_depend_on_the_batch() -> None:
    video = draw(SpritesConfig(size=32, frames=9), 5, seed=0)[0].video
    assert torch.allclose(temporal_features(video)[3:4], temporal_features(video[3:4]), atol=1e-5)


def test_early_and_late_take_their_quarter_without_the_given_frame() -> None:
    video = draw(SpritesConfig(size=32, frames=9), 3, seed=0)[0].video
    early, late = frame_features(video, "early"), frame_features(video, "late")
    assert early.shape == late.shape == (6, 14)
    broken = video.clone()
    broken[:, 0] = 0
    broken[:, 3:7] = 0
    assert torch.equal(frame_features(broken, "early"), early)
    assert torch.equal(frame_features(broken, "late"), late)
    with pytest.raises(UserError, match='"early" or "late", got "middle"'):
        frame_features(video, "middle")
