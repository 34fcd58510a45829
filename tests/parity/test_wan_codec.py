"""The Wan codec against diffusers' own encode and decode, on a tiny random autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aad1.errors import UserError
from aad1.models.codec import Codec, load_codec, to_pixels

diffusers = pytest.importorskip("diffusers")

from aad1.models.wan_codec import WanCodec  # noqa: E402


@pytest.fixture(scope="module")
def codec() -> WanCodec:
    torch.manual_seed(0)
    return WanCodec.from_config(base_dim=8, num_res_blocks=1)


def video(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, 16, 24, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_encode_is_the_normalised_mode(codec: WanCodec) -> None:
    assert isinstance(codec, Codec)
    assert (codec.latent_channels, codec.temporal_stride, codec.spatial_stride) == (16, 4, 8)
    clip = video(9)
    latents = codec.encode(clip)
    assert latents.shape == (2, 16, 3, 2, 3)
    mode = codec.vae.encode(to_pixels(clip)).latent_dist.mode()
    mean = torch.tensor(codec.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(codec.vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert mean[0, 0] == pytest.approx(-0.7571)  # as published with Wan 2.1
    torch.testing.assert_close(latents, (mode - mean) / std, atol=1e-6, rtol=0)
    torch.testing.assert_close(codec.encode(clip[:, :1]), latents[:, :, :1], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3]])
def test_streaming_equals_whole_decoding(codec: WanCodec, sizes: list[int]) -> None:
    latents = torch.randn(2, 16, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    whole = codec.decode(latents)
    assert whole.shape == (2, 13, 16, 24, 3)
    stream, other = codec.stream(), codec.stream()
    parts = []
    for part in latents.split(sizes, dim=2):
        parts.append(stream.decode(part))
        other.decode(-part)  # a second stream, and a whole decode, must not disturb the first
        codec.decode(part)
    assert [part.shape[1] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    assert (torch.cat(parts, 1).int() - whole.int()).abs().max() <= 1
    fresh = codec.stream().decode(latents[:, :, -1:])
    assert fresh.shape[1] == 1  # the start of a video, whatever came before in other streams


def test_an_image_is_latent_frame_0_of_any_clip_that_begins_with_it(codec: WanCodec) -> None:
    clip = video(9)
    other = torch.cat([clip[:, :1], 255 - clip[:, 1:]], 1)
    image = codec.encode(clip[:, :1])
    assert torch.equal(codec.encode(clip)[:, :, :1], codec.encode(other)[:, :, :1])
    torch.testing.assert_close(codec.encode(clip)[:, :, :1], image, atol=1e-6, rtol=0)


def test_half_precision_keeps_the_statistics_exact(codec: WanCodec, tmp_path: Path) -> None:
    """Rounded to bfloat16 they would shift every latent by up to 0.4%."""
    codec.save_pretrained(tmp_path)
    half = load_codec(tmp_path, torch.bfloat16)
    assert isinstance(half, WanCodec) and half.vae.dtype == torch.bfloat16
    assert torch.equal(half.latents_mean, codec.latents_mean)
    assert torch.equal(half.latents_std, codec.latents_std)
    latents = codec.encode(video(5))
    assert half.encode(video(5)).dtype == torch.float32
    error = (half.encode(video(5)) - latents).norm() / latents.norm()
    assert 0 < float(error) < 0.02
    parts = [half.stream().decode(latents), half.decode(latents)]
    assert (parts[0].int() - parts[1].int()).abs().max() <= 2
    assert (parts[0].float() - codec.decode(latents).float()).abs().mean() < 2


def test_folders_are_exchanged_with_diffusers(codec: WanCodec, tmp_path: Path) -> None:
    clip = video(5)
    codec.save_pretrained(tmp_path / "ours")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(WanCodec(theirs).encode(clip), codec.encode(clip))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_codec(tmp_path / "theirs")
    assert isinstance(loaded, WanCodec)
    torch.testing.assert_close(loaded.encode(clip), codec.encode(clip))


def test_damaged_files_and_other_releases_are_refused(
    codec: WanCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model"):
        load_codec(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no Wan weights found; looked in"):
        load_codec(tmp_path)
    with pytest.raises(UserError, match="height"):
        codec.encode(video(5)[:, :, :15])
    monkeypatch.setattr(diffusers, "__version__", "0.50.0")
    with pytest.raises(UserError, match=r"0\.50\.0"):
        codec.stream()
