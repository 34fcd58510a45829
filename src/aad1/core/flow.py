"""Rectified-flow algebra in sigma in [0, 1]: x_t = (1 - sigma) x0 + sigma eps, v = eps - x0.

The project speaks sigma only; the network's own timestep (1000 sigma) is formed inside
`aad1.models.dit` and nowhere else.
"""

from __future__ import annotations

import torch


def per_frame(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape sigma [B] or [B, F] so that it broadcasts against latents [B, C, F, H, W]."""
    if sigma.dim() == 1:
        return sigma.view(-1, 1, 1, 1, 1).to(like.dtype)
    if sigma.dim() == 2:
        return sigma[:, None, :, None, None].to(like.dtype)
    raise ValueError(f"sigma must be [B] or [B, F], got {list(sigma.shape)}")


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - sigma) x0 + sigma eps, for latents [B, C, F, H, W] and sigma [B] or [B, F]."""
    s = per_frame(sigma, x0)
    return (1 - s) * x0 + s * noise


def keep_clean(sigma: torch.Tensor, frames: int, given: int) -> torch.Tensor:
    """sigma [B] as it is for no given frames; else [B, frames] with 0 for the first `given`."""
    if not given:
        return sigma
    levels = sigma[:, None].repeat(1, frames)
    levels[:, :given] = 0
    return levels


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """v = d x_t / d sigma = eps - x0."""
    return noise - x0


def x0_from_velocity(x_t: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - sigma v."""
    return x_t - per_frame(sigma, x_t) * v


def noise_from_velocity(x_t: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """eps = x_t + (1 - sigma) v."""
    return x_t + (1 - per_frame(sigma, x_t)) * v


def score(x_t: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """grad log p(x_t) = ((1 - sigma) x0 - x_t) / sigma^2, with x0 = E[x0 | x_t]; sigma > 0."""
    s = per_frame(sigma, x_t)
    return ((1 - s) * x0 - x_t) / s**2


def capped_weight(sigma: torch.Tensor, most: float) -> torch.Tensor:
    """min(1, most sigma^2): a velocity error with it is an x0 error weighted min(1/sigma^2, most).

    A velocity loss asks for x0 to within sigma; a network narrower than its patches cannot give
    that at low noise and would spend itself there. most = infinity is plain flow matching.
    """
    return (most * sigma**2).clamp_max(1.0)


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, uncond + scale (cond - uncond): scale 1 is no guidance."""
    return uncond + scale * (cond - uncond)


def shift(u: torch.Tensor, k: float) -> torch.Tensor:
    """Timestep shift k u / (1 + (k - 1) u): k > 1 spends more steps at high noise."""
    return k * u / (1 + (k - 1) * u)


def sigma_grid(steps: int, k: float) -> torch.Tensor:
    """The exact sampler grid shift(i / steps), i = steps .. 0, float64 [steps + 1] from 1 to 0.

    With steps a multiple of 4 and k = 5 it contains the few-step levels 1, 0.9375, 0.8333 and
    0.625 exactly, which rounding schedulers miss.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return shift(torch.arange(steps, -1, -1, dtype=torch.float64) / steps, k)
