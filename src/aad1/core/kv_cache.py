"""The rolling key/value cache of a rollout: immutable, so autograd and branching are safe.

K is stored normalised but *not* rotated. Each pass rotates what it sees at the positions that
its plan names; so a sink that moves relative to the current chunk stays exact, and no position
ever grows with the length of the video.

K and V stay in the pieces in which passes made them. States that follow each other share those that
both can see, so appending takes no memory and copies nothing, and one layer at a time is joined
where a pass reads it. A piece of which only some frames are still seen is copied, as a view of
them would hold the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

from aad1.core.chunks import ChunkGeometry

KV = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, each [B, frames, tokens per frame, heads, head_dim]."""


@dataclass(frozen=True)
class Piece:
    """K and V of some frames, for every layer."""

    frames: tuple[int, ...]
    layers: tuple[KV, ...]

    def seen(self, visible: set[int]) -> Piece:
        """The frames that are in `visible`: the piece itself, or a copy of some of it."""
        keep = [i for i, frame in enumerate(self.frames) if frame in visible]
        if len(keep) == len(self.frames):
            return self
        layers = tuple((_copy(k, keep), _copy(v, keep)) for k, v in self.layers if keep)
        return Piece(tuple(self.frames[i] for i in keep), layers)


class Layers(Sequence[KV]):
    """K and V by layer, joined when a layer is asked for."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._pieces[0].layers) if self._pieces else 0

    @overload
    def __getitem__(self, index: int) -> KV: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[KV]: ...
    def __getitem__(self, index: int | slice) -> KV | Sequence[KV]:
        numbers = range(len(self))[index]  # IndexError beyond the last
        if isinstance(numbers, range):
            return [self[i] for i in numbers]
        parts = [piece.layers[numbers] for piece in self._pieces]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)


@dataclass(frozen=True)
class KVCache:
    """K and V of the frames that later chunks can still see, for every layer."""

    pieces: tuple[Piece, ...] = ()

    @property
    def frames(self) -> tuple[int, ...]:
        """Numbers of the frames, in order."""
        return tuple(frame for piece in self.pieces for frame in piece.frames)

    @property
    def layers(self) -> Layers:
        """K and V of `frames` by layer; empty if there are no frames."""
        return Layers(self.pieces)

    def append(self, new: tuple[KV, ...], geometry: ChunkGeometry, start: int) -> KVCache:
        """A new cache with frames `start` .. added and those no later chunk sees dropped."""
        added = new[0][0].shape[1]
        pieces = (*self.pieces, Piece(tuple(range(start, start + added)), new))
        # The next chunk is never smaller than the smallest chunk, so this keeps all it may see.
        visible = set(geometry.kept(start + added, geometry.chunk))
        return KVCache(tuple(p for p in (piece.seen(visible) for piece in pieces) if p.frames))


def _copy(x: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Frames `index` of x [B, F, ...] in memory of their own."""
    return torch.cat([x[:, i : i + 1] for i in index], 1)


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
