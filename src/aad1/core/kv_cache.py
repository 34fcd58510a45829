"""The rolling key/value cache of a rollout: immutable, so autograd and branching are safe.

K is stored normalised but *not* rotated. Each pass rotates what it sees at the positions that
its plan names; so a sink that moves relative to the current chunk stays exact, and no position
ever grows with the length of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aad1.core.chunks import ChunkGeometry

KV = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, each [B, frames, tokens per frame, heads, head_dim]."""


@dataclass(frozen=True)
class KVCache:
    """K and V of the frames that later chunks can still see, for every layer."""

    frames: tuple[int, ...] = ()
    layers: tuple[KV, ...] = ()

    def append(self, new: tuple[KV, ...], geometry: ChunkGeometry, start: int) -> KVCache:
        """A new cache with frames `start` .. added and those no later chunk sees dropped."""
        added = new[0][0].shape[1]
        frames = self.frames + tuple(range(start, start + added))
        # The next chunk is never smaller than the smallest chunk, so this keeps all it may see.
        visible = set(geometry.kept(start + added, geometry.chunk))
        keep = [i for i, frame in enumerate(frames) if frame in visible]
        if not self.layers:
            layers = tuple((frames_of(k, keep), frames_of(v, keep)) for k, v in new)
        else:
            layers = tuple(
                (frames_of(torch.cat([ok, k], 1), keep), frames_of(torch.cat([ov, v], 1), keep))
                for (ok, ov), (k, v) in zip(self.layers, new, strict=True)
            )
        return KVCache(tuple(frames[i] for i in keep), layers)


def frames_of(x: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Frames `index` (in order) of x [B, F, ...], by slices: no index tensor, so no wait for the
    host, and a view where they are contiguous."""
    if list(index) == list(range(x.shape[1])):
        return x
    runs: list[list[int]] = []
    for i in index:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    parts = [x[:, a:b] for a, b in runs]
    if not parts:
        return x[:, :0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
