"""Stage 0: flow-matching pre-training of the bidirectional teacher (users of Wan skip it).

    L = E || v_theta(x_sigma, sigma, c) - (eps - x0) ||^2,   x_sigma = (1 - sigma) x0 + sigma eps

with one sigma for the whole clip, sigma = shift(u; k), and the prompt dropped at times so that
classifier-free guidance has an unconditional branch. The prompt encoder learns along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aad1.core.flow import add_noise, capped_weight, shift, velocity
from aad1.models.dit import WanTransformer
from aad1.stages.base import Batch, Conditioner, Logs, Loss, Rng, randn, uniform


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Flow matching on data."""

    shift: float = 3.0
    """Timestep shift k of the training noise levels."""
    prompt_dropout: float = 0.1
    """Share of clips trained without their prompt."""
    image_share: float = 0.0
    """Share of clips that keep the first frame clean (sigma 0) as an image condition."""
    max_weight: float = float("inf")
    """Largest weight of the x0 error; infinity is plain flow matching (weight 1 / sigma^2)."""


class Pretrain:
    """Flow matching of a bidirectional teacher and its prompt encoder."""

    critic_updates = 0

    def __init__(
        self,
        teacher: WanTransformer,
        conditioner: Conditioner,
        encoder: nn.Module,
        config: PretrainConfig,
    ) -> None:
        self.teacher, self.conditioner, self.encoder = teacher, conditioner, encoder
        self.config = config

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": [*self.teacher.parameters(), *self.encoder.parameters()]}

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        x0 = batch.latents
        b, frames = x0.shape[0], x0.shape[2]
        text = self.conditioner(batch.captions, frames)
        keep = uniform(b, x0, rng) >= self.config.prompt_dropout
        text = text * keep.view(-1, 1, 1, 1)
        sigma = shift(uniform(b, x0, rng), self.config.shift)[:, None].expand(b, frames).clone()
        clean = uniform(b, x0, rng) < self.config.image_share
        sigma[:, 0] = torch.where(clean, torch.zeros_like(sigma[:, 0]), sigma[:, 0])
        noise = randn(x0.shape, x0, rng)
        v = self.teacher(add_noise(x0, noise, sigma), sigma, text)
        error = ((v - velocity(x0, noise)) ** 2).mean(dim=(1, 3, 4))
        weight = capped_weight(sigma, self.config.max_weight) * (sigma > 0)
        # Per clip, then over clips: the same however a batch is split.
        loss = ((error * weight).sum(1) / (sigma > 0).sum(1)).mean()
        logs: Logs = {"loss": loss.detach()}
        return loss, logs

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        raise NotImplementedError("stage 0 has no critic")
