"""The training objective of a codec, and how its reconstructions are judged.

With x the video, z = E(x) its latents, s the noise level and n white noise,

    L = l1 |x' - x| + l2 (x' - x)^2 + laplacian sum_l |P_l x' - P_l x|
        + texture |e(x') - e(x)| + subbands |b(x') - b(x)| + pattern p(x' - x)
        + temporal |D x' - D x|
        + moments KL(z) + tails T(z),
    x' = G(z + s std(z) n),    s ~ U[0, noise] per clip and latent frame,

where P_l is level l of a Laplacian pyramid, e the local mean log |Laplacian| of the luma (it does
not know where exactly an edge lies, so it rewards texture where |x' - x| would rather blur; the
mean of the logarithm, since a few strong edges have the energy of a whole texture), b the local
log amplitudes by direction and scale (subbands.py), which a checkerboard cannot serve as it does e,
p the part of the error that repeats on the decoder's own grid (subbands.py), in which it would
otherwise pay for b, D the difference of neighbouring frames, KL(z) the divergence of
N(mean, variance) of each latent channel from N(0, 1), and T(z) the mean excess of |z| over 4
standard deviations (a diffusion model learns rare large values badly). The noise makes the decoder
forgive small errors of a generator; it is relative to the spread of the latents, so the encoder
cannot escape it by scaling them up.

A patch critic may be added for the last part of the training (hinge loss).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from aad1.errors import UserError
from aad1.models.codec import to_pixels
from aad1.stages.subbands import LUMA, fixed_pattern, luma, subband_error

Logs = dict[str, Tensor]

# One grey level, in pixels of [-1, 1]: texture fainter than that is not asked for.
_TEXTURE_FLOOR = 1 / 127.5


class CodecNetwork(Protocol):
    """What the stage trains: a differentiable autoencoder (CausalCodec)."""

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, T, H, W] in [-1, 1] -> latents [B, C, F, h, w], log-variance or None."""
        ...

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> [B, 3, T, H, W]."""
        ...


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """Weights of the terms of the module's equation, and the noise on the latents.

    noise: largest noise level s, in standard deviations of the latents.
    texture: at 0.3, a decoder meets this term in part with a faint checkerboard of single pixels,
        which raises `sharpness_ratio` more than what one sees; look at the pictures.
    subbands: the same by direction and scale, so that no one kind of texture pays for another.
    pattern: against a pattern of fixed phase, which has the amplitudes that `subbands` asks for.
    pyramid_levels: levels of the Laplacian pyramid (each halves the size).
    """

    l1: float = 1.0
    l2: float = 1.0
    laplacian: float = 1.0
    texture: float = 0.03
    subbands: float = 0.0
    pattern: float = 0.0
    temporal: float = 0.5
    moments: float = 1e-3
    tails: float = 0.1
    noise: float = 0.15
    pyramid_levels: int = 3

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} {value} must be finite and >= 0")
        if self.pyramid_levels < 1:
            raise UserError(f"pyramid_levels {self.pyramid_levels} must be >= 1")


def codec_loss(
    reconstruction: Tensor, pixels: Tensor, latents: Tensor, config: CodecLossConfig
) -> tuple[Tensor, Logs]:
    """The module's equation; pixels float [B, 3, T, H, W] in [-1, 1], latents [B, C, F, h, w].

    Returns the loss and its unweighted terms, detached. Always in float32, under autocast too:
    bfloat16 rounds pixels to a quarter of a grey level, as much as fine texture has.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        return _codec_loss(reconstruction.float(), pixels.float(), latents.float(), config)


def _codec_loss(
    x: Tensor, y: Tensor, latents: Tensor, config: CodecLossConfig
) -> tuple[Tensor, Logs]:
    error = x - y
    terms = {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "laplacian": _pyramid_error(error, config.pyramid_levels),
        "texture": (_texture(x) - _texture(y)).abs().mean(),
        "moments": _moment_divergence(latents),
        "tails": _excess(latents),
    }
    if config.subbands > 0:
        terms["subbands"] = subband_error(_rounded(x), y)
    if config.pattern > 0:
        terms["pattern"] = fixed_pattern(error).mean()
    if y.shape[2] > 1:
        terms["temporal"] = error.diff(dim=2).abs().mean()
    loss = torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()
    return loss, {name: term.detach() for name, term in terms.items()}


def _rounded(pixels: Tensor) -> Tensor:
    """Pixels as 8 bits hold them, with the gradient of the identity.

    The source's faintest texture is in part its rounding, which decoded frames get as well.
    """
    return pixels + (((pixels + 1) * 127.5).round() / 127.5 - 1 - pixels).detach()


def _images(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B * T, 3, H, W]."""
    return video.transpose(1, 2).flatten(0, 1)


def _pyramid_error(error: Tensor, levels: int) -> Tensor:
    """Mean absolute Laplacian pyramid of x' - x (the pyramid is linear), summed over levels."""
    image = _images(error)
    total = image.new_zeros(())
    for _ in range(levels):
        low = nnf.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False)
        up = nnf.interpolate(low, size=image.shape[-2:], mode="nearest")
        total = total + (image - up).abs().mean()
        image = low
    return total


def _laplacian(image: Tensor) -> Tensor:
    """Four-neighbour Laplacian of [N, C, H, W], without the border: [N, C, H - 2, W - 2]."""
    centre = image[..., 1:-1, 1:-1]
    sides = image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return 4 * centre - sides - image[..., :-2, 1:-1] - image[..., 2:, 1:-1]


