"""A tiny decoder of Wan 2.1's latents, in TAEHV's layout, for streams of fixed memory.

TAEHV (github.com/madebyollin/taehv, "taew2_1") approximates Wan's decoder with 2-D convolutions
at a small part of its cost; pictures are softer. It comes with no package of ours: users bring the
file, .pth or .safetensors. It takes latents as diffusion models make them, normalised, so no
statistics are applied here.

Time enters in two ways. Each `Memory` block sees, beside its input at a frame, its input at the
frame before (zeros at the start). `grow` layers make two frames of one. So every latent frame gives
four video frames and needs nine small feature maps of the one before it; of a video's first latent
frame only the last of the four is shown, as an image is a video of one frame.

Shape letters: B batch, T frames, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from aad1.errors import UserError
from aad1.models.codec import DecoderStream, check_latents, to_uint8
from aad1.models.tensor_files import Spec, open_tensors
from aad1.models.weights import load_strict

WIDTHS = (256, 128, 64, 64)
"""Channels of the three stages and of the last layer."""
LATENT_CHANNELS = 16
STAGES = (3, 9, 15)
"""Number of each stage's first layer in the file: three memory blocks, enlarging, `grow`, conv."""
TIMES = (1, 2, 2)
"""Frames that the `grow` layer of a stage makes of one."""
PREFIX = "decoder."


class Memory(nn.Module):
    """relu(conv(relu(conv(relu(conv([x, x of the frame before]))))) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x [B, T, C, h, w] after `past` [B, C, h, w], which becomes x's last frame."""
        before = torch.cat([past[:, None], x[:, :-1]], 1)
        past.copy_(x[:, -1])
        flat = x.flatten(0, 1)
        out = self.conv(torch.cat([flat, before.flatten(0, 1)], 1))
        return nnf.relu(out + flat).unflatten(0, x.shape[:2])


class Grow(nn.Module):
    """`times` frames of each: the output channels of one matrix per position, frame by frame."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, times * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, h, w] -> [B, times T, C, h, w]."""
        out = self.conv(x.flatten(0, 1)).unflatten(1, (self.times, -1))
        return out.flatten(0, 1).unflatten(0, (len(x), -1))


