"""Stage III: asymmetric adversarial refinement.

    L_D = -E log D(x_tau) - E log(1 - D(x^_tau)) + lambda (R1 + R2),    L_G = -E log D(x^_tau)
    R1 = E || D(x_tau) - D(x_tau + delta) ||^2,  R2 the same on x^_tau,  delta ~ N(0, s^2 I)

The generator is causal; the discriminator sees whole noised clips in both directions, is told
tau, and gives one logit per video. A generated clip is rolled out from its real partner's first
frame and prompts; both are noised at the same tau, in the discriminator's step with the same eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from aad1.core.flow import add_noise, keep_clean
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator
from aad1.rollout.stream import Rollout, RolloutFn, replay
from aad1.stages.base import (
    Batch,
    Conditioner,
    Loss,
    Rng,
    SelfRollout,
    choose,
    randn,
    roll_out,
    uniform,
)
from aad1.stages.losses import (
    approximate_penalty,
    discriminator_loss,
    generator_adversarial_loss,
    relativistic_loss,
)


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Adversarial refinement."""

    critic_updates: int = 1
    """Discriminator updates per generator update."""
    critic_warmup: int = 0
    """Discriminator updates before the generator's first."""
    penalty_weight: float = 20.0
    """lambda, the weight of R1 + R2."""
    penalty_sigma: float = 0.05
    """Standard deviation s of the perturbation delta."""
    loss: str = "logistic"
    """"logistic" (paper) or "relativistic" (pairs)."""
    min_sigma: float = 0.0
    max_sigma: float = 1.0
    graph: str = "auto"
    """Which of the discriminator's passes (real, generated, and each perturbed) have activations in
    memory at once. "whole": all. "pairs": a clip and its perturbed copy, then the other two.
    "single": one, which costs a second forward pass of some. The gradient is the same. "auto":
    pairs where blocks are checkpointed (`checkpoint_blocks`), else whole."""
    rollout_frames: int = 0
    """Latent frames of a self-rollout that is longer than the world's clips: the discriminator sees
    a random stretch of a clip's length, and only its chunks get gradients. 0: as the clips.
    Exploratory; the paper trains on rollouts of a clip's length."""

    def __post_init__(self) -> None:
        if self.graph not in ("auto", *GRAPHS):
            raise UserError(f"graph must be auto, {', '.join(GRAPHS)}, got {self.graph!r}")
        if self.loss not in ("logistic", "relativistic"):
            raise UserError(f'loss must be "logistic" or "relativistic", got {self.loss!r}')
        if self.penalty_weight < 0 or self.penalty_sigma <= 0:
            raise UserError(
                "penalty_weight must be >= 0 and penalty_sigma > 0, got "
                f"{self.penalty_weight}, {self.penalty_sigma}"
            )
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise UserError(
                f"need 0 <= min_sigma < max_sigma <= 1, got {self.min_sigma}, {self.max_sigma}"
            )
        if self.critic_updates < 1:
            raise UserError(f"critic_updates must be at least 1, got {self.critic_updates}")
        if self.rollout_frames < 0:
            raise UserError(f"rollout_frames must be at least 0, got {self.rollout_frames}")

    def settled(self, checkpointed: bool) -> AdversarialConfig:
        """With `graph` chosen, if it is "auto"; checkpointed: whether blocks are run again."""
        if self.graph != "auto":
            return self
        return replace(self, graph="pairs" if checkpointed else "whole")

    def turns(self) -> tuple[list[tuple[int, ...]], set[int]]:
        """How the discriminator's step goes: groups of passes that share a graph, in order, and
        the passes that are run without a graph before. Passes are 0 real, 1 generated, 2 and 3
        the same perturbed (none of these without a penalty).
        """
        groups = GRAPHS[self.settled(False).graph]
        coupled = [(0, 1)] if self.loss == "relativistic" else []
        if self.penalty_weight:
            coupled += [(0, 2), (1, 3)]
        else:
            groups = [tuple(n for n in group if n < 2) for group in groups]
        # What an earlier group's loss depends on must be known before its turn has come.
        ahead = {j for i, j in coupled if not any(i in g and j in g for g in groups)}
        return [group for group in groups if group], ahead


GRAPHS: dict[str, list[tuple[int, ...]]] = {
    "whole": [(0, 1, 2, 3)],
    "pairs": [(0, 2), (1, 3)],
    "single": [(0,), (1,), (2,), (3,)],
}
"""Passes of the discriminator that share a graph; see `AdversarialConfig.turns`."""


