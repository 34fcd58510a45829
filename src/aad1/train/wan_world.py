"""Wan's data as training sees it: clips and trajectories from shards, text by looking it up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.transfer import upload
from aad1.data.shards import ClipShards
from aad1.data.text_store import TextStore
from aad1.errors import UserError
from aad1.model_info import FORMAT, INDEX, ModelInfo, read_info
from aad1.models.checkpoints import find_parts
from aad1.models.wan_codec import load_wan_vae
from aad1.models.weights import read_json, write_json
from aad1.stages.base import Batch, Conditioner, TextEncoder
from aad1.train.config import WanData
from aad1.train.sources import Source, World, permuted

KEPT = 128
"""Prompts whose embeddings stay in memory, without padding: at most 4 MiB each for Wan."""


class StoredText:
    """A prompt encoder that only looks up: embeddings stored beforehand, in several folders.

    length, dim: L and D of `__call__`; negative: the prompt to steer away from.
    """

    def __init__(self, stores: Sequence[TextStore], device: torch.device, base: Path) -> None:
        first = stores[0]
        for other in stores[1:]:
            for name in ("length", "dim", "negative", "encoder"):
                if getattr(other, name) != getattr(first, name):
                    raise UserError(
                        f"{other.folder} was made with {name} {getattr(other, name)!r}, "
                        f"{first.folder} with {getattr(first, name)!r}"
                    )
        self.stores, self.device, self.base = stores, device, base
        self.length, self.dim, self.negative = first.length, first.dim, first.negative
        self._rows = lru_cache(maxsize=KEPT)(self._read)

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """B prompts -> bfloat16 [B, L, D]; UserError names a prompt that is stored nowhere."""
        out = torch.zeros(len(prompts), self.length, self.dim, dtype=torch.bfloat16)
        for row, prompt in zip(out, prompts, strict=True):
            rows = self._rows(prompt)
            row[: len(rows)] = rows
        return upload(out, self.device)

    def read(self, captions: Iterable[Sequence[str]]) -> None:
        """Read the prompts of these clips, so that `__call__` finds them in memory."""
        for prompt in {c for clip in captions for c in clip}:
            self._rows(prompt)

    def _read(self, prompt: str) -> torch.Tensor:
        return self._find(prompt).rows(prompt)

    def _find(self, prompt: str) -> TextStore:
        for store in self.stores:
            if prompt in store:
                return store
        looked = ", ".join(str(store.folder) for store in self.stores)
        raise UserError(f"no embedding of the prompt {prompt!r} in {looked}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write where the encoder is: it has 5.7 billion weights and never changes."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        where = {"_class_name": "UMT5EncoderModel", "base": str(self.base.resolve())}
        write_json(Path(folder) / "config.json", where | {"length": self.length, "dim": self.dim})


class StoredConditioner(Conditioner):
    """A conditioner whose null prompt is the stored negative prompt, as Wan is guided."""

    def __init__(self, encoder: TextEncoder, geometry: ChunkGeometry, negative: str) -> None:
        super().__init__(encoder, geometry)
        self.rows = encoder([negative])

    def null(self, like: torch.Tensor) -> torch.Tensor:
        """The negative prompt in the shape of `like` [B, F, S, D] (a view)."""
        return self.rows[:, None].to(like.device, like.dtype).expand_as(like)


class ClipSource:
    """Clips read from shards as they are asked for; nothing is held in memory.

    states: numbers of a trajectory's states to hand on before its end point (stage I); None for
    clips, which of trajectories are the end points. text: where the clips' prompts are stored.
    """

    def __init__(
        self, shards: ClipShards, seed: int, device: torch.device,
        states: tuple[int, ...] | None = None, text: StoredText | None = None,
    ) -> None:  # fmt: skip
        self.shards, self.seed, self.device, self.states = shards, seed, device, states
        self.text = text

    def batch(self, position: int, count: int) -> Batch:
        return self.read(position, count).to(self.device)

    def read(self, position: int, count: int) -> Batch:
        """On the CPU, as stored; the prompts' embeddings are read too, and kept for the step."""
        batch = self._read(permuted(position, count, len(self.shards), self.seed))
        if self.text is not None:
            self.text.read(batch.captions)
        return batch

    def of(self, index: Sequence[int]) -> Batch:
        """The clips of these numbers."""
        return self._read(index).to(self.device)

    def _read(self, index: Sequence[int]) -> Batch:
        rows = self.shards.tensors(index)
        captions = [list(self.shards.captions[i]) for i in index]
        if self.states is not None:
            rows = rows[:, [*self.states, -1]]
            return Batch(rows[:, -1], captions, rows)
        if self.shards.tensor == "states":
            rows = rows[:, -1]
        return Batch(rows, captions)


