"""Codecs: what turns uint8 video into latents and back, behind one interface.

Three kinds share it: `PixelCodec` (this file) is lossless and has no weights, `CausalCodec`
(causal_codec.py) is this project's own light video autoencoder, `WanCodec` (wan_codec.py) is
Wan 2.1's. All are causal in time: latent frame 0 depends on video frame 0 alone, so an image is a
video of one frame, and a decoder can stream.

Shape letters: B batch, T video frames, F latent frames, C latent channels, H W pixels, h w latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from aad1.errors import UserError
from aad1.models.weights import load_strict, read_json, read_tensors, write_json, write_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CLASS_NAMES = ("PixelCodec", "CausalCodec", "AutoencoderKLWan")


class DecoderStream(Protocol):
    """A decoder in the middle of a video: it keeps what later frames need of earlier ones."""

    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, C, f, h, w] -> their frames, uint8 [B, t, H, W, 3].

        The very first latent frame of a stream gives one video frame, every other one gives
        `temporal_stride`. Decoding piece by piece equals `Codec.decode` of the whole.
        """
        ...

    def fork(self) -> DecoderStream:
        """A second stream that stands where this one does; neither disturbs the other."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Video <-> latents. Latents are normalised to about unit standard deviation.

    A clip of T = 1 + temporal_stride * (F - 1) video frames has F latent frames; height and width
    are divided by spatial_stride.
    """

    latent_channels: int
    temporal_stride: int
    spatial_stride: int

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, C, F, h, w]. UserError for a size off the grid."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """float [B, C, F, h, w] -> uint8 [B, T, H, W, 3]."""
        ...

    def stream(self) -> DecoderStream:
        """A new decoder stream, at the start of a video."""
        ...

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and the weights (in `dtype`) into `folder`."""
        ...


def latent_frames(video_frames: int, temporal_stride: int) -> int:
    """F of a clip of T video frames. UserError unless T = 1 + temporal_stride * k."""
    whole, rest = divmod(video_frames - 1, temporal_stride)
    if video_frames >= 1 and rest == 0:
        return 1 + whole
    low = max(1, 1 + whole * temporal_stride)
    raise UserError(
        f"a clip of {video_frames} frames does not fit: it must have 1 + {temporal_stride} k "
        f"frames; the nearest are {low} and {max(1, low + temporal_stride)}"
    )


def check_video(video: Tensor, temporal_stride: int, spatial_stride: int) -> None:
    """UserError unless `video` is uint8 [B, T, H, W, 3] of a size that the strides divide."""
    if video.dtype != torch.uint8 or video.dim() != 5 or video.shape[-1] != 3:
        raise UserError(
            f"a video must be uint8 [B, T, H, W, 3], got {video.dtype} {list(video.shape)}"
        )
    latent_frames(video.shape[1], temporal_stride)
    for name, size in (("height", video.shape[2]), ("width", video.shape[3])):
        if size % spatial_stride or size == 0:
            low = size // spatial_stride * spatial_stride
            near = f"{low} or {low + spatial_stride}" if low else f"{spatial_stride}"
            raise UserError(
                f"a video {name} of {size} pixels is not a multiple of {spatial_stride}; use {near}"
            )


def check_latents(latents: Tensor, latent_channels: int) -> None:
    """UserError unless `latents` is float [B, C, F, h, w] with the codec's C."""
    if latents.dim() != 5 or latents.shape[1] != latent_channels or latents.shape[2] < 1:
        raise UserError(
            f"latents must be [B, {latent_channels}, F, h, w] with F >= 1, "
            f"got {list(latents.shape)}"
        )


