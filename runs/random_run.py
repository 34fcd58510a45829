"""What a training run works with, random and without files: for programs that measure."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from aad1.errors import UserError
from aad1.models.discriminator import Discriminator
from aad1.models.dit import WanTransformer
from aad1.models.text import WordEncoder, WordEncoderConfig
from aad1.stages.base import Batch, Conditioner
from aad1.train.config import Experiment, LatentData, SpritesData, WanData
from aad1.train.costs import Clip
from aad1.train.log import RunLog
from aad1.train.setup import Setup
from aad1.train.sources import ShardSource, Source, World
from aad1.train.wan_base import VideoSize

DOOM_CLIP = (16, 21, 12, 16)
"""Latents of 81 frames at 128x96."""
WORDS = ("turn", "left", "right", "walk")


class NoiseWorld(World):
    """Clips of noise in the shape of a preset's latents."""

    def __init__(self, e: Experiment, seed: int, device: torch.device) -> None:
        self.seed, self.device, self.large = seed, device, isinstance(e.data, WanData)
        self.name, self.fps, self.words = "noise", 16.0, WORDS
        self.clip: tuple[int, ...] = DOOM_CLIP
        if isinstance(e.data, WanData):
            rest = VideoSize(width=e.data.width, height=e.data.height).latent()[1:]
            self.clip = (e.model.in_channels, e.data.frames, *rest)
        self.frames, (height, width) = self.clip[1], self.clip[2:]
        self.codec: Any = SimpleNamespace(latent_channels=self.clip[0], spatial_stride=8)
        self.size = (8 * height, 8 * width)

    def train(self, frames: int = 0) -> Source:
        if frames > self.frames:
            raise UserError(f"clips of noise have {self.frames} frames, not {frames}")
        return self.source()

    def source(self, states: int = 0) -> Source:
        """Clips, or trajectories of so many states; a few of them, again and again."""
        count = 4 if self.large else 256
        shape = (count, states, *self.clip) if states else (count, *self.clip)
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
        captions = [[WORDS[i % len(WORDS)]] for i in range(count)]
        if self.large:
            return OnDisk(rows, captions, self.device)
        return ShardSource(rows, captions, self.seed, self.device, trajectory=bool(states))


class OnDisk:
    """Clips as from a disk: what `aad1.train.reader` reads ahead and copies."""

    def __init__(self, rows: torch.Tensor, captions: list[list[str]], device: torch.device) -> None:
        self.rows, self.captions, self.device = rows, captions, device

    def read(self, position: int, count: int) -> Batch:
        index = [(position + i) % len(self.rows) for i in range(count)]
        rows, captions = self.rows[index], [self.captions[i] for i in index]
        return Batch(rows[:, -1], captions, rows) if rows.dim() == 6 else Batch(rows, captions)

    def batch(self, position: int, count: int) -> Batch:
        return self.read(position, count).to(self.device)


class RandomSetup(Setup):
    """What a run works with, of random weights and without files."""

    def _small_world(self, data: SpritesData | LatentData) -> World:
        if isinstance(data, SpritesData):
            return super()._small_world(data)
        return NoiseWorld(self.experiment, self.experiment.seed, self.device)

    def _network(self) -> WanTransformer:
        e, channels = self.experiment, self.world.codec.latent_channels
        with self.device:
            return WanTransformer(replace(e.model, in_channels=channels, out_channels=channels))

    def _from_parent(self) -> None:
        e = self.experiment
        self.generator = self._network()
        shape = WordEncoderConfig(
            words=self.world.words, length=e.text_length, dim=self.generator.config.text_dim
        )
        self.text = WordEncoder(shape).to(self.device).requires_grad_(False)

    def _from_wan(self, data: WanData) -> None:
        e = self.experiment
        self.world = NoiseWorld(e, e.seed, self.device)
        self.generator = self._network()
        rows = torch.randn(e.text_length, e.model.text_dim, device=self.device).bfloat16()
        self.conditioner = Conditioner(
            lambda prompts: rows.expand(len(prompts), -1, -1), e.geometry
        )

    def teacher_network(self, *, trained: bool) -> WanTransformer:
        network = self._network().requires_grad_(trained)
        cast = self.world.large and self.bf16 and not trained  # as Wan's is loaded
        return network.cast(torch.bfloat16) if cast else network

    def clip(self) -> Clip:
        """What `aad1.train.costs` counts with."""
        _, p, q = self.generator.config.patch_size
        height, width = (side // self.world.codec.spatial_stride for side in self.world.size)
        return Clip(self.world.frames, height // p * (width // q), self.experiment.text_length)

    def _discriminator(self) -> Discriminator:
        e = self.experiment
        return Discriminator(self._network(), e.discriminator, e.geometry).to(self.device)

    def _trajectories(self, log: RunLog) -> Source:
        states = len(self.experiment.sigmas) + 1
        if isinstance(self.world, NoiseWorld):
            return self.world.source(states)
        drawn = self.world.train().batch(0, 256)
        rows = drawn.latents[:, None].expand(-1, states, -1, -1, -1, -1).half()
        return ShardSource(rows, drawn.captions, self.experiment.seed, self.device, trajectory=True)
