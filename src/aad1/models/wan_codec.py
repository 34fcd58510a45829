"""Wan's video autoencoder (diffusers' `AutoencoderKLWan`) behind the Codec interface.

diffusers is imported when a WanCodec is made, not before. Its decoder works latent frame by latent
frame already, over a cache of past features that it keeps in private attributes; `WanStream` holds
one such cache per stream and runs the same loop. That reaches into private state, so the stream
accepts only the releases that its test has seen.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aad1.errors import UserError
from aad1.models.checkpoints import find_part
from aad1.models.codec import (
    DecoderStream,
    check_latents,
    check_video,
    to_pixels,
    to_uint8,
    write_config,
    write_weights,
)
from aad1.models.tensor_files import Source
from aad1.models.wan_shapes import vae_json
from aad1.models.weights import check_fit, load_module

TESTED_DIFFUSERS = "0.42."
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def autoencoder_class() -> Any:
    """diffusers' AutoencoderKLWan; UserError if it is not installed."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise UserError(
            f"the Wan codec needs diffusers ({error}); install it with: pip install 'aad1[wan]'"
        ) from error
    return AutoencoderKLWan


class WanCodec(nn.Module):
    """AutoencoderKLWan with normalised latents: (mode - latents_mean) / latents_std.

    vae: an AutoencoderKLWan. Its config gives strides and channels (Wan 2.1: 4x8x8, 16) and the
        published mean and standard deviation per channel.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        config = vae.config
        self.latent_channels = int(config.z_dim)
        self.temporal_stride = int(config.scale_factor_temporal)
        self.spatial_stride = int(config.scale_factor_spatial)
        for name in ("latents_mean", "latents_std"):
            values = getattr(config, name)
            if len(values) != self.latent_channels:
                raise UserError(
                    f"{name} has {len(values)} values for {self.latent_channels} channels"
                )
            buffer = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> WanCodec:
        """As of any module, but the statistics keep float32 whatever the network computes in."""
        kept = {name: getattr(self, name) for name in ("latents_mean", "latents_std")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            self._buffers[name] = value.to(getattr(self, name).device)
        return self

    @classmethod
    def from_config(cls, **config: Any) -> WanCodec:
        """A codec with random weights; fields as of AutoencoderKLWan (base_dim, ...)."""
        return cls(autoencoder_class().from_config(config).eval())

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, C, F, h, w]: the mode of the posterior."""
        check_video(video, self.temporal_stride, self.spatial_stride)
        pixels = to_pixels(video.to(self.vae.device)).to(self.vae.dtype)
        mode = self.vae.encode(pixels).latent_dist.mode().float()
        return (mode - self.latents_mean) / self.latents_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """float [B, C, F, h, w] -> uint8 [B, T, H, W, 3]."""
        check_latents(latents, self.latent_channels)
        return to_uint8(self.vae.decode(self._raw(latents)).sample)

    def stream(self) -> DecoderStream:
        """A new decoder stream. UserError with a release of diffusers that was not tested."""
        import diffusers

        if not diffusers.__version__.startswith(TESTED_DIFFUSERS):
            raise UserError(
                f"streaming decode of the Wan codec is tested with diffusers {TESTED_DIFFUSERS}x, "
                f"found {diffusers.__version__}"
            )
        return WanStream(self)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that diffusers' AutoencoderKLWan.from_pretrained reads too."""
        config = json.loads(self.vae.to_json_string())
        config.pop("_name_or_path", None)  # where it was loaded from does not belong in a file
        config.pop("_class_name", None)
        write_weights(self.vae, Path(folder) / WEIGHTS_NAME, dtype)
        write_config(Path(folder), "AutoencoderKLWan", config)

    def _raw(self, latents: Tensor) -> Tensor:
        raw = latents.to(self.vae.device).float() * self.latents_std
        return (raw + self.latents_mean).to(self.vae.dtype)


class WanStream:
    """Decoder stream of a WanCodec: the loop of AutoencoderKLWan.decode with a cache of its own."""

    def __init__(self, codec: WanCodec) -> None:
        self._codec = codec
        self._cache: list[Any] = [None] * codec.vae._cached_conv_counts["decoder"]
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, C, f, h, w] -> uint8 [B, t, H, W, 3]; see DecoderStream."""
        check_latents(latents, self._codec.latent_channels)
        vae = self._codec.vae
        hidden = vae.post_quant_conv(self._codec._raw(latents))
        frames = []
        for index in range(latents.shape[2]):
            # The cache list is filled in place; a second list counts the convolutions.
            frame = hidden[:, :, index : index + 1]
            options = {"first_chunk": not self._started}
            frames.append(vae.decoder(frame, feat_cache=self._cache, feat_idx=[0], **options))
            self._started = True
        pixels = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return to_uint8(pixels)

    def fork(self) -> WanStream:
        """A stream that goes on from here: items of the list are replaced, never written to."""
        twin = copy.copy(self)
        twin._cache = list(self._cache)
        return twin


def load_wan_vae(
    source: Source | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> WanCodec:
    """Wan's video autoencoder; float32 by default. Needs diffusers."""
    source = find_part(source, "vae")
    vae = _empty_vae(source)
    nn.Module.to(vae, dtype or torch.float32)  # diffusers' own warns of a cast that is meant
    load_module(vae, source, device)
    return WanCodec(vae.eval()).to(device).eval()


def _empty_vae(source: Source) -> nn.Module:
    with torch.device("meta"):
        return autoencoder_class().from_config(vae_json(source))  # type: ignore[no-any-return]


def check_vae(source: Source) -> None:
    """UserError if tensors of the VAE are missing, unexpected or of other shapes. Needs
    diffusers."""
    check_fit(_empty_vae(source), source)
