"""Where batches come from; a source's whole state is the number of samples consumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from aad1.core.transfer import upload
from aad1.data.shards import ClipShards
from aad1.errors import UserError
from aad1.models.codec import Codec, PixelCodec, load_codec
from aad1.models.text import vocabulary
from aad1.stages.base import Batch
from aad1.train.config import LatentData, SpritesData
from aad1.worlds import sprites


def key(*parts: object) -> int:
    """A 63-bit seed from any parts, the same in every process (Python's hash is not)."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def permuted(position: int, count: int, size: int, seed: int) -> list[int]:
    """`count` sample numbers from `position` on, each epoch a permutation of range(size)."""
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(position + len(out), size)
        generator = torch.Generator().manual_seed(key("epoch", seed, epoch))
        order = torch.randperm(size, generator=generator)
        out += order[offset : offset + count - len(out)].tolist()
    return out


class Source(Protocol):
    """Training clips in latent space."""

    def batch(self, position: int, count: int) -> Batch:
        """Samples position .. position + count - 1 of the endless stream."""
        ...


@runtime_checkable
class Stored(Source, Protocol):
    """A source on disk, which may be read ahead of the computation, in a thread of its own."""

    def read(self, position: int, count: int) -> Batch:
        """What `batch` gives, on the CPU and as it is stored."""
        ...


class World:
    """A world as training needs it: its codec, words, frame rate, training and held-out clips."""

    name: str
    codec: Codec
    words: tuple[str, ...]
    fps: float
    frames: int
    size: tuple[int, int]
    """Height and width of a video frame."""
    large = False
    """Clips too large to be rolled out many at a time, or to be captured in a CUDA graph."""

    def train(self, frames: int = 0) -> Source:
        """Training clips; frames: longer than the world's, for those that can (0: as they are)."""
        raise NotImplementedError

    def heldout(self, count: int, frames: int | None = None) -> tuple[torch.Tensor, Batch]:
        """Fixed validation clips: uint8 videos [N, T, H, W, 3] and their latents."""
        raise NotImplementedError


class SpritesWorld(World):
    """Drawn on the fly on the training device."""

    name = "sprites"
    words = sprites.WORDS
    fps = 4.0  # one frame stands for one latent frame of a 16 fps video

    def __init__(self, data: SpritesData, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = data.world, seed, device
        sample, _ = sprites.draw(data.world, 64, seed=key("codec") >> 2)
        self.codec = PixelCodec.fit(sample.video, data.stride)
        self.frames = data.world.frames
        self.size = (data.world.size, data.world.size)

    def _draw(self, config: sprites.SpritesConfig, seed: int, start: int, count: int
              ) -> tuple[torch.Tensor, Batch]:  # fmt: skip
        clips, _ = sprites.draw(config, count, seed=seed, start=start, device=self.device)
        return clips.video, Batch(self.codec.encode(clips.video), clips.captions)

    def train(self, frames: int = 0) -> Source:
        return _SpritesSource(self, replace(self.config, frames=frames or self.frames))

    def heldout(self, count: int, frames: int | None = None) -> tuple[torch.Tensor, Batch]:
        config = replace(self.config, frames=frames or self.config.frames)
        return self._draw(config, key("heldout") >> 2, 0, count)


class _SpritesSource:
    def __init__(self, world: SpritesWorld, config: sprites.SpritesConfig) -> None:
        self.world, self.config = world, config

    def batch(self, position: int, count: int) -> Batch:
        world = self.world
        return world._draw(self.config, key("train", world.seed) >> 2, position, count)[1]


class ShardSource:
    """Latents (and, for stage I, trajectories) held in memory on the training device."""

    def __init__(self, latents: torch.Tensor, captions: Sequence[Sequence[str]], seed: int,
                 device: torch.device, trajectory: bool = False) -> None:  # fmt: skip
        self.tensor = latents.to(device)
        self.captions = [list(c) for c in captions]
        self.seed, self.trajectory = seed, trajectory

    def batch(self, position: int, count: int) -> Batch:
        index = permuted(position, count, len(self.captions), self.seed)
        rows = self.tensor[upload(torch.tensor(index), self.tensor.device)].float()
        captions = [self.captions[i] for i in index]
        if self.trajectory:
            return Batch(rows[:, -1], captions, rows)
        return Batch(rows, captions)


class LatentWorld(World):
    """Clips encoded beforehand, such as doom's."""

    def __init__(self, data: LatentData, seed: int, device: torch.device) -> None:
        self.data, self.seed, self.device = data, seed, device
        self.name, self.fps = data.name, data.fps
        self.codec = load_codec(data.codec, device=device)
        self._train = ClipShards(data.train)
        self._heldout = ClipShards(data.heldout)
        self.frames = self._train.clip_shape[1]
        height, width = self._train.clip_shape[2:]
        stride = self.codec.spatial_stride
        self.size = (height * stride, width * stride)
        self.words = vocabulary({c for clip in self._train.captions for c in clip})

    def train(self, frames: int = 0) -> Source:
        if frames > self.frames:
            raise UserError(f"{self.data.train} has clips of {self.frames} frames, not {frames}")
        return ShardSource(self._train.read_tensors(), self._train.captions, self.seed, self.device)

    def heldout(self, count: int, frames: int | None = None) -> tuple[torch.Tensor, Batch]:
        if count > len(self._heldout):
            raise UserError(
                f"{self.data.heldout} holds {len(self._heldout)} clips, {count} were asked for"
            )
        if frames is not None and frames > self.frames:
            raise UserError(f"held-out clips have {self.frames} latent frames, not {frames}")
        latents = self._heldout.tensors(range(count)).to(self.device).float()
        latents = latents[:, :, : frames or self.frames]
        video = torch.cat([self.codec.decode(part) for part in latents.split(16)])
        return video, Batch(latents, self._heldout.captions[:count])


def open_world(data: SpritesData | LatentData, seed: int, device: torch.device) -> World:
    """The small world that a config describes (Wan's is `aad1.train.wan_world`)."""
    if isinstance(data, SpritesData):
        return SpritesWorld(data, seed, device)
    for folder in (data.train, data.heldout):
        if not Path(folder).is_dir():
            raise UserError(
                f"{folder} does not exist: record with `aad1 data {data.name}`, then `aad1 encode`"
            )
    return LatentWorld(data, seed, device)
