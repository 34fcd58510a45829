"""Stage II: the distribution-matching warm-up (Self-Forcing DMD).

    grad L_DMD = -E[ (s_real(x_tau, tau, c) - s_fake(x_tau, tau, c))^T d x / d theta ]

x is the student's own rollout. The frozen real score and the trained fake score are both
bidirectional. The fake score learns by flow matching on fresh rollouts, several updates per
generator update. The run is short: longer training drives the student into motion collapse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aad1.core.flow import (
    add_noise,
    capped_weight,
    guide,
    keep_clean,
    shift,
    velocity,
    x0_from_velocity,
)
from aad1.errors import UserError
from aad1.models.dit import WanTransformer
from aad1.rollout.stream import Rollout, RolloutFn, replay
from aad1.stages.base import Batch, Conditioner, Loss, Rng, SelfRollout, randn, roll_out
from aad1.stages.base import uniform as uniform_like
from aad1.stages.losses import dmd_direction, dmd_loss


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    """Distribution matching on self-rollouts."""

    critic_updates: int = 5
    """Fake-score updates per generator update."""
    guidance_scale: float = 4.0
    """Classifier-free guidance of the real score, uncond + s (cond - uncond)."""
    shift: float = 5.0
    """Timestep shift of tau."""
    min_sigma: float = 0.02
    max_sigma: float = 0.98
    max_weight: float = float("inf")
    """Largest weight of the fake score's x0 error, as in pre-training."""
    clean_image: bool = False
    """Both scores see the given first frame clean, at sigma 0, and judge what follows: for a
    teacher that was trained so among others (`PretrainConfig.image_share`). Otherwise they see all
    frames noised alike, as a text-to-video teacher must."""

    def __post_init__(self) -> None:
        if not 0 < self.min_sigma < self.max_sigma <= 1:
            raise UserError(
                f"need 0 < min_sigma < max_sigma <= 1, got {self.min_sigma}, {self.max_sigma}"
            )
        if self.critic_updates < 1:
            raise UserError(f"critic_updates must be at least 1, got {self.critic_updates}")


class DmdWarmup:
    """Generator, frozen real score and trained fake score."""

    def __init__(
        self,
        rollout: Rollout,
        real_score: WanTransformer,
        fake_score: WanTransformer,
        conditioner: Conditioner,
        config: DmdConfig,
        run: RolloutFn = roll_out,
    ) -> None:
        self.rollout, self.real_score, self.fake_score = rollout, real_score, fake_score
        self.conditioner, self.config = conditioner, config
        self.critic_updates = config.critic_updates
        self.self_rollout = SelfRollout(rollout, run)
        self.given = rollout.geometry.first if config.clean_image else 0

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {
            "generator": list(self.rollout.model.parameters()),
            "critic": list(self.fake_score.parameters()),
        }

    def tau(self, n: int, like: torch.Tensor, rng: Rng) -> torch.Tensor:
        """Noise levels [n] at which the scores are compared."""
        u = shift(uniform_like(n, like, rng), self.config.shift)
        return u.clamp(self.config.min_sigma, self.config.max_sigma)

    def shown(self, tau: torch.Tensor, frames: int) -> torch.Tensor:
        """tau [B] as networks see it: itself, or [B, F] with 0 where the image is clean."""
        return keep_clean(tau, frames, self.given)

    def fake_error(
        self, v: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, tau: torch.Tensor
    ) -> torch.Tensor:
        """Weighted flow-matching error of the fake score's v on clips x, clean images left out."""
        error = ((v - velocity(x, noise))[:, :, self.given :] ** 2).flatten(1).mean(1)
        return (error * capped_weight(tau, self.config.max_weight)).mean()

    @torch.no_grad()
    def direction(self, x: torch.Tensor, text: torch.Tensor, rng: Rng) -> torch.Tensor:
        """The normalised DMD gradient at a clip x [B, C, F, H, W] (Eq. of stage II)."""
        sigma = self.shown(self.tau(len(x), x, rng), x.shape[2])
        x_tau = add_noise(x, randn(x.shape, x, rng), sigma)
        fake = self.fake_score(x_tau, sigma, text)
        real = self.real_score(x_tau, sigma, text)
        if self.config.guidance_scale != 1:
            null = self.real_score(x_tau, sigma, self.conditioner.null(text))
            real = guide(real, null, self.config.guidance_scale)
        clips = (x, x0_from_velocity(x_tau, real, sigma), x0_from_velocity(x_tau, fake, sigma))
        g = dmd_direction(*(clip[:, :, self.given :] for clip in clips))
        return torch.cat([torch.zeros_like(x[:, :, : self.given]), g], 2)

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Two-phase step: the loss's gradient in x is g / numel(x), carried by the replay."""
        first = self.rollout.geometry.first
        text = self.conditioner(batch.captions, batch.latents.shape[2])
        recorded, _ = self.self_rollout(batch.latents, text, rng)
        g = self.direction(recorded.x0, text, rng)
        x = torch.cat([recorded.x0[:, :, :first], replay(self.rollout, recorded, text)], 2)
        loss = dmd_loss(x, g)
        return loss, {"dmd": g.abs().mean(), "loss": loss.detach()}

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        """|| v_fake(x_tau, tau, c) - (eps - x) ||^2 on a fresh rollout."""
        text = self.conditioner(batch.captions, batch.latents.shape[2])
        x = self.self_rollout(batch.latents, text, rng)[0].x0
        tau = self.tau(len(x), x, rng)
        sigma, noise = self.shown(tau, x.shape[2]), randn(x.shape, x, rng)
        v = self.fake_score(add_noise(x, noise, sigma), sigma, text)
        loss = self.fake_error(v, x, noise, tau)
        return loss, {"fake": loss.detach()}
