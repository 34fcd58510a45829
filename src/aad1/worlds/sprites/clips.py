"""Clips of a seed: states drawn by lot, and their frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aad1.data.batch import Clips
from aad1.errors import UserError
from aad1.worlds.sprites.config import SpritesConfig
from aad1.worlds.sprites.lots import clip_keys
from aad1.worlds.sprites.shapes import draw_sprite
from aad1.worlds.sprites.state import SpritesState, draw_state
from aad1.worlds.sprites.texture import draw_texture

_FRAMES_AT_ONCE = 1024  # keeps the working set of the renderer near 100 MB
_FRAMES_AT_ONCE_ON_CUDA = 4096  # four times that: launches take as long for few frames as for many


def draw(
    config: SpritesConfig,
    count: int,
    *,
    seed: int | torch.Generator,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Clips, SpritesState]:
    """Draws clips start .. start + count - 1 of a seed.

    seed: an int, or a CPU generator from which one is drawn.
    Returns the clips (uint8 [count, frames, size, size, 3] on the device) and their exact state.
    Raises UserError for a count or start below what makes sense.
    """
    if count < 1:
        raise UserError(f"the number of clips must be at least 1, got {count}")
    if start < 0:
        raise UserError(f"the first clip's index must be at least 0, got {start}")
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    state, captions = draw_state(config, clip_keys(seed, start, count))
    clips = Clips(
        video=render(config, state, device=device),
        captions=[[caption] * config.num_chunks for caption in captions],
    )
    return clips, state


def batches(
    config: SpritesConfig, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
) -> Iterator[Clips]:
    """Draws endless batches: clips 0 .. batch_size - 1 of the seed, then the next ones."""
    start = 0
    while True:
        yield draw(config, batch_size, seed=seed, start=start, device=device)[0]
        start += batch_size


def render(
    config: SpritesConfig, state: SpritesState, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws the frames of a state: uint8 [B, T, size, size, 3] on the device."""
    batch, frames = state.camera.shape[:2]
    video = torch.empty(
        batch, frames, config.size, config.size, 3, dtype=torch.uint8, device=device
    )
    most = _FRAMES_AT_ONCE
    if video.is_cuda:
        # All at once and first of all: the host waits for a copy that it makes in between.
        state, most = state.to(device), _FRAMES_AT_ONCE_ON_CUDA
    clips_at_once = max(1, most // frames)
    for first in range(0, batch, clips_at_once):
        part = slice(first, min(first + clips_at_once, batch))
        image = draw_texture(config, state, part, device)
        for sprite in range(state.color.shape[1]):
            draw_sprite(config, state, part, sprite, image)
        pixels = image.mul_(255.0).add_(0.5).to(torch.uint8)
        video[part] = pixels.view(-1, frames, config.size, config.size, 3)
    return video