def to_pixels(video: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in [-1, 1] (a view: channels stay last)."""
    return (video.to(dtype) / 127.5 - 1.0).permute(0, 4, 1, 2, 3)


def to_uint8(pixels: Tensor) -> Tensor:
    """float [B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3], rounded and clamped."""
    levels = (pixels.float() + 1.0) * 127.5
    return levels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


class PixelCodec:
    """Pixel unshuffle: lossless, no weights, one latent frame per video frame.

    spatial_stride: side of the square of pixels that becomes one latent position
        (C = 3 * spatial_stride ** 2).
    mean, std: pixels in [-1, 1] are stored as (pixel - mean) / std; `fit` picks them so that the
        latents of a world have standard deviation about 0.9.

    decode(encode(video)) == video exactly: a float32 step of rounding is far below half a level.
    """

    temporal_stride = 1

    def __init__(self, spatial_stride: int = 8, mean: float = 0.0, std: float = 1.0) -> None:
        if spatial_stride < 1:
            raise UserError(f"spatial_stride {spatial_stride} must be >= 1")
        if not (math.isfinite(mean) and math.isfinite(std) and 1e-3 <= std <= 1e3):
            raise UserError(f"mean {mean} must be finite and std {std} within [0.001, 1000]")
        self.spatial_stride = spatial_stride
        self.latent_channels = 3 * spatial_stride**2
        self.mean = mean
        self.std = std

    @classmethod
    def fit(cls, video: Tensor, spatial_stride: int = 8, latent_std: float = 0.9) -> PixelCodec:
        """A codec whose latents of `video` (uint8 [B, T, H, W, 3]) have std `latent_std`."""
        check_video(video, 1, spatial_stride)
        pixels = to_pixels(video)
        std = float(pixels.std(correction=0)) / latent_std
        return cls(spatial_stride, mean=float(pixels.mean()), std=max(std, 1e-3))

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, 3 s^2, T, H/s, W/s]."""
        check_video(video, 1, self.spatial_stride)
        frames = (to_pixels(video) - self.mean) / self.std
        frames = nnf.pixel_unshuffle(frames.transpose(1, 2), self.spatial_stride)
        return frames.transpose(1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """float [B, 3 s^2, F, h, w] -> uint8 [B, F, h s, w s, 3]."""
        check_latents(latents, self.latent_channels)
        frames = nnf.pixel_shuffle(latents.float().transpose(1, 2), self.spatial_stride)
        return to_uint8(frames.transpose(1, 2) * self.std + self.mean)

    def stream(self) -> DecoderStream:
        """Every frame stands alone here, so the codec is its own stream."""
        return self

    def fork(self) -> DecoderStream:
        """The codec itself, which keeps nothing of what it decoded."""
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json; there are no weights, so `dtype` has no effect."""
        config = {"spatial_stride": self.spatial_stride, "mean": self.mean, "std": self.std}
        write_config(Path(folder), "PixelCodec", config)


def write_config(folder: Path, class_name: str, config: Mapping[str, Any]) -> None:
    """Write folder/config.json atomically, `class_name` under "_class_name"."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, {"_class_name": class_name, **config})


def write_weights(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Write a codec's state atomically: parameters in `dtype`, buffers (statistics) as they are."""
    state = module.state_dict()
    state |= {name: value.to(dtype) for name, value in module.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state)


def load_codec(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Codec:
    """Load the codec in `folder`, of the class that its config.json names under "_class_name".

    dtype: of the network's arithmetic; latents and video stay float32 and uint8.

    UserError for a missing or damaged file, an unknown class or field, or keys that do not fit.
    """
    path = Path(folder)
    config = read_json(path / CONFIG_FILE)
    name = config.get("_class_name")
    if name == "AutoencoderKLWan":
        from aad1.models.wan_codec import load_wan_vae

        return load_wan_vae(path, dtype, device)
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        if name == "PixelCodec":
            return PixelCodec(**fields)
        if name == "CausalCodec":
            from aad1.models.causal_codec import CausalCodec, CausalCodecConfig

            weights = path / WEIGHTS_FILE
            network = CausalCodec(CausalCodecConfig(**cast(Any, fields)))
            load_strict(network, read_tensors(weights), str(weights))
            return network.to(device, dtype).eval()
    except TypeError as error:
        raise UserError(f"{path / CONFIG_FILE}: {error}") from error
    raise UserError(
        f"{path / CONFIG_FILE}: unknown codec class {name!r}; known: {', '.join(CLASS_NAMES)}"
    )