def _texture(video: Tensor) -> Tensor:
    """Mean log |Laplacian of the luma| in windows of 8 x 8 pixels, stride 4."""
    return nnf.avg_pool2d((_laplacian(luma(video)).abs() + _TEXTURE_FLOOR).log(), 8, stride=4)


def _moment_divergence(latents: Tensor) -> Tensor:
    """KL(N(mean, variance) | N(0, 1)) of each channel over the batch, averaged over channels."""
    values = latents.transpose(0, 1).flatten(1)
    mean, variance = values.mean(1), values.var(1, correction=0) + 1e-6
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()


def _excess(latents: Tensor) -> Tensor:
    """Mean of max(|z - mean| / std - 4, 0), with each channel's own mean and std held fixed."""
    values = latents.transpose(0, 1).flatten(1)
    still = values.detach()
    mean, std = still.mean(1, keepdim=True), still.std(1, correction=0, keepdim=True) + 1e-6
    return nnf.relu(((values - mean) / std).abs() - 4).mean()


class PatchDiscriminator(nn.Module):
    """Logit per patch of two neighbouring frames (so that it sees flicker too).

    Spectrally normalised; a logit sees 22 x 22 pixels.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(6, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 4 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(4 * width, 1, 1)),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W], T >= 2 -> logits [B * (T - 1), 1, H/4, W/4]."""
        frames = pixels.transpose(1, 2)
        pairs = torch.cat([frames[:, :-1], frames[:, 1:]], dim=2)
        return self.layers(pairs.flatten(0, 1))  # type: ignore[no-any-return]


class CodecStage:
    """Losses of one step on a batch of clips, uint8 [B, T, H, W, 3]. The loop owns the optimiser.

    generator: of the noise on the latents; None draws from torch's global one.
    """

    def __init__(
        self,
        codec: CodecNetwork,
        config: CodecLossConfig | None = None,
        critic: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.codec = codec
        self.config = config or CodecLossConfig()
        self.critic = critic
        self.generator = generator

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels -> (pixels decoded from noisy latents, clean latents)."""
        latents, _ = self.codec.encode_pixels(pixels)
        return self.codec.decode_pixels(self._add_noise(latents)), latents

    def generator_loss(
        self, batch: Tensor, adversarial: Tensor | None = None
    ) -> tuple[Tensor, Logs]:
        """Loss of encoder and decoder; `adversarial` (a scalar) weighs the critic's part."""
        pixels = to_pixels(batch)
        reconstruction, latents = self.reconstruct(pixels)
        loss, logs = codec_loss(reconstruction, pixels, latents, self.config)
        if adversarial is not None:
            term = -self._critic()(reconstruction).float().mean()
            loss = loss + adversarial * term
            logs["adversarial"] = term.detach()
        logs["loss"] = loss.detach()
        return loss, logs

    def critic_loss(self, batch: Tensor) -> tuple[Tensor, Logs]:
        """Hinge loss of the critic: mean relu(1 - D(x)) + mean relu(1 + D(x'))."""
        critic = self._critic()
        pixels = to_pixels(batch)
        with torch.no_grad():
            reconstruction, _ = self.reconstruct(pixels)
        real, fake = critic(pixels).float(), critic(reconstruction).float()
        loss = nnf.relu(1 - real).mean() + nnf.relu(1 + fake).mean()
        logs = {"critic_loss": loss, "logit_real": real.mean(), "logit_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}

    def _add_noise(self, latents: Tensor) -> Tensor:
        spread = latents.detach().std(dim=(0, 2, 3, 4), correction=0, keepdim=True)
        shape = (latents.shape[0], 1, latents.shape[2], 1, 1)
        device = latents.device
        level = torch.rand(shape, generator=self.generator, device=device) * self.config.noise
        noise = torch.randn(latents.shape, generator=self.generator, device=device)
        return latents + level * spread * noise

    def _critic(self) -> nn.Module:
        if self.critic is None:
            raise ValueError("an adversarial loss needs a critic")
        return self.critic


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 videos of one shape, from the error pooled over
    all frames and clips; inf when equal."""
    _check_pair(video, reference)
    difference = video.to(torch.int16) - reference.to(torch.int16)
    error = float(difference.double().square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sharpness_ratio(video: Tensor, reference: Tensor) -> float:
    """How sharp a video is beside its reference; 1 = as sharp, below 1 = blurred.

    exp(mean log(|L v| + 1) - mean log(|L r| + 1)), where L is the four-neighbour Laplacian of the
    luma (ITU-R BT.601) in grey levels of 0..255 without the outermost pixels, and the means run
    over all pixels, frames and clips. The 1 (one grey level) keeps flat areas finite.

    video, reference: uint8 [..., H, W, 3] of one shape, at least 3 x 3 pixels.
    """
    _check_pair(video, reference)
    return math.exp(_mean_log_laplacian(video) - _mean_log_laplacian(reference))


def _mean_log_laplacian(video: Tensor) -> float:
    images = (video.float() @ torch.tensor(LUMA, device=video.device)).flatten(0, -3)[:, None]
    return float(_laplacian(images).abs().log1p().double().mean())


def _check_pair(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape or {video.dtype, reference.dtype} != {torch.uint8}:
        raise ValueError(
            f"two uint8 videos of one shape are needed, got {video.dtype} {list(video.shape)} "
            f"and {reference.dtype} {list(reference.shape)}"
        )
