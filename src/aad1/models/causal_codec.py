"""A light causal video autoencoder: strides 4x8x8, small enough to decode live on two CPU cores.

Wan's autoencoder spends most of its decoder at full resolution, with 3-D convolutions. This one
works at 1/8 to 1/2 of the resolution and with 2-D convolutions only. Time enters in two ways:

* four video frames are one latent frame: the encoder folds them into channels, the decoder unfolds
  them. The first frame is repeated four times to fill a group of its own, and of the group decoded
  from latent frame 0 only the last frame is kept. So an image is a video of one frame.
* in every residual block a quarter of the channels is taken from the frame before (a causal
  temporal shift: it costs no arithmetic), at the rate of latent frames or of video frames.

A linear path (a patch of 4 x 8 x 8 pixels <-> C numbers) runs beside the network in both halves.
`fit_linear` sets it to the principal components of a world's patches, and the network starts as a
correction of zero: without this, the first thousand updates go into finding what a picture's
brightness is.

Normalisation is per pixel, over channels: statistics over time would break causality, and those
over space would make a frame depend on its size.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from aad1.errors import UserError
from aad1.models.codec import (
    WEIGHTS_FILE,
    DecoderStream,
    check_latents,
    check_video,
    latent_frames,
    to_pixels,
    to_uint8,
    write_config,
    write_weights,
)

GROUP = 4  # video frames per latent frame
STRIDE = 8  # pixels per latent position, in height and in width
PATCH = 3 * GROUP * STRIDE**2  # values of the pixels that one latent position stands for
# Frames that one pass of encode() or decode() may hold: bounds its memory, whatever the batch.
FRAMES_PER_PASS = 512

# The last frame's shifted channels, one tensor per temporal block; None before the first frame.
State: TypeAlias = "list[Tensor | None]"


@dataclass(frozen=True, kw_only=True)
class CausalCodecConfig:
    """Size of a CausalCodec. Widths and depths are listed from coarse to fine.

    latent_channels: C.
    widths: channels at 1/8 resolution, at 1/4 (latent rate), at 1/4 (video rate) and at 1/2.
    decoder_depths, encoder_depths: residual blocks at each of those four places.
    refine_width: channels between the two convolutions at full resolution that correct the decoded
        frames; 0 for none.
    """

    latent_channels: int = 16
    widths: tuple[int, int, int, int] = (160, 128, 96, 48)
    decoder_depths: tuple[int, int, int, int] = (2, 1, 2, 1)
    encoder_depths: tuple[int, int, int, int] = (1, 1, 1, 1)
    refine_width: int = 0

    def __post_init__(self) -> None:
        for name in ("widths", "decoder_depths", "encoder_depths"):
            value = tuple(getattr(self, name))  # JSON gives lists
            object.__setattr__(self, name, value)
            if len(value) != 4 or not all(isinstance(item, int) for item in value):
                raise UserError(f"{name} must be four integers, got {list(value)}")
        if self.latent_channels < 1:
            raise UserError(f"latent_channels {self.latent_channels} must be >= 1")
        if any(width < 4 or width % 4 for width in self.widths):
            raise UserError(f"widths {list(self.widths)} must be positive multiples of 4")
        if any(depth < 0 for depth in self.decoder_depths + self.encoder_depths):
            raise UserError("depths must be >= 0")
        if self.refine_width < 0:
            raise UserError(f"refine_width {self.refine_width} must be >= 0")


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel, x [N, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)
        normed = nnf.layer_norm(last, (last.shape[-1],), self.weight, self.bias)
        return normed.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """norm, shift, 3x3 conv, SiLU, 3x3 conv, added to the input; x [B * n, C, h, w] of n frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shifted = channels // 4
        self.norm = PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, frames: int, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """past: shifted channels [B, C/4, h, w] of the frame before, None for zeros.

        Returns the output and the last frame's shifted channels.
        """
        normed = self.norm(x)
        mixed, past = shift(normed, frames, self.shifted, past)
        return x + self.conv2(nnf.silu(self.conv1(mixed))), past


