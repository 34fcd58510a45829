"""The losses as pure functions of tensors, each with its equation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dmd_direction(x: torch.Tensor, real_x0: torch.Tensor, fake_x0: torch.Tensor) -> torch.Tensor:
    """g = (fake_x0 - real_x0) / mean |x - real_x0|: the normalised DMD gradient at x.

    Both scores' denoised clips [B, ...] at the same noised x; the mean is per sample. Since
    score = ((1 - s) x0 - x_t) / s^2, s_real - s_fake is proportional to real_x0 - fake_x0, so a
    step along -g moves x from the fake's distribution to the real one's.
    """
    weight = (x - real_x0).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake_x0 - real_x0) / weight.view(-1, *[1] * (x.dim() - 1))


def dmd_loss(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """0.5 mean (x - sg(x - g))^2, whose gradient in x is g / numel(x)."""
    return 0.5 * ((x - (x - direction).detach()) ** 2).mean()


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """L_D = -E log D(real) - E log(1 - D(fake)), with D = sigmoid(logit)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_adversarial_loss(fake: torch.Tensor) -> torch.Tensor:
    """L_G = -E log D(fake), the non-saturating form."""
    return F.softplus(-fake).mean()


def relativistic_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """-E log sigmoid(better - worse) over pairs: D with (real, fake), G with (fake, real)."""
    return F.softplus(worse - better).mean()


def approximate_penalty(logit: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """E || D(x) - D(x + delta) ||^2: R1 on real x, R2 on generated x (APT's form, no 1/sigma^2)."""
    return ((logit - perturbed) ** 2).mean()
