"""What the stages share: a batch, prompts turned into text, and the networks' roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from aad1.core.chunks import ChunkGeometry
from aad1.core.transfer import upload
from aad1.rollout.stream import Noise, Recorded, Rollout, RolloutFn, record

Logs = dict[str, torch.Tensor]
Loss = tuple[torch.Tensor, Logs]


@dataclass(frozen=True)
class Batch:
    """Training clips in latent space.

    latents: [B, C, F, H, W]; captions: one per chunk of every clip. trajectory: stage I only,
    the teacher's states at the student's noise levels and its end point,
    [B, levels + 1, C, F, H, W].
    """

    latents: torch.Tensor
    captions: list[list[str]]
    trajectory: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with changed tensors; a trajectory's end point stays a view of it."""
        if self.trajectory is None:
            return Batch(change(self.latents), self.captions)
        trajectory = change(self.trajectory)
        return Batch(trajectory[:, -1], self.captions, trajectory)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """On a device, in float32."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking).float())


class TextEncoder(Protocol):
    """Prompts -> text rows [n, S, D]; rows past a prompt's end are zero."""

    def __call__(self, prompts: list[str], /) -> torch.Tensor: ...


class Conditioner:
    """Per-chunk captions -> text per frame, each distinct prompt encoded once."""

    def __init__(self, encoder: TextEncoder, geometry: ChunkGeometry) -> None:
        self.encoder, self.geometry = encoder, geometry

    def __call__(self, captions: list[list[str]], frames: int) -> torch.Tensor:
        """[B, frames, S, D]; every frame of a chunk carries its chunk's prompt."""
        unique = sorted({c for clip in captions for c in clip})
        rows = self.encoder(unique)
        number = {c: i for i, c in enumerate(unique)}
        chunks = self.geometry.chunks(frames)
        index = torch.tensor(
            [
                [
                    number[clip[min(i, len(clip) - 1)]]
                    for i in range(chunks)
                    for _ in range(self.geometry.size(i))
                ]
                for clip in captions
            ]
        )
        return rows[upload(index, rows.device)]

    def null(self, like: torch.Tensor) -> torch.Tensor:
        """The empty prompt in the shape of `like`: zero rows, as padding is."""
        return torch.zeros_like(like)


class Stage(Protocol):
    """One training objective: the loop knows nothing else about a stage."""

    critic_updates: int
    """Critic updates per generator update; 0 for stages without a critic."""

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: "generator", and if there is a critic "critic", "critic_heads"."""
        ...

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss: ...

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss: ...


@runtime_checkable
class InParts(Protocol):
    """A stage whose critic's loss need not be one graph."""

    def critic_parts(self, batch: Batch, rng: Rng) -> Iterator[Loss]:
        """Losses whose gradients add up to that of `critic_loss`; each is back-propagated before
        the next is asked for. The logs of all are those of `critic_loss`."""
        ...


def noise_from(tensor: torch.Tensor, geometry: ChunkGeometry) -> Noise:
    """Noise drawn ahead for a whole clip, [steps, B, C, F - first, H, W], chunk by chunk."""

    def draw(chunk: int, step: int) -> torch.Tensor:
        start = geometry.start(chunk) - geometry.first
        return tensor[step][:, :, start : start + geometry.size(chunk)]

    return draw


def roll_out(
    rollout: Rollout,
    image: torch.Tensor,
    text: torch.Tensor,
    noise: torch.Tensor,
    exit_step: int | None = None,
) -> Recorded:
    """`record` on noise drawn ahead; the default `RolloutFn`."""
    frames = rollout.geometry.first + noise.shape[3]
    return record(rollout, image, text, noise_from(noise, rollout.geometry), frames, exit_step)


class SelfRollout:
    """The generator on its own outputs from a batch's first frames (Self-Forcing)."""

    def __init__(self, rollout: Rollout, run: RolloutFn = roll_out) -> None:
        self.rollout, self.run = rollout, run

    def __call__(self, latents: torch.Tensor, text: torch.Tensor, rng: Rng) -> tuple[Recorded, int]:
        """A recorded rollout as long as `latents`, and its exit step."""
        first, sigmas = self.rollout.geometry.first, self.rollout.sigmas
        b, c, f, h, w = latents.shape
        noise = randn((len(sigmas), b, c, f - first, h, w), latents, rng, dim=1)
        step = len(sigmas) - 1
        if len(sigmas) > 1:
            step = choose(len(sigmas), rng)
        return self.run(self.rollout, latents[:, :, :first], text, noise, step), step


class SampleNoise:
    """Random numbers of a micro-batch: one generator per sample, and one for what all share.

    A sample's numbers hang on its own seed alone, so they stay the same however a batch is split
    over micro-batches and processes. They are drawn on the CPU: the same on every machine.
    device: draws them there instead, for small networks on a fast GPU, where drawing on the CPU
    takes longer than the step; another kind of device then gives other numbers.
    """

    def __init__(
        self, seeds: Sequence[int], shared: int, device: torch.device | str = "cpu"
    ) -> None:
        self.samples = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.shared = torch.Generator().manual_seed(shared)


Rng = torch.Generator | SampleNoise
"""What a loss draws from: `SampleNoise` in training; a plain generator where batches are whole."""


def randn(shape: Sequence[int], like: torch.Tensor, rng: Rng, dim: int = 0) -> torch.Tensor:
    """Standard normal noise of the dtype and on the device of `like`; samples along `dim`."""
    if isinstance(rng, torch.Generator):
        return torch.randn(tuple(shape), generator=rng, device=like.device, dtype=like.dtype)
    rest = [*shape[:dim], *shape[dim + 1 :]]
    parts = [torch.randn(rest, generator=g, device=g.device) for g in _of(rng, shape[dim])]
    return upload(torch.stack(parts, dim), like.device, like.dtype)


def uniform(n: int, like: torch.Tensor, rng: Rng) -> torch.Tensor:
    """n numbers from U[0, 1), one a sample, float32, on the device of `like`."""
    if isinstance(rng, torch.Generator):
        return torch.rand(n, generator=rng, device=like.device)
    drawn = [torch.rand((), generator=g, device=g.device) for g in _of(rng, n)]
    return upload(torch.stack(drawn), like.device)


def integers(top: int, shape: tuple[int, int], like: torch.Tensor, rng: Rng) -> torch.Tensor:
    """Whole numbers from 0 .. top - 1, int64 [samples, each], on the device of `like`."""
    if isinstance(rng, torch.Generator):
        return torch.randint(top, shape, generator=rng, device=like.device)
    parts = [
        torch.randint(top, shape[1:], generator=g, device=g.device) for g in _of(rng, shape[0])
    ]
    return upload(torch.stack(parts), like.device)


def choose(top: int, rng: Rng) -> int:
    """One number from 0 .. top - 1 for all samples of an update, the same in every process."""
    generator = rng if isinstance(rng, torch.Generator) else rng.shared
    return int(torch.randint(top, (), generator=generator, device=generator.device))


def _of(rng: SampleNoise, n: int) -> list[torch.Generator]:
    if n != len(rng.samples):
        raise ValueError(f"noise for {n} samples was asked of {len(rng.samples)} generators")
    return rng.samples
