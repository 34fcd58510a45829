"""Frame statistics: each reacts to what it is named after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aad1.evaluate.motion import grey
from aad1.evaluate.niqe import NSS_NAMES, log_laplacian, nss_features
from aad1.worlds.sprites import SpritesConfig, draw

COLUMN = {name: index for index, name in enumerate(NSS_NAMES)}


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return grey(draw(SpritesConfig(size=64, frames=1), 24, seed=0)[0].video[:, 0])


def test_there_are_fourteen_finite_ones_even_for_a_constant_frame(frames: torch.Tensor) -> None:
    assert nss_features(frames).shape == (24, 14)
    assert len(NSS_NAMES) == 14
    assert torch.isfinite(nss_features(torch.full((2, 20, 24), 128.0))).all()


def test_white_noise_is_gaussian_and_uncorrelated() -> None:
    noise = 128 + 20 * torch.randn(4, 96, 96, generator=torch.Generator().manual_seed(0))
    features = nss_features(noise).mean(dim=0)
    assert abs(float(features[COLUMN["mscn_peakedness"]]) - 0.82) < 0.05  # sqrt(2 / pi) = 0.798
    for name in ("mscn_across", "mscn_down", "mscn_diagonal"):
        assert abs(float(features[COLUMN[name]])) < 0.25
    # Laplacian of white noise: variance 4^2 + 4 = 20 times that of the noise.
    expected = torch.tensor(20.0 * 20.0**0.5).log()
    assert float(features[COLUMN["sharpness"]]) == pytest.approx(float(expected), abs=0.05)


def test_blur_noise_and_fading_show_where_they_should(frames: torch.Tensor) -> None:
    plain = nss_features(frames)
    blurred = nss_features(
        F.avg_pool2d(F.pad(frames[:, None], (1, 1, 1, 1), "replicate"), 3, 1)[:, 0]
    )
    assert (blurred[:, COLUMN["sharpness"]] < plain[:, COLUMN["sharpness"]] - 0.5).all()
    assert blurred[:, COLUMN["mscn_across"]].mean() > plain[:, COLUMN["mscn_across"]].mean()
    generator = torch.Generator().manual_seed(0)
    noisy = nss_features(frames + 12 * torch.randn(frames.shape, generator=generator))
    assert (noisy[:, COLUMN["mscn_across"]] < plain[:, COLUMN["mscn_across"]]).all()
    faded = nss_features(128 + 0.5 * (frames - 128))
    assert (faded[:, COLUMN["contrast"]] < plain[:, COLUMN["contrast"]] - 0.3).all()
    assert torch.allclose(
        log_laplacian(128 + 0.5 * (frames - 128)), log_laplacian(frames) - 0.693, atol=1e-2
    )


def test_across_and_down_are_told_apart() -> None:
    stripes = 128 + 60 * torch.sin(torch.arange(64.0) * 1.5)
    rows = nss_features(stripes[:, None].expand(64, 64)[None])[0]
    columns = nss_features(stripes.expand(64, 64)[None])[0]
    assert rows[COLUMN["mscn_across"]] > 0.9
    assert rows[COLUMN["mscn_down"]] < 0.5
    assert columns[COLUMN["mscn_down"]] > 0.9
    assert columns[COLUMN["mscn_across"]] < 0.5
