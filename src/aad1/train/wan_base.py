"""What the data commands and the training of Wan share: a clip's size, text encoded once.

A base folder is whatever `aad1.models.checkpoints.find_parts` finds Wan's weights in.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.data.text_store import TextStore
from aad1.errors import UserError
from aad1.models.codec import latent_frames
from aad1.models.text import TextEncoder
from aad1.models.umt5 import Umt5Encoder

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
"""Of Wan 2.1's codec."""
_PATCH = 2
"""Wan's transformer takes patches of 2x2 latents, so sizes are multiples of 2 x 8 pixels."""

LoadText = Callable[[], TextEncoder]


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """What a clip is: pixels, video frames, frames a second."""

    width: int = 832
    height: int = 480
    frames: int = 81
    fps: float = 16.0

    def latent(
        self, temporal_stride: int = TEMPORAL_STRIDE, spatial_stride: int = SPATIAL_STRIDE
    ) -> tuple[int, int, int]:
        """(F, h, w) in latent space; UserError unless codec and patches divide the size."""
        step = _PATCH * spatial_stride
        for name in ("width", "height"):
            size = getattr(self, name)
            if size < 1 or size % step:
                low = max(size // step * step, step)
                near = f"{low} or {low + step}" if low < size else f"{low}"
                raise UserError(f"{name} must be a multiple of {step}, got {size}; use {near}")
        frames = latent_frames(self.frames, temporal_stride)
        return frames, self.height // spatial_stride, self.width // spatial_stride


def check_frames(frames: int) -> None:
    """UserError unless so many video frames are a picture and whole chunks, as training takes."""
    geometry = ChunkGeometry()
    picture = 1 + TEMPORAL_STRIDE * (geometry.first - 1)
    unit = TEMPORAL_STRIDE * geometry.chunk
    chunks, rest = divmod(frames - picture, unit)
    if chunks < 1 or rest:
        low = picture + unit * max(chunks, 1)
        near = f"nearest are {low} and {low + unit}" if chunks >= 1 else f"nearest is {low}"
        raise UserError(
            f"--frames must be {picture} + {unit} n, a picture and n chunks, got {frames}; the "
            f"{near}"
        )


def load_text_encoder(base: Path, device: torch.device) -> TextEncoder:
    """Wan's UMT5; 11 GB in bfloat16, so drop it as soon as the prompts are encoded."""
    return Umt5Encoder.from_pretrained(base, device=device)


def store_prompts(
    folder: Path, prompts: Sequence[str], load_text: LoadText, *, negative: str, encoder: str
) -> TextStore:
    """Embed the negative prompt and those of the prompts that `folder` has not yet.

    load_text is called only if there are any; the encoder is gone when this returns.
    encoder: what tells its weights from others. UserError if `folder` was begun differently.
    """
    wanted = [negative, *prompts]
    if (folder / "index.json").exists():
        store = TextStore(folder)
        store = TextStore.create(
            folder, length=store.length, dim=store.dim, negative=negative, encoder=encoder
        )
        if not store.missing(wanted):
            return store
    text = load_text()
    store = TextStore.create(
        folder, length=text.length, dim=text.dim, negative=negative, encoder=encoder
    )
    store.add(wanted, text)
    del text
    gc.collect()
    return store
