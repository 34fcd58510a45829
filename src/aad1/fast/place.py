"""Where one chunk of a pass stands in the cache: what it reads there, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aad1.core.kv_cache import KV
from aad1.fast.slots import Slots
from aad1.models.dit import attend


@dataclass(frozen=True)
class Part:
    """One chunk in a pass: where it stands, its noise level, and its prompt's K and V by layer."""

    start: int
    size: int
    sigma: float
    text: list[KV]


class Place:
    """Where one chunk of a pass stands in the cache."""

    def __init__(self, slots: Slots, part: Part, keep: bool) -> None:
        """keep: its K and V are those that later chunks read."""
        self.slots, self.part = slots, part
        where = (part.start, part.size)
        self.own = slots.table(*where)
        self.store = slots.store_table(*where) if keep else None
        self.raw = slots.raw_table(*where) if keep else None
        self.runs = slots.own(*where)
        self.filled = slots.filled(*where)

    def direct(self, layer: int) -> KV | None:
        """Views of the chunk's slots, if they lie side by side."""
        if len(self.runs) > 1:
            return None
        (a, b), s = self.runs[0], self.slots
        return s.k[layer, :, a:b], s.v[layer, :, a:b]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Copy K and V [B, F, L, N, head_dim] into the chunk's slots, or K alone."""
        at = 0
        for a, b in self.runs:
            self.slots.k[layer, :, a:b].copy_(k[:, at : at + b - a])
            if v is not None:
                self.slots.v[layer, :, a:b].copy_(v[:, at : at + b - a])
            at += b - a

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        k, v = (m[layer, :, : self.filled].flatten(1, 2) for m in (self.slots.k, self.slots.v))
        return attend(q.flatten(1, 2), k, v).unflatten(1, q.shape[1:3])

    def keep_sink(self, layer: int, raw: torch.Tensor | None) -> None:
        """Keep the time channels of new sink frames as they are before rotation."""
        if self.raw is not None and raw is not None:
            sink, start = self.slots.sink_raw[layer], self.part.start
            new = raw[:, : sink.shape[1] - start, ..., : sink.shape[-1]]
            sink[:, start : start + new.shape[1]].copy_(new)