def shift(x: Tensor, frames: int, channels: int, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take the first `channels` channels of each frame from the frame before it.

    x: [B * frames, C, h, w]. past: [B, channels, h, w], the frame before the first; None for zeros.
    Returns the mixed x and the last frame's first channels, the next call's past.
    """
    size = x.shape[-2:]
    moving = x[:, :channels].unflatten(0, (-1, frames))  # [B, n, c, h, w]
    if past is None:
        past = torch.zeros_like(moving[:, 0])
    before = torch.cat([past[:, None].to(moving.dtype), moving[:, :-1]], dim=1)
    mixed = torch.cat([before.reshape(-1, channels, *size), x[:, channels:]], dim=1)
    return mixed.contiguous(memory_format=torch.channels_last), moving[:, -1]


def fold_time(x: Tensor) -> Tensor:
    """[N * 4, C, h, w] -> [N, 4 C, h, w]: the frames of a group become channels."""
    last = x.permute(0, 2, 3, 1).unflatten(0, (-1, GROUP))  # [N, 4, h, w, C]
    return last.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)


def unfold_time(x: Tensor) -> Tensor:
    """[N, 4 C, h, w] -> [N * 4, C, h, w], the inverse of fold_time."""
    last = x.permute(0, 2, 3, 1).unflatten(3, (GROUP, -1))  # [N, h, w, 4, C]
    return last.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


class Blocks(nn.ModuleList):
    """Residual blocks at one resolution and one frame rate."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__(ResidualBlock(channels) for _ in range(depth))

    def forward(self, x: Tensor, frames: int, past: State) -> tuple[Tensor, State]:
        state: State = []
        for block, block_past in zip(self, past, strict=True):
            x, now = block(x, frames, block_past)
            state.append(now)
        return x, state


class Refine(nn.Module):
    """A correction of frames [N, 3, H, W] at full resolution, zero at first.

    What comes out of a pixel shuffle has weights of its own for each of the 2 x 2 pixels, and so a
    pattern of period 2 costs it nothing. These convolutions treat all pixels alike.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        return frames + self.conv2(nnf.silu(self.conv1(frames)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Pixels of whole groups [B * 4F, 3, H, W] -> raw latents [B * F, C, h, w]."""

    def __init__(self, config: CausalCodecConfig) -> None:
        super().__init__()
        coarse, quarter, video, fine = config.widths
        depths = config.encoder_depths
        self.linear = nn.Conv2d(PATCH, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(3 * 4, fine, 3, padding=1)
        self.fine = Blocks(fine, depths[3])
        self.down_fine = nn.Conv2d(fine, video, 2, stride=2)
        self.video = Blocks(video, depths[2])
        self.fold = nn.Conv2d(GROUP * video, quarter, 1)
        self.quarter = Blocks(quarter, depths[1])
        self.down_quarter = nn.Conv2d(quarter, coarse, 2, stride=2)
        self.coarse = Blocks(coarse, depths[0])
        self.norm_out = PixelNorm(coarse)
        self.conv_out = nn.Conv2d(coarse, config.latent_channels, 3, padding=1)

    def forward(self, frames: Tensor, latents: int) -> Tensor:
        linear = self.linear(fold_time(nnf.pixel_unshuffle(frames, STRIDE)))
        x = nnf.pixel_unshuffle(frames, 2).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        x, _ = self.fine(x, GROUP * latents, [None] * len(self.fine))
        x = self.down_fine(x)
        x, _ = self.video(x, GROUP * latents, [None] * len(self.video))
        x = self.fold(fold_time(x))
        x, _ = self.quarter(x, latents, [None] * len(self.quarter))
        x = self.down_quarter(x)
        x, _ = self.coarse(x, latents, [None] * len(self.coarse))
        return linear + self.conv_out(nnf.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Raw latents [B * F, C, h, w] -> pixels of whole groups [B * 4F, 3, H, W]."""

    def __init__(self, config: CausalCodecConfig) -> None:
        super().__init__()
        coarse, quarter, video, fine = config.widths
        self.depths = config.decoder_depths
        self.linear = nn.Conv2d(config.latent_channels, PATCH, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, coarse, 3, padding=1)
        self.coarse = Blocks(coarse, self.depths[0])
        self.up_coarse = nn.Conv2d(coarse, 4 * quarter, 1)
        self.quarter = Blocks(quarter, self.depths[1])
        self.unfold = nn.Conv2d(quarter, GROUP * video, 1)
        self.video = Blocks(video, self.depths[2])
        self.up_quarter = nn.Conv2d(video, 4 * fine, 1)
        self.fine = Blocks(fine, self.depths[3])
        self.norm_out = PixelNorm(fine)
        self.conv_out = nn.Conv2d(fine, 3 * 4, 3, padding=1)
        self.refine = Refine(config.refine_width) if config.refine_width else nn.Identity()

    def start(self) -> State:
        """The state before the first latent frame."""
        return [None] * sum(self.depths)

    def forward(self, latents: Tensor, frames: int, state: State) -> tuple[Tensor, State]:
        a, b, c = itertools.accumulate(self.depths[:3])
        linear = nnf.pixel_shuffle(unfold_time(self.linear(latents)), STRIDE)
        x = self.conv_in(latents)
        x, coarse = self.coarse(x, frames, state[:a])
        x = nnf.pixel_shuffle(self.up_coarse(x), 2)
        x, quarter = self.quarter(x, frames, state[a:b])
        x = unfold_time(self.unfold(x))
        x, video = self.video(x, GROUP * frames, state[b:c])
        x = nnf.pixel_shuffle(self.up_quarter(x), 2)
        x, fine = self.fine(x, GROUP * frames, state[c:])
        x = self.conv_out(nnf.silu(self.norm_out(x)))
        frames_out = self.refine(linear + nnf.pixel_shuffle(x, 2))
        return frames_out, coarse + quarter + video + fine


class CausalCodec(nn.Module):
    """The autoencoder as a Codec (see codec.py); also what codec_loss.py trains.

    The buffers latents_mean and latents_std [C] hold the statistics of the raw latents;
    encode_pixels and decode_pixels speak normalised latents. `calibrate` sets them.
    """

    temporal_stride = GROUP
    spatial_stride = STRIDE

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: CausalCodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or CausalCodecConfig()
        self.latent_channels = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.register_buffer("latents_mean", torch.zeros(self.latent_channels))
        self.register_buffer("latents_std", torch.ones(self.latent_channels))
        self._initialise()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """Keep the signal's variance through the network, and start its two outputs at zero.

        PyTorch's default keeps a third of the variance per convolution and adds biases of the same
        size: the latents would hardly reach the output.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                with torch.no_grad():
                    module.conv2.weight.mul_(0.1)
        nn.init.zeros_(self.encoder.conv_out.weight)
        nn.init.zeros_(self.decoder.conv_out.weight)
        if isinstance(self.decoder.refine, Refine):
            nn.init.zeros_(self.decoder.refine.conv2.weight)

    @torch.no_grad()
    def fit_linear(self, video: Tensor) -> None:
        """Set the linear path from a sample of a world, uint8 [B, T, H, W, 3]; before training.

        Each latent channel becomes an equal mixture (random rotation) of the C first principal
        components, scaled by the square root of their deviation: between whitening them, which
        would make noise on the latents fall on coarse and fine alike, and leaving them as they
        are, which would drown the fine ones.
        """
        check_video(video, GROUP, STRIDE)
        count = 0
        total = torch.zeros(PATCH, dtype=torch.float64, device=self.latents_mean.device)
        moment = torch.zeros_like(total.outer(total))
        for part in video.split(max(1, FRAMES_PER_PASS // video.shape[1])):
            frames = self._groups(to_pixels(part.to(self.latents_mean.device)))
            patches = fold_time(nnf.pixel_unshuffle(frames, STRIDE)).permute(0, 2, 3, 1)
            values = patches.reshape(-1, PATCH).double()
            count += len(values)
            total = total + values.sum(0)
            moment = moment + values.T @ values
        mean = total / count
        covariance = moment / count - mean.outer(mean)
        variance, vectors = torch.linalg.eigh(covariance.cpu())
        variance = variance[-self.latent_channels :].clamp_min(1e-8)
        vectors = vectors[:, -self.latent_channels :]
        random = torch.randn(self.latent_channels, self.latent_channels, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(random)
        size = variance.sqrt().sum().div(self.latent_channels).sqrt()  # mean power of the mixture
        encode = rotation @ torch.diag(variance**-0.25) @ vectors.T / size
        decode = vectors @ torch.diag(variance**0.25) @ rotation.T * size
        mean = mean.cpu()
        for conv, weight, bias in (
            (self.encoder.linear, encode, -(encode @ mean)),
            (self.decoder.linear, decode, mean),
        ):
            conv.weight.copy_(weight[:, :, None, None])
            conv.bias.copy_(bias)  # type: ignore[union-attr]

    # --- the network: float pixels, differentiable -------------------------------------------

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """float [B, 3, T, H, W] in [-1, 1] -> (latents [B, C, F, h, w], log-variance).

        The log-variance is None: this autoencoder is deterministic, and robustness to noise on the
        latents comes from its training (codec_loss.py). UserError unless T = 1 + 4 k.
        """
        batch, count = pixels.shape[0], latent_frames(pixels.shape[2], GROUP)
        raw = self.encoder(self._groups(pixels), count)
        latents = raw.float().unflatten(0, (batch, count)).transpose(1, 2)
        return (latents - self._per_channel(self.latents_mean)) / self._per_channel(
            self.latents_std
        ), None

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> float [B, 3, T, H, W], not clamped."""
        pixels, _ = self.decode_step(latents, self.decoder.start())
        return pixels[:, :, GROUP - 1 :]

    def decode_step(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """The next F latent frames after `state` (decoder.start() at first) -> 4 F frames each.

        Returns pixels [B, 3, 4 F, H, W] and the new state. Of the first group of a video only the
        last frame is real; the caller drops the three before it.
        """
        batch, channels, count, height, width = latents.shape
        raw = latents.float() * self._per_channel(self.latents_std)
        raw = (raw + self._per_channel(self.latents_mean)).transpose(1, 2)
        raw = raw.reshape(batch * count, channels, height, width).to(self._dtype)
        raw = raw.contiguous(memory_format=torch.channels_last)
        frames, state = self.decoder(raw, count, state)
        return frames.unflatten(0, (batch, GROUP * count)).transpose(1, 2), state

    @torch.no_grad()
    def calibrate(self, latents: Tensor) -> None:
        """Make latents like these (as encode returns them, [B, C, F, h, w]) have mean 0, std 1."""
        check_latents(latents, self.latent_channels)
        values = latents.double().transpose(0, 1).flatten(1)
        mean = values.mean(1).to(self.latents_mean)
        std = values.std(1, correction=0).to(self.latents_std)
        if not torch.isfinite(std).all() or float(std.min()) <= 0:
            raise UserError(f"latent channel {int(std.argmin())} is constant or not finite")
        self.latents_mean.add_(self.latents_std * mean)
        self.latents_std.mul_(std)

    # --- the Codec interface -------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, C, F, h, w]."""
        check_video(video, GROUP, STRIDE)
        clips = max(1, FRAMES_PER_PASS // video.shape[1])
        parts = video.to(self.latents_mean.device).split(clips)
        return torch.cat([self.encode_pixels(to_pixels(part, self._dtype))[0] for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """float [B, C, F, h, w] -> uint8 [B, T, H, W, 3]."""
        check_latents(latents, self.latent_channels)
        clips = max(1, FRAMES_PER_PASS // (GROUP * latents.shape[2]))
        parts = latents.to(self.latents_mean.device).split(clips)
        return torch.cat([to_uint8(self.decode_pixels(part)) for part in parts])

    def with_refinement(self, width: int) -> CausalCodec:
        """A copy that refines at full resolution and decodes as this one does until it is trained.

        UserError if this codec refines already, or `width` is below 1.
        """
        if self.config.refine_width or width < 1:
            raise UserError(
                f"refine_width {width} must be >= 1, and the codec's own "
                f"({self.config.refine_width}) 0"
            )
        wider = CausalCodec(dataclasses.replace(self.config, refine_width=width))
        wider.load_state_dict({**wider.state_dict(), **self.state_dict()})
        return wider.to(self.latents_mean.device, self._dtype)

    def stream(self) -> DecoderStream:
        """A new decoder stream; its state is four to six small feature maps."""
        return CausalStream(self)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors (parameters in `dtype`) into `folder`."""
        path = Path(folder)
        write_weights(self, path / WEIGHTS_FILE, dtype)
        write_config(path, "CausalCodec", dataclasses.asdict(self.config))

    @staticmethod
    def _groups(pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B * 4F, 3, H, W]: the first frame fills a group of its own."""
        frames = pixels.transpose(1, 2)
        first = frames[:, :1].expand(-1, GROUP - 1, -1, -1, -1)
        return torch.cat([first, frames], dim=1).flatten(0, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.float().view(1, -1, 1, 1, 1)


class CausalStream:
    """Decoder stream of a CausalCodec."""

    def __init__(self, codec: CausalCodec) -> None:
        self._codec = codec
        self._state = codec.decoder.start()
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, C, f, h, w] -> uint8 [B, t, H, W, 3]; see DecoderStream."""
        codec = self._codec
        check_latents(latents, codec.latent_channels)
        pixels, self._state = codec.decode_step(latents.to(codec.latents_mean.device), self._state)
        if not self._started:
            self._started = True
            pixels = pixels[:, :, GROUP - 1 :]
        return to_uint8(pixels)

    def fork(self) -> CausalStream:
        """A stream that goes on from here; states are replaced, never written to."""
        return copy.copy(self)
