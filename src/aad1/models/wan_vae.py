"""Wan 2.1's video autoencoder for streaming: how its networks are laid out, compiled and run.

The weights and their names are those of diffusers' `AutoencoderKLWan` (`WanCodec` wraps that one;
this module does not need it). The networks are in `wan_vae_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aad1.errors import UserError
from aad1.models.codec import DecoderStream, check_latents, check_video, to_pixels, to_uint8
from aad1.models.wan_vae_layers import (
    Causal,
    Decoder,
    ImageEncoder,
    Memory,
    Pointwise,
    Upsample,
    WanVaeConfig,
)

AREA_PER_PASS = 4 * 60 * 104
"""Latent positions decoded at once at most (one frame at least), which bounds the memory."""
ROOMY = 40 * 2**30
"""Bytes of GPU memory from which several frames are decoded at once; with the padding that takes
8 GiB more at 832x480."""


class FastWanVae(nn.Module):
    """Streaming decode and image encode with Wan's weights.

    latents_mean, latents_std [C]: of the raw latents; 0 and 1 if left out.
    """

    latents_mean: Tensor
    latents_std: Tensor
    temporal_stride = 4
    spatial_stride = 8

    def __init__(
        self,
        config: WanVaeConfig | None = None,
        latents_mean: Tensor | None = None,
        latents_std: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or WanVaeConfig()
        z = self.latent_channels = config.z_dim
        self.encoder = ImageEncoder(config)
        self.quant_conv = Pointwise(2 * z, 2 * z)
        self.post_quant_conv = Pointwise(z, z)
        self.decoder = Decoder(config)
        for name, value in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            plain = torch.full((z,), float(name == "latents_std"))
            value = plain if value is None else value.detach().float().flatten()
            self.register_buffer(name, value.view(1, -1, 1, 1, 1), persistent=False)
        self._decode: Any = self._later
        self.frames_per_pass = 1

    @classmethod
    def of(
        cls, codec: Any, *, channels_last: bool = True, compiled: bool = False,
        kernels: bool = False,
    ) -> FastWanVae:  # fmt: skip
        """From a `WanCodec`, in its precision and on its device; UserError for a Wan 2.2 VAE.

        The weights are shared; channels_last lays them out anew, which the codec does not notice.
        """
        config = WanVaeConfig.of(codec.vae.config)
        with torch.device("meta"):
            vae = cls(config)
        vae.load_state_dict(codec.vae.state_dict(), assign=True)
        for name in ("latents_mean", "latents_std"):
            vae._buffers[name] = getattr(codec, name)
        return vae.eval().requires_grad_(False).prepare(channels_last, compiled, kernels)

    def prepare(
        self, channels_last: bool = True, compiled: bool = False, kernels: bool = False
    ) -> FastWanVae:
        """Choose how it computes: the layout, the compiler, our Triton kernel. Enlarged pictures go
        by phases.

        On CUDA odd channel counts are padded, and where memory is plenty several latent frames are
        decoded in a pass.
        """
        if self.latents_mean.is_cuda:
            self.frames_per_pass = 4 if _memory(self.latents_mean.device) >= ROOMY else 1
            for module in self.decoder.modules():
                # On Hopper cuDNN has no good kernel for 96 channels: with 128 it takes 0.7 of the
                # time at 832x480, although that is a third more to compute.
                if isinstance(module, Causal) and channels_last and _odd(module.weight.shape):
                    module.pad_channels(128)
        for module in self.decoder.modules():
            if isinstance(module, Upsample):
                module.split_phases()
        self.decoder.use_kernels(kernels)
        if channels_last:
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Conv3d):
                    flat = isinstance(module, nn.Conv2d)
                    layout = torch.channels_last if flat else torch.channels_last_3d
                    module.weight.data = module.weight.data.contiguous(memory_format=layout)
        if compiled:
            self._decode = torch.compile(self._later, fullgraph=True, dynamic=False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @torch.no_grad()
    def encode_image(self, video: Tensor) -> Tensor:
        """uint8 [B, 1, H, W, 3] -> float32 [B, C, 1, h, w]: the mode of the posterior."""
        check_video(video, self.temporal_stride, self.spatial_stride)
        if video.shape[1] != 1:
            raise UserError(f"only single images are encoded here, got {video.shape[1]} frames")
        pixels = to_pixels(video.to(self.latents_mean.device)).to(self.dtype)
        mode = self.quant_conv(self.encoder(pixels)).chunk(2, 1)[0].float()
        return (mode - self.latents_mean) / self.latents_std

    def stream(self) -> DecoderStream:
        """A new decoder stream, at the start of a video."""
        return FastWanStream(self)

    def _raw(self, latents: Tensor) -> Tensor:
        raw = latents.to(self.latents_mean.device).float() * self.latents_std + self.latents_mean
        return self.post_quant_conv(raw.to(self.dtype))

    def first(self, latents: Tensor) -> tuple[Tensor, Memory]:
        """The first latent frame -> pixels [B, 3, 1, H, W] in about [-1, 1], and the memory."""
        memory = Memory()
        return self.decoder.first(self._raw(latents), memory), memory

    def _later(self, latents: Tensor, memory: Sequence[Tensor]) -> Tensor:
        return self.decoder(self._raw(latents), memory)

    def later(self, latents: Tensor, memory: Memory) -> Tensor:
        """Further latent frames [B, C, f, h, w] -> pixels [B, 3, 4 f, H, W]."""
        return self._decode(latents, memory.tensors)


def _memory(device: torch.device) -> float:
    """Bytes of the GPU that this process may take."""
    share = torch.cuda.get_per_process_memory_fraction(device)
    return share * torch.cuda.get_device_properties(device).total_memory


def _odd(shape: Sequence[int]) -> bool:
    d_out, d_in = shape[:2]
    return min(d_out, d_in) >= 64 and d_in % 64 > 0


class FastWanStream:
    """Decoder stream of a FastWanVae."""

    def __init__(self, vae: FastWanVae) -> None:
        self._vae = vae
        self._memory: Memory | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, C, f, h, w] -> uint8 [B, t, H, W, 3] on the device; no wait for it."""
        check_latents(latents, self._vae.latent_channels)
        frames = []
        if self._memory is None:
            pixels, self._memory = self._vae.first(latents[:, :, :1])
            frames.append(to_uint8(pixels))
            latents = latents[:, :, 1:]
        if latents.shape[2]:
            area = latents.shape[3] * latents.shape[4]
            fit = min(self._vae.frames_per_pass, AREA_PER_PASS // area)
            for part in latents.split(max(1, fit), 2):
                frames.append(to_uint8(self._vae.later(part, self._memory)))
        return frames[0] if len(frames) == 1 else torch.cat(frames, 1)

    def fork(self) -> FastWanStream:
        """A stream that goes on from here, with a copy of the memory, which is written in place."""
        twin = FastWanStream(self._vae)
        if self._memory is not None:
            twin._memory = self._memory.copy()
        return twin
