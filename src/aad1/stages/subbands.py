"""Local texture by direction and scale: what a codec's loss and its evaluation look at.

The subbands are those of the linear B-spline framelet (Ron and Shen, "Affine systems in L2(R^d)",
1997). In one dimension its filters are

    l = (1, 2, 1) / 4,    m = sqrt(2) (-1, 0, 1) / 4,    h = (-1, 2, -1) / 4,

and |l^|^2 + |m^|^2 + |h^|^2 = 1 at every frequency: their products down and across split an image's
energy into nine parts without rest. So texture of one kind cannot stand in for another. A
checkerboard of single pixels is in `hh` alone and stripes of single pixels in `lh` or `hl` alone,
where one isotropic measure (a Laplacian) takes either of them for sharpness.

Filters named by two letters, down first: `lm` is the gradient across, `ml` the one down.
Luma only (ITU-R BT.601), without the border of one pixel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SCALES = 3
NAMES = tuple(down + across for down in "lmh" for across in "lmh")[1:]  # `ll` left out
_SINGLE_PIXEL = [NAMES.index(name) for name in ("lh", "hl", "hh")]
_WINDOW = 8  # pixels of a scale; windows overlap by half
# A quarter of a grey level, in pixels of [-1, 1]: rounding to 8 bits alone leaves 0.11 in `hh`.
_FLOOR = 0.25 / 127.5


def luma(video: Tensor) -> Tensor:
    """float [B, 3, T, H, W] -> [B * T, 1, H, W]."""
    frames = video.transpose(1, 2).flatten(0, 1).movedim(1, -1)
    return _weighted(frames)


def _weighted(frames: Tensor) -> Tensor:
    """float [N, H, W, 3] -> [N, 1, H, W]; no matrix product, which may run in TF32."""
    return (frames * frames.new_tensor(LUMA)).sum(-1)[:, None]


def subbands(image: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 1, H, W] -> the low pass [N, 1, H - 2, W - 2] and the subbands [N, 8, H - 2, W - 2].

    The subbands' channels are those of NAMES.
    """
    parts = torch.cat(
        [part for rows in _filtered(image, -2) for part in _filtered(rows, -1)], dim=1
    )
    return parts[:, :1], parts[:, 1:]


