"""The networks of Wan 2.1's video autoencoder: a streaming decoder and an image encoder.

Every convolution is causal in time and remembers the last two frames that it saw. Here those
memories are tensors of fixed size, zero at the start, which is what padding gives; so every latent
frame but the first is decoded by one and the same program.

The first latent frame gives one video frame: nothing lies before it, so each 3x3x3 kernel acts
through its last time slice, a 2-D convolution, and time is not doubled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from aad1.errors import UserError

PAST = 2  # frames that a causal kernel of three remembers


@dataclass(frozen=True, kw_only=True)
class WanVaeConfig:
    """Sizes; the defaults are Wan 2.1's. Field names are diffusers'."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)

    @classmethod
    def of(cls, config: Any) -> WanVaeConfig:
        """From diffusers' config. UserError for a variant that this module does not know."""
        for name, plain in (("is_residual", False), ("patch_size", None), ("attn_scales", [])):
            value = getattr(config, name, plain)
            if (list(value) if isinstance(value, tuple) else value) != plain:
                raise UserError(f"a Wan VAE with {name}={value} has no fast decoder")
        return cls(
            base_dim=config.base_dim,
            decoder_base_dim=getattr(config, "decoder_base_dim", None),
            z_dim=config.z_dim,
            dim_mult=tuple(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=tuple(config.temperal_downsample),
        )


class Memory:
    """The past frames of every causal convolution of one video, in the order they are met.

    Made while the first frame is decoded; written in place from then on.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def start(self, x: Tensor, see: bool) -> None:
        """A new memory that ends in frame x [B, C, 1, h, w], or in nothing unless `see`."""
        b, c, _, h, w = x.shape
        with torch.inference_mode(False):  # overwritten later, in whatever mode
            past = x.new_zeros(b, PAST, h, w, c).permute(0, 4, 1, 2, 3)  # channels last
        if see:
            past[:, :, -1:] = x
        self.tensors.append(past)

    def copy(self) -> Memory:
        """The same past, for a second stream to write on."""
        twin = Memory()
        with torch.inference_mode(False):
            twin.tensors = [x.clone() for x in self.tensors]
        return twin


class Norm(nn.Module):
    """RMS norm over the channels of each position; gamma [C, 1, 1] or [C, 1, 1, 1]."""

    def __init__(self, channels: int, spatial: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * spatial))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        size = wide.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        normed = (wide / size).to(x.dtype)
        return normed * x.shape[1] ** 0.5 * self.gamma


class Causal(nn.Conv3d):
    """A convolution over (time, height, width) that sees no later frame."""

    padded: Tensor | None = None

    def __init__(self, d_in: int, d_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(d_in, d_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def first(self, x: Tensor, memory: Memory | None) -> Tensor:
        """The first frame [B, C, 1, h, w], with nothing before it."""
        if memory is not None:
            memory.start(x, see=True)
        pad = (self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        return nnf.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=pad)[:, :, None]

    def forward(self, x: Tensor, past: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, C, T, h, w] after `past` [B, C, 2, h, w], which becomes x's last frames."""
        joined = torch.cat([past, x], 2)
        past.copy_(joined[:, :, -PAST:])
        weight = self.weight
        if self.padded is not None:
            weight = self.padded
            joined = nnf.pad(joined, (0, 0) * 3 + (0, weight.shape[1] - x.shape[1]))
        return nnf.conv3d(joined, weight, self.bias, padding=self.padding)  # type: ignore[arg-type]

    def after_norm(
        self, norm: Norm, x: Tensor, bias: Tensor | None, past: Tensor, own_bias: bool = True
    ) -> Tensor:
        """`forward` of SiLU(norm(x + bias)), what lies before the product in one kernel.

        own_bias: off if whoever reads the result adds this convolution's bias.
        """
        from aad1.models.wan_vae_kernels import activate

        weight = self.weight if self.padded is None else self.padded
        joined = activate(x, bias, norm.gamma.flatten(), past, weight.shape[1])
        past.copy_(joined[:, : x.shape[1], -PAST:])
        added = self.bias if own_bias else None
        return nnf.conv3d(joined, weight, added, padding=self.padding)  # type: ignore[arg-type]

    def pad_channels(self, multiple: int) -> None:
        """Compute with zero channels added, up to a multiple."""
        w = nnf.pad(self.weight.detach(), (0, 0) * 3 + (0, -self.weight.shape[1] % multiple))
        self.padded = w.contiguous(memory_format=torch.channels_last_3d)


class Pointwise(nn.Conv3d):
    """A matrix per position, stored as a 1x1x1 kernel."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, 1)


class Residual(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, added to the input.

    kernels: norms, SiLU and what a convolution is given in a kernel of our own (Triton).
    """

    kernels = False

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.norm1 = Norm(d_in, 3)
        self.conv1 = Causal(d_in, d_out, (3, 3, 3))
        self.norm2 = Norm(d_out, 3)
        self.conv2 = Causal(d_out, d_out, (3, 3, 3))
        self.conv_shortcut = Pointwise(d_in, d_out) if d_in != d_out else nn.Identity()

    def first(self, x: Tensor, memory: Memory | None) -> Tensor:
        h = self.conv1.first(nnf.silu(self.norm1(x)), memory)
        return self.conv_shortcut(x) + self.conv2.first(nnf.silu(self.norm2(h)), memory)

    def forward(self, x: Tensor, past: list[Tensor]) -> Tensor:
        if self.kernels:
            h = self.conv1.after_norm(self.norm1, x, None, past.pop(0), own_bias=False)
            h = self.conv2.after_norm(self.norm2, h, self.conv1.bias, past.pop(0))
            return self.conv_shortcut(x) + h  # type: ignore[no-any-return]
        h = self.conv1(nnf.silu(self.norm1(x)), past.pop(0))
        return self.conv_shortcut(x) + self.conv2(nnf.silu(self.norm2(h)), past.pop(0))


class SelfAttention(nn.Module):
    """One head over the positions of each frame."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = Norm(d, 2)
        self.to_qkv = nn.Conv2d(d, 3 * d, 1)
        self.proj = nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # [B T, C, h, w]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]
        q, k, v = qkv.chunk(3, -1)
        out = nnf.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        out = self.proj(out.reshape_as(frames))
        return x + out.unflatten(0, (len(x), -1)).transpose(1, 2)


class Middle(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(d, d), Residual(d, d)])
        self.attentions = nn.ModuleList([SelfAttention(d)])

    def first(self, x: Tensor, memory: Memory | None) -> Tensor:
        before, after = self.resnets
        return after.first(self.attentions[0](before.first(x, memory)), memory)  # type: ignore

    def forward(self, x: Tensor, past: list[Tensor]) -> Tensor:
        before, after = self.resnets
        return after(self.attentions[0](before(x, past)), past)


class Upsample(nn.Module):
    """Twice the height and width, half the channels; twice the frames too with `time_conv`."""

    phases: Tensor | None = None

    def __init__(self, d: int, temporal: bool) -> None:
        super().__init__()
        # Named as diffusers names it: index 0 enlarges and has no weights.
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(d, d // 2, 3, padding=1)])
        self.time_conv = Causal(d, 2 * d, (3, 1, 1)) if temporal else None

    def first(self, x: Tensor, memory: Memory | None) -> Tensor:
        if self.time_conv is not None and memory is not None:
            memory.start(x, see=False)  # Wan's time_conv never sees the first frame
        return self._enlarge(x)

    def forward(self, x: Tensor, past: list[Tensor]) -> Tensor:
        if self.time_conv is not None:
            two = self.time_conv(x, past.pop(0)).unflatten(1, (2, -1))  # [B, 2, C, T, h, w]
            x = two.movedim(1, 3).flatten(2, 3)
        return self._enlarge(x)

    def _enlarge(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        if self.phases is None:
            out = self.resample[1](nnf.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
        else:
            out = self._by_phases(frames)
        return out.unflatten(0, (len(x), -1)).transpose(1, 2)

    def split_phases(self) -> None:
        """Compute the four pixels that come of one with a 2x2 kernel each, at the smaller size.

        Of an enlarged picture a 3x3 kernel sees two rows of the small one: those of an even pixel
        are (before, own) with weights (a, b + c), those of an odd one (own, after) with (a + b, c).
        So 4 products instead of 9, and the enlarged picture is never written.
        """

        def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
            a, b, c = w.unbind(dim)
            return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

        weight: Tensor = self.resample[1].weight.detach()  # type: ignore[operator]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        kernels = [k for rows in halves(wide, 2) for k in halves(rows, 3)]
        phases = torch.cat(kernels).to(weight.dtype)  # [4 C, C_in, 2, 2]
        self.phases = phases.contiguous(memory_format=torch.channels_last)

    def _by_phases(self, x: Tensor) -> Tensor:
        """x [N, C_in, h, w] -> [N, C, 2 h, 2 w]."""
        h, w = x.shape[-2:]
        out = nnf.conv2d(x, self.phases, self.resample[1].bias.repeat(4), padding=1)  # type: ignore
        # [N, h + 1, w + 1, 2, 2, C]; an even pixel's window begins one earlier than an odd one's.
        both = out.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))
        rows = torch.arange(2 * h, device=x.device)[:, None]
        columns = torch.arange(2 * w, device=x.device)
        # One index, which the compiler makes part of the next step; stacks would be two passes.
        pixels = both[:, (rows + 1) // 2, (columns + 1) // 2, rows % 2, columns % 2]
        return pixels.permute(0, 3, 1, 2)


class UpBlock(nn.Module):
    def __init__(self, d_in: int, d_out: int, depth: int, up: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(d_out if i else d_in, d_out) for i in range(depth))
        self.upsamplers = nn.ModuleList([Upsample(d_out, up == "3d")] if up else [])

    def steps(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class Decoder(nn.Module):
    """Raw latents of one frame -> pixels in about [-1, 1]. kernels: as of `Residual`."""

    kernels = False

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = Causal(config.z_dim, widths[0], (3, 3, 3))
        self.mid_block = Middle(widths[0])
        temporal = list(reversed(config.temperal_downsample))
        blocks = []
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            up = "" if i == len(temporal) else "3d" if temporal[i] else "2d"
            blocks.append(UpBlock(d_in // 2 if i else d_in, d_out, config.num_res_blocks + 1, up))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = Norm(widths[-1], 3)
        self.conv_out = Causal(widths[-1], 3, (3, 3, 3))

    def first(self, z: Tensor, memory: Memory) -> Tensor:
        """The first latent frame [B, z, 1, h, w] -> [B, 3, 1, H, W]; fills `memory`."""
        x = self.mid_block.first(self.conv_in.first(z, memory), memory)
        for block in self.up_blocks:
            for step in block.steps():  # type: ignore[operator]
                x = step.first(x, memory)
        return self.conv_out.first(nnf.silu(self.norm_out(x)), memory)

    def forward(self, z: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """Later latent frames [B, z, f, h, w] -> [B, 3, 4 f, H, W]; updates `memory`."""
        past = list(memory)
        x = self.mid_block(self.conv_in(z, past.pop(0)), past)
        for block in self.up_blocks:
            for step in block.steps():  # type: ignore[operator]
                x = step(x, past)
        if self.kernels:
            return self.conv_out.after_norm(self.norm_out, x, None, past.pop(0))
        return self.conv_out(nnf.silu(self.norm_out(x)), past.pop(0))

    def use_kernels(self, on: bool) -> None:
        """Norms and SiLU by our own kernel, in all that comes after a video's first frame."""
        for module in self.modules():
            if isinstance(module, Residual | Decoder):
                module.kernels = on


class Downsample(nn.Module):
    """Half the height and width (of an image: time is left alone)."""

    def __init__(self, d: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(d, d, 3, stride=2)])
        # An image does not reach it; it is here for its name.
        self.time_conv = nn.Conv3d(d, d, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def first(self, x: Tensor, memory: Memory | None) -> Tensor:
        return self.resample[1](nnf.pad(x[:, :, 0], (0, 1, 0, 1)))[:, :, None]


class ImageEncoder(nn.Module):
    """Pixels of one image [B, 3, 1, H, W] -> [B, 2 z, 1, h, w], mean and log-variance."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = Causal(3, widths[0], (3, 3, 3))
        blocks: list[nn.Module] = []
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            blocks += [Residual(d_out if n else d_in, d_out) for n in range(config.num_res_blocks)]
            if i < len(config.temperal_downsample):
                blocks.append(Downsample(d_out, config.temperal_downsample[i]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = Middle(widths[-1])
        self.norm_out = Norm(widths[-1], 3)
        self.conv_out = Causal(widths[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in.first(pixels, None)
        for block in self.down_blocks:
            x = block.first(x, None)  # type: ignore[operator]
        x = self.mid_block.first(x, None)
        return self.conv_out.first(nnf.silu(self.norm_out(x)), None)
