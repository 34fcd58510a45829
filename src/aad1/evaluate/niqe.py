"""Natural-scene statistics of single frames: fourteen numbers that notice blur, noise and fading.

They describe mean-subtracted, contrast-normalised luminance (MSCN) at two scales, the ground of
BRISQUE and NIQE (Mittal et al. 2012, 2013). Plain moments stand for the fitted generalised
Gaussians of those papers: they need no search and have no failing fits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PER_SCALE = (
    "contrast",
    "mscn_energy",
    "mscn_peakedness",
    "mscn_across",
    "mscn_down",
    "mscn_diagonal",
    "sharpness",
)
NSS_NAMES = (*_PER_SCALE, *(f"{name}_half" for name in _PER_SCALE))
"""The features in their order: seven at full and seven at half resolution."""

_SIGMA = 7 / 6
_REACH = 3
_FLAT = 1.0  # grey levels added to the local deviation, so that flat areas stay near 0
_FLOOR = 1e-3


def nss_features(frames: Tensor) -> Tensor:
    """float64 [N, 14] (on the CPU) of luminance frames, float [N, H, W] in 0..255.

    Per scale: mean log local deviation (contrast); log mean square, and mean |x| / rms
    (peakedness), of the MSCN field; its correlation with the neighbour across, down and on the
    diagonals; log root mean square of the Laplacian (sharpness). A constant frame has finite
    features, from the floors.
    """
    image = frames[:, None]
    fine = _of_scale(image)
    coarse = _of_scale(F.avg_pool2d(image, 2))
    return torch.cat([fine, coarse], dim=1).cpu().double()


def log_laplacian(frames: Tensor) -> Tensor:
    """float [N]: log root mean square of the Laplacian of luminance frames [N, H, W] in 0..255."""
    center = frames[..., 1:-1, 1:-1]
    laplacian = (
        frames[..., :-2, 1:-1]
        + frames[..., 2:, 1:-1]
        + frames[..., 1:-1, :-2]
        + frames[..., 1:-1, 2:]
        - 4 * center
    )
    return 0.5 * (laplacian.square().mean(dim=(-2, -1)) + _FLOOR).log()


def _blur(image: Tensor) -> Tensor:
    offset = torch.arange(-_REACH, _REACH + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offset / _SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    wide = F.pad(image, (_REACH, _REACH, _REACH, _REACH), mode="replicate")
    rows = F.conv2d(wide, kernel.view(1, 1, -1, 1))
    return F.conv2d(rows, kernel.view(1, 1, 1, -1))


def _of_scale(image: Tensor) -> Tensor:
    mean = _blur(image)
    deviation = (_blur(image.square()) - mean.square()).clamp(min=0).sqrt()
    mscn = (image - mean) / (deviation + _FLAT)
    energy = mscn.square().mean(dim=(1, 2, 3)) + _FLOOR

    def correlation(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).mean(dim=(1, 2, 3)) / energy

    falling = correlation(mscn[..., 1:, 1:], mscn[..., :-1, :-1])
    rising = correlation(mscn[..., 1:, :-1], mscn[..., :-1, 1:])
    return torch.stack(
        [
            (deviation + _FLAT).log().mean(dim=(1, 2, 3)),
            energy.log(),
            mscn.abs().mean(dim=(1, 2, 3)) / energy.sqrt(),
            correlation(mscn[..., 1:], mscn[..., :-1]),
            correlation(mscn[..., 1:, :], mscn[..., :-1, :]),
            0.5 * (falling + rising),
            log_laplacian(image[:, 0]),
        ],
        dim=1,
    )