def _filtered(image: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """l, m and h along `dim`. Sums rather than a convolution, which may run in TF32 on a GPU."""
    size = image.shape[dim] - 2
    before, here, after = (image.narrow(dim, start, size) for start in range(3))
    sides = before + after
    low, high = (2 * here + sides) / 4, (2 * here - sides) / 4
    return low, (after - before) * 0.125**0.5, high


def local_levels(video: Tensor) -> list[Tensor]:
    """Log amplitude of each kind of texture in each window, for each of SCALES scales.

    video: float [B, 3, T, H, W] in [-1, 1]. Per scale [B * T, channels, h, w] in nats: the root
    mean square of the eight subbands and of the gradient along both diagonals, (lm +- ml) / sqrt 2.
    At the finest scale `lh`, `hl` and `hh` are split in two: the part that repeats every second
    pixel with one phase throughout a window, which is what a decoder's pixel shuffle leaves, stands
    alone as the last three channels, so that it cannot make up for texture that is missing. Each
    scale halves the size; one that is smaller than a window is left out.
    """
    image = luma(video)
    levels = []
    for scale in range(SCALES):
        if min(image.shape[-2:]) < _WINDOW + 2:
            break
        low, bands = subbands(image)
        across, down = bands[:, :1], bands[:, 2:3]
        diagonal = torch.cat([across + down, across - down], dim=1) * 0.5**0.5
        square = _windows(torch.cat([bands, diagonal], dim=1).square())
        if scale == 0:
            periodic = _windows(_demodulated(bands)).square()
            rest = (square[:, _SINGLE_PIXEL] - periodic).clamp(min=0)
            square = torch.cat([square, periodic], dim=1)
            square[:, _SINGLE_PIXEL] = rest
        levels.append(0.5 * (square + _FLOOR**2).log())
        image = low[..., ::2, ::2]
    return levels


def subband_error(video: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference of `local_levels`, in nats, averaged over scales; a scalar."""
    pairs = zip(local_levels(video), local_levels(reference), strict=True)
    return torch.stack([(one - other).abs().mean() for one, other in pairs]).mean()


UNFOLDED = 8
"""Pixels a side that one latent position is unfolded to: a decoder's own patterns repeat so."""


def fixed_pattern(error: Tensor) -> Tensor:
    """Root mean square, per clip [B], of the part of an error that repeats every 8 pixels.

    error: float [B, 3, T, H, W], decoded minus true pixels. Its luma is averaged over frames and
    over squares of 8 x 8: what a picture holds does not repeat on that grid and averages out, what
    the decoder lays over every picture stays. The subbands cannot see it: a pattern has the
    amplitude that they ask for. Zero if the frames are smaller than a square.
    """
    flat = luma(error)[:, 0].view(len(error), -1, *error.shape[-2:])
    rows, columns = (side // UNFOLDED * UNFOLDED for side in flat.shape[-2:])
    if not (rows and columns):
        return flat.new_zeros(len(flat))
    whole: Tensor = flat[..., :rows, :columns]
    tiles = whole.reshape(*flat.shape[:2], rows // UNFOLDED, UNFOLDED, -1, UNFOLDED)
    pattern: Tensor = tiles.mean((1, 2, 4))  # [B, 8, 8]
    pattern = pattern - pattern.mean((1, 2), keepdim=True)
    return (pattern.square().mean((1, 2)) + 1e-12).sqrt()


def amplitude_ratios(video: Tensor, reference: Tensor) -> dict[str, float]:
    """Root mean square of each direction's texture, relative to the reference's; 1 = alike.

    video, reference: uint8 [..., H, W, 3]; pooled over all pixels and frames, finest scale.
    across, down: gradients (`lm`, `ml`). falling, rising: gradients along the two diagonals.
    stripes_across, stripes_down: stripes of single pixels (`lh`, `hl`), checkerboard: `hh`.
    nyquist: the part of those three with one phase throughout a window of 8 x 8 pixels.
    half_across, half_down, half_checkerboard: `lm`, `ml` and `hh` at half the size.
    """
    own, real = _energies(video), _energies(reference)
    return {name: math.sqrt(own[name] / max(real[name], 1e-12)) for name in real}


def _energies(video: Tensor) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in torch.split(video.flatten(0, -4), 256):
        low, bands = subbands(_weighted(part.float()))
        _, half = subbands(low[..., ::2, ::2])
        of = dict(zip(NAMES, bands.unbind(1), strict=True))
        coarse = dict(zip(NAMES, half.unbind(1), strict=True))
        parts = {
            "across": of["lm"],
            "down": of["ml"],
            "falling": (of["lm"] + of["ml"]) * 0.5**0.5,
            "rising": (of["lm"] - of["ml"]) * 0.5**0.5,
            "stripes_across": of["lh"],
            "stripes_down": of["hl"],
            "checkerboard": of["hh"],
            "nyquist": _windows(_demodulated(bands)),
            "half_across": coarse["lm"],
            "half_down": coarse["ml"],
            "half_checkerboard": coarse["hh"],
        }
        for name, values in parts.items():
            total[name] = total.get(name, 0.0) + float(values.double().square().sum())
    return total


def _demodulated(bands: Tensor) -> Tensor:
    """`lh`, `hl` and `hh` [N, 3, h, w], each times the pattern of period 2 that it passes whole."""
    height, width = bands.shape[-2:]
    down = (1 - 2 * (torch.arange(height, device=bands.device) % 2)).to(bands)[:, None]
    across = (1 - 2 * (torch.arange(width, device=bands.device) % 2)).to(bands)
    signs = torch.stack([across.expand(height, width), down.expand(height, width), down * across])
    return bands[:, _SINGLE_PIXEL] * signs


def _windows(values: Tensor) -> Tensor:
    return nnf.avg_pool2d(values, _WINDOW, stride=_WINDOW // 2)