class TinyDecoder(nn.Module):
    """The decoder; parameters have the names of the published files."""

    temporal_stride = 4
    spatial_stride = 8

    def __init__(
        self, widths: Sequence[int] = WIDTHS, latent_channels: int = LATENT_CHANNELS
    ) -> None:
        super().__init__()
        self.widths, self.latent_channels = tuple(widths), latent_channels
        layers: dict[str, nn.Module] = {
            "1": nn.Conv2d(latent_channels, widths[0], 3, padding=1),
            "22": nn.Conv2d(widths[3], 3, 3, padding=1),
        }
        for stage, at in enumerate(STAGES):
            here, after = widths[stage : stage + 2]
            layers |= {str(at + i): Memory(here) for i in range(3)}
            layers[str(at + 4)] = Grow(here, TIMES[stage])
            layers[str(at + 5)] = nn.Conv2d(here, after, 3, padding=1, bias=False)
        # By number, so that the names are the file's; layers without weights are not there.
        self.decoder = nn.ModuleDict(layers)
        self._step: Any = self.frames

    def prepare(self, compiled: bool = False) -> TinyDecoder:
        """Lay the weights out channels last; compile the step that all frames share, or not."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._step = torch.compile(self.frames, fullgraph=True) if compiled else self.frames
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self._conv(1).weight.dtype

    def _conv(self, number: int) -> nn.Conv2d:
        layer = self.decoder[str(number)]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def memory(self, latents: Tensor) -> list[Tensor]:
        """What precedes a video of latents [B, C, F, h, w]: zeros, one tensor per memory block."""
        batch, _, _, height, width = latents.shape
        past = []
        with torch.inference_mode(False):  # overwritten later, in whatever mode
            for stage, channels in enumerate(self.widths[:3]):
                size = (batch, channels, height << stage, width << stage)
                weight = self._conv(1).weight
                past += [weight.new_zeros(size).contiguous(memory_format=torch.channels_last)
                         for _ in range(3)]  # fmt: skip
        return past

    def frames(self, latents: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """The next latents [B, C, F, h, w] -> pixels [B, 4 F, 3, H, W] in [0, 1].

        Updates `memory`. Of a video's first latent frame the caller drops the first three.
        """
        past = iter(memory)
        x = latents.to(self._conv(1).weight).transpose(1, 2)
        batch = len(x)
        flat = nnf.relu(self._conv(1)(torch.tanh(x / 3).flatten(0, 1) * 3))
        for at in STAGES:
            x = flat.unflatten(0, (batch, -1))
            for i in range(3):
                x = self.decoder[str(at + i)](x, next(past))
            # A matrix per position and repeating positions commute: it comes first, on fewer.
            x = self.decoder[str(at + 4)](x)
            flat = nnf.interpolate(x.flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
            flat = self._conv(at + 5)(flat)
        out = self._conv(22)(nnf.relu(flat))
        return out.clamp(0, 1).unflatten(0, (batch, -1))

    def step(self, latents: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """`frames`, compiled if it was prepared so."""
        return self._step(latents, memory)

    def stream(self) -> DecoderStream:
        """A new decoder stream, at the start of a video."""
        return TinyStream(self)


class TinyStream:
    """Decoder stream of a TinyDecoder: latent frame by latent frame, whatever comes together."""

    def __init__(self, decoder: TinyDecoder) -> None:
        self._decoder = decoder
        self._memory: list[Tensor] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, C, f, h, w] -> uint8 [B, t, H, W, 3] on the device; no wait for it."""
        check_latents(latents, self._decoder.latent_channels)
        first = self._memory is None
        if self._memory is None:
            self._memory = self._decoder.memory(latents)
        parts = []
        for frame in latents.split(1, 2):
            pixels = self._decoder.step(frame, self._memory).transpose(1, 2)
            parts.append(to_uint8(2 * pixels.float() - 1))
        video = torch.cat(parts, 1)
        return video[:, self._decoder.temporal_stride - 1 :] if first else video

    def fork(self) -> TinyStream:
        """A stream that goes on from here, with a copy of the memory, which is written in place."""
        twin = TinyStream(self._decoder)
        if self._memory is not None:
            with torch.inference_mode(False):
                twin._memory = [x.clone() for x in self._memory]
        return twin


def load_tiny_decoder(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TinyDecoder:
    """A tiny decoder from a TAEHV file, .pth (read with `weights_only=True`) or .safetensors.

    Its encoder is left out. A `grow` layer for twice the frames gives the rows of the last ones.

    UserError if the file is missing, damaged or no such decoder; it names what does not fit.
    """
    path = Path(path)
    opened = open_tensors(path)
    names = [name for name in opened.specs if name.startswith(PREFIX)]
    if not any(name.startswith(f"{PREFIX}1.") for name in names):
        some = ", ".join(list(opened.specs)[:3])
        raise UserError(f"{path} holds no tiny decoder in TAEHV's layout (its first names: {some})")
    decoder = TinyDecoder(_widths(opened.specs))
    own = decoder.state_dict()
    tensors = {}
    for name, tensor in opened.read(names):
        rows = own[name].shape[0] if name in own else 0
        if name.endswith(".conv.weight") and tensor.dim() and tensor.shape[0] == 2 * rows:
            tensor = tensor[-rows:]
        tensors[name] = tensor
    load_strict(decoder, tensors, str(path))
    return decoder.to(device, dtype).eval().requires_grad_(False).prepare()


def _widths(specs: Mapping[str, Spec]) -> tuple[int, ...]:
    """Channels of the stages by the shapes of the convolutions that lead to them."""
    names = [f"{PREFIX}{number}.weight" for number in (1, *(at + 5 for at in STAGES))]
    return tuple(
        specs[name].shape[0] if name in specs and specs[name].shape else published
        for name, published in zip(names, WIDTHS, strict=True)
    )
