"""The metric networks: formulas against closed forms, files, what the packaged ones can tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aad1.errors import UserError
from aad1.evaluate.networks import (
    PACKAGED,
    Networks,
    NetworksConfig,
    corners_of,
    for_world,
    frames_of,
    load,
    windows_of,
)
from aad1.worlds.sprites import SpritesConfig, draw

CONFIG = NetworksConfig(world="test", height=16, width=16, stride=2, targets=3)


class Plane(torch.nn.Module):
    """A stand-in encoder: the mean red and green of a picture, as a direction."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x.mean(dim=(2, 3))[:, :2], dim=1)


def angles(*degrees: float) -> Tensor:
    """A video whose frame t has colour (cos, sin) of the angle: uint8 [1, T, 16, 16, 3]."""
    turn = torch.deg2rad(torch.tensor(degrees))
    color = torch.stack([turn.cos(), turn.sin(), torch.zeros(len(degrees))], dim=1)
    pixels = ((color * 0.99 + 1) * 127.5).round().to(torch.uint8)
    return pixels[None, :, None, None].expand(1, -1, 16, 16, 3).contiguous()


def test_consistency_is_vbench_s_formula() -> None:
    networks = Networks(CONFIG)
    networks.encoder = Plane()  # type: ignore[assignment]
    cos = [float(torch.deg2rad(torch.tensor(a)).cos()) for a in (0.0, 30.0, 60.0, 120.0)]
    # Frames at 0, 30, 90 and 120 degrees: steps of 30, 60, 30; from the first 30, 90, 120.
    subject, background, first, last = networks.consistency(angles(0, 30, 90, 120))[0].tolist()
    steps, firsts = [cos[1], cos[2], cos[1]], [cos[1], 0.0, 0.0]  # negative ones count as 0
    want = sum((s + f) / 2 for s, f in zip(steps, firsts, strict=True)) / 3
    assert subject == pytest.approx(want, abs=0.01)
    assert background == pytest.approx(want, abs=0.01)
    assert first == pytest.approx(0.4 * cos[1] + 0.3 * sum(steps) / 3 + 0.3 * cos[2], abs=0.01)
    assert last == 0
    still = networks.consistency(angles(50, 50, 50))[0]
    torch.testing.assert_close(still, torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)


def test_the_background_is_seen_in_the_corners() -> None:
    video = angles(0, 0, 0).clone()
    video[:, 1:, 6:10, 6:10] = 0  # the middle changes, the corners do not
    networks = Networks(CONFIG)
    networks.encoder = Plane()  # type: ignore[assignment]
    subject, background, _, _ = networks.consistency(video)[0].tolist()
    assert background == pytest.approx(1, abs=1e-6) and subject < 0.999


def test_windows_take_every_other_frame_and_do_not_overlap() -> None:
    video = torch.arange(33, dtype=torch.uint8).view(1, 33, 1, 1, 1).expand(1, 33, 16, 16, 3)
    windows = windows_of(video, CONFIG)
    assert windows.shape == (1, 2, 8, 16, 16)
    values = ((windows[0, :, :, 0, 0] + 1) * 127.5).round().int().tolist()
    assert values == [list(range(0, 15, 2)), list(range(15, 30, 2))]
    assert windows_of(video[:, :14], CONFIG).shape[1] == 0
    assert Networks(CONFIG).motion_features(video[:, :14]).shape == (1, 0, 16)
    assert Networks(CONFIG).motion_features(video).shape == (1, 2, 16)


def test_frames_of_any_size_are_made_to_fit() -> None:
    for height, width in ((32, 48), (8, 8), (16, 16)):
        video = torch.full((2, 3, height, width, 3), 255, dtype=torch.uint8)
        assert frames_of(video, CONFIG).shape == (2, 3, 3, 16, 16)
        assert corners_of(video, CONFIG).shape == (2, 3, 4, 3, 16, 16)
        assert float(frames_of(video, CONFIG).min()) == pytest.approx(1)


def test_files(tmp_path: Path) -> None:
    networks = Networks(CONFIG).eval()
    networks.save(tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert again.config == CONFIG and again.fingerprint() == networks.fingerprint()
    video = angles(0, 30, 90, 120)
    torch.testing.assert_close(
        again.consistency(video), networks.consistency(video), atol=1e-2, rtol=0
    )
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read metric networks from .*b\.safetensors"):
        load(tmp_path / "b.safetensors")
    assert for_world("mars") is None


def test_the_packaged_networks_fit_in_the_package_s_share() -> None:
    files = [*PACKAGED.iterdir(), *(PACKAGED.parent / "doom_evaluate").iterdir()]
    assert sum(f.stat().st_size for f in files) < 4 * 2**20


def test_the_encoder_knows_a_video_by_its_frames() -> None:
    """Clips that were never trained on: the nearest late frame is of the same video."""
    networks = for_world("sprites")
    assert networks is not None
    video = draw(SpritesConfig(size=64, frames=21), 48, seed=77)[0].video
    pictures = frames_of(video, networks.config)
    early, late = networks.encoder(pictures[:, 2]), networks.encoder(pictures[:, 18])
    hits = (early @ late.T).argmax(dim=1) == torch.arange(48)
    assert float(hits.double().mean()) > 0.9


def test_motion_features_tell_how_fast_the_camera_pans() -> None:
    networks = for_world("sprites")
    assert networks is not None
    config = SpritesConfig(size=64, frames=8, pan_share=0.5)
    clips, state = draw(config, 96, seed=78)
    answer = networks.motion.told(networks.motion_features(clips.video).float()[:, 0])[:, :2]
    truth = state.camera.diff(dim=1).mean(dim=1)
    for axis in range(2):
        pair = torch.stack([answer[:, axis].double(), truth[:, axis]])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.9


def test_doom_s_networks_are_there() -> None:
    networks = for_world("doom")
    assert networks is not None and networks.config.stride == 2
