"""Stage I: ODE initialisation of the causal student from the teacher's trajectories.

    L_ODE = E || G(z_t, x~_ctx,t, c) - S_ODE(z_t, x~_ctx,t, c) ||^2

The student sees states of one recorded teacher trajectory, each chunk at a noise level drawn
from {its own sampling levels, 0} (Diffusion-Forcing context), block-causally; it regresses the
trajectory's end point on the chunks that are not clean already. The image is always clean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aad1.core.chunks import ChunkGeometry, block_causal, parallel_chunks
from aad1.core.flow import x0_from_velocity
from aad1.core.transfer import upload
from aad1.errors import UserError
from aad1.models.dit import WanTransformer
from aad1.stages.base import Batch, Conditioner, Loss, Rng, integers


@dataclass(frozen=True, kw_only=True)
class OdeInitConfig:
    """Regression on teacher trajectories."""

    context: str = "diffusion_forcing"
    """"diffusion_forcing": context at the levels drawn for its own chunks (paper);
    "teacher_forcing": every chunk noisy, its context the clean end point."""

    def __post_init__(self) -> None:
        if self.context not in ("diffusion_forcing", "teacher_forcing"):
            raise UserError(
                f'context must be "diffusion_forcing" or "teacher_forcing", got {self.context!r}'
            )


class OdeInit:
    """Regression of the causal student on recorded trajectories."""

    critic_updates = 0

    def __init__(
        self,
        generator: WanTransformer,
        conditioner: Conditioner,
        geometry: ChunkGeometry,
        sigmas: tuple[float, ...],
        config: OdeInitConfig,
    ) -> None:
        self.generator, self.conditioner = generator, conditioner
        self.geometry, self.sigmas, self.config = geometry, sigmas, config

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": list(self.generator.parameters())}

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        states = batch.trajectory
        if states is None or states.shape[1] != len(self.sigmas) + 1:
            got = None if states is None else states.shape[1]
            raise UserError(
                f"stage I needs trajectories of {len(self.sigmas)} level(s) and the end point, "
                f"got {got} states"
            )
        frames = states.shape[3]
        text = self.conditioner(batch.captions, frames)
        if self.config.context == "teacher_forcing":
            loss = self._teacher_forcing(states, text, rng)
        else:
            loss = self._diffusion_forcing(states, text, rng)
        return loss, {"loss": loss.detach()}

    def _levels(self, states: torch.Tensor, clean: bool, rng: Rng) -> torch.Tensor:
        """State index per frame [B, F], one per chunk; len(sigmas) is the clean end point."""
        chunks = self.geometry.chunks(states.shape[3])
        index = integers(len(self.sigmas) + int(clean), (len(states), chunks), states, rng)
        index[:, 0] = len(self.sigmas)
        sizes = torch.tensor([self.geometry.size(i) for i in range(chunks)])
        sizes = upload(sizes, index.device)
        # Told how long the result is, it need not ask the device.
        return index.repeat_interleave(sizes, dim=1, output_size=states.shape[3])

    def _select(
        self, states: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen state of every frame [B, C, F, H, W] and its sigma [B, F]."""
        b, _, c, f, h, w = states.shape
        gather = index.view(b, 1, 1, f, 1, 1).expand(b, 1, c, f, h, w)
        table = upload(torch.tensor([*self.sigmas, 0.0]), states.device)
        return states.gather(1, gather)[:, 0], table[index]

    def _diffusion_forcing(
        self, states: torch.Tensor, text: torch.Tensor, rng: Rng
    ) -> torch.Tensor:
        frames = states.shape[3]
        index = self._levels(states, True, rng)
        x_t, sigma = self._select(states, index)
        plan = block_causal(self.geometry, frames)
        x0 = x0_from_velocity(x_t, self.generator(x_t, sigma, text, plan=plan), sigma)
        error = ((x0 - states[:, -1]) ** 2).mean(dim=(1, 3, 4))
        noisy = (sigma > 0).float()
        # Per clip, then over clips: the same however a batch is split.
        return ((error * noisy).sum(1) / noisy.sum(1).clamp_min(1)).mean()

    def _teacher_forcing(self, states: torch.Tensor, text: torch.Tensor, rng: Rng) -> torch.Tensor:
        frames, first = states.shape[3], self.geometry.first
        x_t, sigma = self._select(states, self._levels(states, False, rng))
        clean = states[:, -1]
        zero = torch.zeros(len(states), device=states.device)
        past = self.generator.keys_values(
            clean, zero, text, plan=block_causal(self.geometry, frames)
        )
        plan = parallel_chunks(self.geometry, frames, frames, 1)
        x_t, sigma = x_t[:, :, first:], sigma[:, first:]
        v = self.generator(x_t, sigma, text[:, first:], plan=plan, past=past)
        return ((x0_from_velocity(x_t, v, sigma) - clean[:, :, first:]) ** 2).mean()

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        raise NotImplementedError("stage I has no critic")