class Adversarial:
    """Causal generator against a discriminator of whole clips.

    stretch: latent frames that the discriminator sees of a longer clip; None: all.
    """

    def __init__(
        self,
        rollout: Rollout,
        discriminator: Discriminator,
        conditioner: Conditioner,
        config: AdversarialConfig,
        run: RolloutFn = roll_out,
        stretch: int | None = None,
    ) -> None:
        self.rollout, self.discriminator = rollout, discriminator
        self.conditioner, self.config, self.stretch = conditioner, config, stretch
        self.critic_updates = config.critic_updates
        self.self_rollout = SelfRollout(rollout, run)
        for step in range(len(rollout.sigmas)):
            low, high = self.interval(step)
            if low >= high:
                raise UserError(
                    f"min_sigma {config.min_sigma} and max_sigma {config.max_sigma} leave no noise "
                    f"levels for step {step} of {rollout.sigmas}"
                )

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {
            "generator": list(self.rollout.model.parameters()),
            "critic": list(self.discriminator.backbone.parameters()),
            "critic_heads": self.discriminator.head_parameters(),
        }

    def interval(self, step: int) -> tuple[float, float]:
        """The discriminator's noise levels for a generator that exits at `step`.

        The output of one step is judged on [next lower level, its own level]; a single step
        gives [0, 1] (the paper's two-step variant; algorithm.md, section 9).
        """
        sigmas = (*self.rollout.sigmas, 0.0)
        low = max(sigmas[step + 1], self.config.min_sigma)
        return low, min(sigmas[step], self.config.max_sigma)

    def _tau(self, n: int, step: int, like: torch.Tensor, rng: Rng) -> torch.Tensor:
        low, high = self.interval(step)
        return low + (high - low) * uniform(n, like, rng)

    def _skip(self, frames: int, rng: Rng) -> int:
        """Number of the first chunk that gets gradients: 1, or a random one of a longer clip."""
        if self.stretch is None or frames <= self.stretch:
            return 1
        geometry = self.rollout.geometry
        return 1 + choose(geometry.chunks(frames) - geometry.chunks(self.stretch) + 1, rng)

    def _frames(self, frames: int, skip: int) -> slice:
        """The stretch whose chunks begin with number `skip`; as many frames before it as an image
        has stand where the image stands in a clip of that length."""
        geometry = self.rollout.geometry
        begin = geometry.start(skip) - geometry.first
        return slice(begin, min(frames, begin + (self.stretch or frames)))

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        """Two-phase step: dL_G/dx through the frozen discriminator, then the replay carries it."""
        first = self.rollout.geometry.first
        frames = batch.latents.shape[2]
        whole_text = self.conditioner(batch.captions, frames)
        recorded, step = self.self_rollout(batch.latents, whole_text, rng)
        skip = self._skip(frames, rng)
        seen = self._frames(frames, skip)
        text, real_x = whole_text[:, seen], batch.latents[:, :, seen]
        x = recorded.x0[:, :, seen]
        loss, fake, dx = self.direction(x, real_x, text, step, rng)
        out = replay(self.rollout, recorded, whole_text, skip, seen.stop)
        surrogate = (out * dx[:, :, first:]).sum()
        # Worth the loss, with the gradient of the surrogate: logs show what is minimised.
        total = loss + surrogate - surrogate.detach()
        return total, {"loss": loss, "fake_logit": fake.mean()}

    def direction(
        self, x: torch.Tensor, real_x: torch.Tensor, text: torch.Tensor, step: int, rng: Rng
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The generator's loss on a clip x [B, C, F, H, W] that it left at `step`, the clip's
        logits, and the loss's gradient in x; none of them with a graph."""
        x = x.detach().requires_grad_()
        tau = self._tau(len(x), step, x, rng)
        noise = randn(x.shape, x, rng)
        # The discriminator is differentiable to its input here, its weights are not asked for.
        fake = self.discriminator(add_noise(x, noise, tau), tau, text)
        if self.config.loss == "relativistic":
            with torch.no_grad():
                real = self.discriminator(add_noise(real_x, noise, tau), tau, text)
            loss = relativistic_loss(fake, real)
        else:
            loss = generator_adversarial_loss(fake)
        (dx,) = torch.autograd.grad(loss, x)
        return loss.detach(), fake.detach(), dx

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        """The discriminator's loss as one graph of all passes."""
        x, tau, text = self._judged(batch, rng)
        tau, text = torch.cat([tau, tau]), torch.cat([text, text])
        logits = [self.discriminator(pair, tau, text).chunk(2) for pair in x]
        return self._critic_loss([logit for pair in logits for logit in pair])

    def critic_parts(self, batch: Batch, rng: Rng) -> Iterator[Loss]:
        """`critic_loss` in parts, each to be back-propagated before the next is asked for.

        A part has the graph of one group of passes; the other logits are constants in it. So the
        parts' gradients add up to that of the loss, by the chain rule: dL = sum_i dL/dl_i dl_i.
        The last part has the logs.
        """
        groups, ahead = self.config.turns()
        if len(groups) == 1:
            yield self.critic_loss(batch, rng)
            return
        x, tau, text = self._judged(batch, rng)
        inputs = [half for pair in x for half in pair.chunk(2)]
        # What is unknown and not in `ahead` moves the loss's value alone: a constant will do.
        logits = [torch.zeros((), device=tau.device)] * len(inputs)
        with torch.no_grad():
            for i in ahead:
                logits[i] = self.discriminator(inputs[i], tau, text)
        for group in groups:
            for i in group:
                logits[i] = self.discriminator(inputs[i], tau, text)
            loss, logs = self._critic_loss(logits)
            yield loss, logs if group == groups[-1] else {}
            for i in group:
                logits[i] = logits[i].detach()

    def _judged(
        self, batch: Batch, rng: Rng
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """What the discriminator is shown: real clips and generated ones noised, [2 B, C, F, H, W],
        and the same perturbed if that is punished; their noise levels [B] and text."""
        frames = batch.latents.shape[2]
        text = self.conditioner(batch.captions, frames)
        recorded, step = self.self_rollout(batch.latents, text, rng)
        seen = self._frames(frames, self._skip(frames, rng))
        text, real_x, fake_x = text[:, seen], batch.latents[:, :, seen], recorded.x0[:, :, seen]
        del recorded  # its K and V, gigabytes at full size, are for the generator's step alone
        tau = self._tau(len(real_x), step, real_x, rng)
        noise = randn(real_x.shape, real_x, rng)
        both = torch.cat([real_x, fake_x])
        x_tau = add_noise(both, torch.cat([noise, noise]), torch.cat([tau, tau]))
        if not self.config.penalty_weight:
            return [x_tau], tau, text
        drawn = randn((2, *real_x.shape), x_tau, rng, dim=1).flatten(0, 1)
        return [x_tau, x_tau + self.config.penalty_sigma * drawn], tau, text

    def _critic_loss(self, logits: list[torch.Tensor]) -> Loss:
        """logits: of real and generated clips, then of the perturbed ones if there are any."""
        real, fake, *near = logits
        penalty = torch.zeros((), device=real.device)
        if near:
            penalty = approximate_penalty(real, near[0]) + approximate_penalty(fake, near[1])
        if self.config.loss == "relativistic":
            loss = relativistic_loss(real, fake)
        else:
            loss = discriminator_loss(real, fake)
        logs = {
            "critic": loss.detach(),
            "penalty": penalty.detach(),
            "gap": (real.mean() - fake.mean()).detach(),
            "real_logit": real.detach().mean(),
            "accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()).detach() / 2,
        }
        return loss + self.config.penalty_weight * penalty, logs

    def heldout_gap(
        self, real: torch.Tensor, fake: torch.Tensor, captions: list[list[str]], together: int = 32
    ) -> torch.Tensor:
        """`heldout_gap` on the last step's interval."""
        interval = self.interval(len(self.rollout.sigmas) - 1)
        return heldout_gap(
            self.discriminator, self.conditioner, real, fake, captions, interval, together
        )


@torch.no_grad()
def heldout_gap(
    discriminator: Discriminator,
    conditioner: Conditioner,
    real: torch.Tensor,
    fake: torch.Tensor,
    captions: list[list[str]],
    interval: tuple[float, float],
    together: int = 32,
    given: int = 0,
) -> torch.Tensor:
    """Mean logit of real clips minus that of generated ones, both [B, C, F, H, W].

    Neither may have been trained on. The clips take turns at five noise levels spread over the
    interval, real and generated at the same noise: a gap near 0 says that the discriminator has
    nothing to teach yet, a large one that it wins on details (docs/log.md).
    together: clips judged at once, twice that many in memory. given: first frames shown clean.
    """
    low, high = interval
    turn = torch.arange(len(real), device=real.device) % 5
    tau = low + (high - low) * (0.1 + 0.2 * turn)
    rng = torch.Generator(device=real.device).manual_seed(0)
    gaps = []
    for start in range(0, len(real), together):
        index = slice(start, start + together)
        text = conditioner(captions[index], real.shape[2])
        noise = randn(real[index].shape, real, rng)
        sigma = keep_clean(tau[index], real.shape[2], given)
        pair = torch.cat([add_noise(x[index], noise, sigma) for x in (real, fake)])
        logits = discriminator(pair, torch.cat([sigma, sigma]), torch.cat([text, text]))
        one, other = logits.chunk(2)
        gaps.append((one - other).flatten(1).mean(1) if one.dim() > 1 else one - other)
    return torch.cat(gaps).mean()