class WanWorld(World):
    """Clips in Wan's latent space, with their prompts' embeddings beside them."""

    name = "wan"
    words = ()
    large = True

    def __init__(self, data: WanData, seed: int, device: torch.device) -> None:
        self.data, self.seed, self.device, self.fps = data, seed, device, data.fps
        self._heldout = _open(data.heldout, "data.heldout", "videos")
        self.codec = load_wan_vae(data.base, device=device)
        shape = self._heldout.clip_shape[-4:]
        self.frames = shape[1]
        stride = self.codec.spatial_stride
        self.size = (shape[2] * stride, shape[3] * stride)
        self.text = StoredText(_stores(data), device, data.base)

    def conditioner(self, geometry: ChunkGeometry) -> Conditioner:
        """Looks prompts up; its null prompt is the stored negative one."""
        return StoredConditioner(self.text, geometry, self.text.negative)

    def train(self, frames: int = 0) -> Source:
        if frames > self.frames:
            raise UserError(f"{self.data.train} has clips of {self.frames} frames, not {frames}")
        shards = _open(self.data.train, "data.train", "videos")
        self._fits(shards, self.data.train)
        return ClipSource(shards, self.seed, self.device, text=self.text)

    def trajectories(self, sigmas: tuple[float, ...]) -> Source:
        """Trajectories with the states at these noise levels; UserError if one is not stored."""
        folder = self.data.trajectories
        shards = _open(folder, "data.trajectories", "trajectories")
        stored = shards.manifest["config"].get("sigmas", []) if shards.tensor == "states" else []
        index = []
        for sigma in sigmas:
            near = [i for i, s in enumerate(stored) if abs(s - sigma) < 1e-6]
            if not near:
                raise UserError(f"{folder} has no states at sigma {sigma:.4f}, only at {stored}")
            index.append(near[0])
        self._fits(shards, folder)
        return ClipSource(shards, self.seed, self.device, tuple(index), self.text)

    def _fits(self, shards: ClipShards, folder: Path) -> None:
        ours, theirs = self._heldout.clip_shape[-4:], shards.clip_shape[-4:]
        if ours != theirs:
            raise UserError(
                f"{folder} has clips of {list(theirs)}, {self.data.heldout} of {list(ours)}"
            )

    def check_heldout(self, count: int) -> None:
        """UserError unless there are so many held-out clips."""
        if count > len(self._heldout):
            raise UserError(
                f"{self.data.heldout} holds {len(self._heldout)} clips, monitor.clips asks for "
                f"{count}"
            )

    @torch.no_grad()
    def heldout(self, count: int, frames: int | None = None) -> tuple[torch.Tensor, Batch]:
        self.check_heldout(count)
        batch = ClipSource(self._heldout, self.seed, self.device).of(range(count))
        batch = replace(batch, latents=batch.latents[:, :, : frames or self.frames])
        video = torch.cat([self.codec.decode(clip) for clip in batch.latents.split(1)])
        return video, batch


def describe(path: Path) -> ModelInfo:
    """What a path holds: a run's own facts; else "teacher", or "distilled" for one that is named
    a generator (Self-Forcing's .pt files)."""
    if (path / INDEX).exists() and read_json(path / INDEX).get("format") == FORMAT:
        return read_info(path)
    weights = find_parts(path).source("transformer")
    generator = any(f.weights.startswith("generator") for f, _ in weights.places.values())
    return ModelInfo(
        world="wan", width=832, height=480, fps=16.0,
        stage="distilled" if generator else "teacher", sha256=f"files-{weights.fingerprint}",
    )  # fmt: skip


def _open(folder: Path, field: str, command: str) -> ClipShards:
    if not folder.is_dir():
        raise UserError(f"{field}: {folder} does not exist; make it with `aad1 data {command}`")
    shards = ClipShards(folder)
    if shards.tensor == "video":
        raise UserError(f"{field}: {folder} holds videos, not latents; use `aad1 data videos`")
    return shards


def _stores(data: WanData) -> list[TextStore]:
    """The text embeddings beside the clips, as far as there are any."""
    folders = list(dict.fromkeys((data.train, data.heldout, data.trajectories)))
    found = [TextStore(f / "text") for f in folders if (f / "text").is_dir()]
    if not found:
        looked = ", ".join(str(f / "text") for f in folders)
        raise UserError(f"no text embeddings: looked for {looked}")
    return found
