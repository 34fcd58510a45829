"""Distribution matching and the adversarial loss at once: what staging is measured against.

    L_G = L_DMD + w softplus(-D(x_tau))
    L_C = L_fake + w [ softplus(-D(y_tau)) + softplus(D(x_tau)) + lambda_1 R1 + lambda_2 R2 ]

AAD-1 holds that the two must follow one another, One-Forcing (arXiv 2605.23458) that they go well
together. This is the latter's recipe: one network is fake score and discriminator, its query heads
reading the same backbone that learns the student's clips x; y are real ones, noised at the same
tau. R1 and R2 are APT's approximate penalties, each with its own weight and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aad1.core.flow import add_noise
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator
from aad1.models.dit import WanTransformer
from aad1.rollout.stream import Rollout, RolloutFn, replay
from aad1.stages.adversarial import heldout_gap
from aad1.stages.base import Batch, Conditioner, Loss, Rng, SelfRollout, randn, roll_out
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.losses import (
    approximate_penalty,
    discriminator_loss,
    dmd_loss,
    generator_adversarial_loss,
)


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Distribution matching and the adversarial loss together."""

    score: DmdConfig = DmdConfig()
    """The distribution-matching half, critic updates and noise levels included."""
    gan_weight: float = 0.03
    """w, of the adversarial terms of either network."""
    r1_weight: float = 1.0
    r1_sigma: float = 0.1
    r2_weight: float = 0.001
    r2_sigma: float = 0.01
    critic_warmup: int = 0
    """Critic updates before the generator's first."""

    def __post_init__(self) -> None:
        for name in ("gan_weight", "r1_weight", "r2_weight", "critic_warmup"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("r1_sigma", "r2_sigma"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")


class Joint:
    """Generator, frozen real score, and a fake score that is also the discriminator."""

    def __init__(
        self,
        rollout: Rollout,
        real_score: WanTransformer,
        discriminator: Discriminator,
        conditioner: Conditioner,
        config: JointConfig,
        run: RolloutFn = roll_out,
    ) -> None:
        self.rollout, self.discriminator = rollout, discriminator
        self.conditioner, self.config = conditioner, config
        self.score = DmdWarmup(
            rollout, real_score, discriminator.backbone, conditioner, config.score, run
        )
        self.critic_updates = config.score.critic_updates
        self.self_rollout = SelfRollout(rollout, run)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {
            "generator": list(self.rollout.model.parameters()),
            "critic": list(self.discriminator.backbone.parameters()),
            "critic_heads": self.discriminator.head_parameters(),
        }

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Two-phase step: both gradients in x, carried by one replay."""
        first = self.rollout.geometry.first
        text = self.conditioner(batch.captions, batch.latents.shape[2])
        recorded, _ = self.self_rollout(batch.latents, text, rng)
        g = self.score.direction(recorded.x0, text, rng)
        x = recorded.x0.detach().requires_grad_()
        sigma = self.score.shown(self.score.tau(len(x), x, rng), x.shape[2])
        fake = self.discriminator(add_noise(x, randn(x.shape, x, rng), sigma), sigma, text)
        adversarial = generator_adversarial_loss(fake)
        (dx,) = torch.autograd.grad(adversarial, x)
        out = torch.cat([recorded.x0[:, :, :first], replay(self.rollout, recorded, text)], 2)
        matching = dmd_loss(out, g)
        surrogate = (out * dx).sum()
        total = matching + self.config.gan_weight * (
            adversarial.detach() + surrogate - surrogate.detach()
        )
        logs = {"dmd": g.abs().mean(), "loss": adversarial.detach()}
        return total, logs | {"fake_logit": fake.detach().mean()}

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        c, real_x = self.config, batch.latents
        text = self.conditioner(batch.captions, real_x.shape[2])
        fake_x = self.self_rollout(real_x, text, rng)[0].x0
        tau = self.score.tau(len(real_x), real_x, rng)
        shown, noise = self.score.shown(tau, real_x.shape[2]), randn(real_x.shape, real_x, rng)
        real_tau, fake_tau = add_noise(real_x, noise, shown), add_noise(fake_x, noise, shown)
        v = self.discriminator.backbone(fake_tau, shown, text)
        matching = self.score.fake_error(v, fake_x, noise, tau)
        both, sigma = torch.cat([real_tau, fake_tau]), torch.cat([shown, shown])
        context = torch.cat([text, text])
        real, fake = self.discriminator(both, sigma, context).chunk(2)
        penalty = torch.zeros((), device=real.device)
        if c.r1_weight or c.r2_weight:
            drawn = randn((2, *real_x.shape), real_x, rng, dim=1)
            near = both + torch.cat([c.r1_sigma * drawn[0], c.r2_sigma * drawn[1]])
            near_real, near_fake = self.discriminator(near, sigma, context).chunk(2)
            penalty = c.r1_weight * approximate_penalty(real, near_real)
            penalty = penalty + c.r2_weight * approximate_penalty(fake, near_fake)
        adversarial = discriminator_loss(real, fake)
        logs = {
            "fake": matching.detach(),
            "critic": adversarial.detach(),
            "penalty": penalty.detach(),
            "gap": (real.mean() - fake.mean()).detach(),
        }
        return matching + c.gan_weight * (adversarial + penalty), logs

    def heldout_gap(
        self, real: torch.Tensor, fake: torch.Tensor, captions: list[list[str]], together: int = 32
    ) -> torch.Tensor:
        """`adversarial.heldout_gap` on the levels at which the scores are compared."""
        interval = (self.config.score.min_sigma, self.config.score.max_sigma)
        return heldout_gap(
            self.discriminator, self.conditioner, real, fake, captions, interval, together,
            self.score.given,
        )  # fmt: skip
