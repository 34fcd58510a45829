"""The K/V cache as fixed memory: slots written in place, read as one prefix, never moved.

Frame f has slot f while it is a sink frame and a slot of a ring of window - sink slots otherwise.
The ring holds a chunk's visible past *and* the chunk itself: its own K and V are written where the
frames lie that it no longer sees. So the keys of every pass are the first `n` slots, in an order
that softmax does not care about, and a pass that repeats a chunk (cache pass, further steps)
overwrites what the one before it wrote.

K carries its rotation. Where it is read once (`one_past_chunk`), the cache pass stores it rotated
as the next chunk will read it: positions stay below the window, the sink's at 0 .. sink - 1. With
longer windows K is kept at positions that count on, the queries move with them, and only the sink
is rotated anew for each chunk: differences are all that attention sees. Before a position reaches
`LIMIT` the ring is turned back (`Slots.prepare`), each K at most once in its life.
"""

from __future__ import annotations

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.rope import axis_dims, rope_table
from aad1.fast.config import one_past_chunk
from aad1.fast.ops import Table, rotate_pairs
from aad1.models.dit import WanConfig

LIMIT = 1024
"""Positions stay below this, the longest that Wan's own tables hold."""


class Positions:
    """RoPE tables for runs of positions below LIMIT, made on the device without waiting for it."""

    def __init__(self, config: WanConfig, grid: tuple[int, int], device: torch.device) -> None:
        rows, columns = grid
        self.tokens = rows * columns
        hd = config.attention_head_dim
        self.time_pairs = axis_dims(hd)[0] // 2
        """Channel pairs of a head that turn with time; they come first."""
        times = rope_table(tuple(range(LIMIT)), 1, 1, hd, config.rope_theta, device)
        space = rope_table((0,), rows, columns, hd, config.rope_theta, device)
        self._time = tuple(x[:, 0, 0, : self.time_pairs] for x in times)  # [LIMIT, pairs]
        self._space = tuple(x[0, :, 0, self.time_pairs :] for x in space)  # [L, pairs]
        self._kept: dict[tuple[int, ...], Table] = {}

    def table(self, positions: tuple[int, ...], keep: bool) -> Table:
        """cos and sin for frames at those positions, [frames, L, 1, head_dim / 2].

        keep: for positions that will come again.
        """
        if positions in self._kept:
            return self._kept[positions]
        cos, sin = (
            torch.cat(
                [
                    torch.stack([time[p] for p in positions])[:, None].expand(-1, self.tokens, -1),
                    space.expand(len(positions), -1, -1),
                ],
                -1,
            )[:, :, None]
            for time, space in zip(self._time, self._space, strict=True)
        )
        if keep:
            self._kept[positions] = (cos, sin)
        return cos, sin

    def turn(self, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Turn the time channels x [..., frames, L, N, 2 pairs] on by `positions` (may be < 0)."""
        runs = [abs(p) for p in positions]
        cos, sin = (torch.stack([t[r] for r in runs])[:, None, None] for t in self._time)
        if any(p < 0 for p in positions):
            sin = -sin  # all are of one sign
        return rotate_pairs(x, (cos, sin)).to(x.dtype)


class Slots:
    """Cache of one rollout: fixed K and V of every layer, and where the rollout stands."""

    def __init__(
        self,
        config: WanConfig,
        geometry: ChunkGeometry,
        batch: int,
        grid: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.geometry, self.grid = geometry, grid
        self.fixed = one_past_chunk(geometry)
        self.ring = geometry.window - geometry.sink
        self.positions = Positions(config, grid, device)
        heads, hd = config.num_attention_heads, config.attention_head_dim
        tokens = grid[0] * grid[1]
        shape = (config.num_layers, batch, geometry.window, tokens, heads, hd)
        self._time = 2 * self.positions.time_pairs
        sink_shape = (config.num_layers, batch, geometry.sink, tokens, heads, self._time)
        with torch.inference_mode(False):  # written in place later, in whatever mode
            self.k = torch.zeros(shape, device=device, dtype=dtype)
            """[layers, B, slots, L, N, head_dim], rotated."""
            self.v = torch.zeros_like(self.k)
            self.sink_raw = torch.zeros(sink_shape, device=device, dtype=dtype)
            """Time channels of the sink's K before rotation; used where positions count on."""
        self.reset()

    def reset(self) -> None:
        """Back to the start of a video; old contents are overwritten before they are read."""
        self.base = 0
        """Position 0 in frames of the video; moves only where positions count on."""
        self._sink_shift: int | None = 0

    # -- where things are -----------------------------------------------------------------

    def own(self, start: int, size: int) -> list[tuple[int, int]]:
        """Runs [a, b) of the slots of frames start .. start + size - 1, in their order."""
        sink = self.geometry.sink
        runs: list[tuple[int, int]] = []
        for f in range(start, start + size):
            slot = f if f < sink else sink + (f - sink) % self.ring
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return runs

    def filled(self, start: int, size: int) -> int:
        """Slots that a chunk sees, itself included: the first so many."""
        return min(self.geometry.window, start + size)

    def _visible(self, start: int, size: int) -> int:
        return len(self.geometry.kept(start, size))

    def _own_positions(self, start: int, size: int) -> tuple[int, ...]:
        first = self._visible(start, size) if self.fixed else start - self.base
        return tuple(range(first, first + size))

    def table(self, start: int, size: int) -> Table:
        """Where the chunk's queries and keys stand during its passes; every video has a start."""
        return self.positions.table(self._own_positions(start, size), self.fixed or not start)

    def store_table(self, start: int, size: int) -> Table | None:
        """Where the next chunk reads the keys of this one; None if they stand there already."""
        if not self.fixed:
            return None
        own = self._own_positions(start, size)
        seen = self.geometry.kept(start + size, self.geometry.chunk)
        then = tuple(
            seen.index(f) if f in seen else p
            for f, p in zip(range(start, start + size), own, strict=True)
        )
        return None if then == own else self.positions.table(then, keep=True)

    def raw_table(self, start: int, size: int) -> Table | None:
        """For the time channels of new sink frames before rotation; None if there are none."""
        if self.fixed or start >= self.geometry.sink:
            return None
        return self.positions.table((0,) * size, keep=True)

    # -- before a chunk -------------------------------------------------------------------

    def prepare(self, start: int, size: int, end: int) -> None:
        """Before a pass over frames start .. end - 1 whose first chunk has `size` frames: turn the
        ring back if a position would reach the limit."""
        if self.fixed or end - self.base <= LIMIT:
            return
        base = start - self._visible(start, size)
        ring = self.k[:, :, self.geometry.sink :, ..., : self._time]
        ring.copy_(self.positions.turn(ring, [self.base - base] * ring.shape[2]))
        self.base = base
        self._sink_shift = None

    def turn_sink(self, start: int, size: int, layer: int | None = None) -> None:
        """Rotate the sink to where the chunk expects it, in one layer or in all of them.

        All at once: only if the chunk moved on since the last time.
        """
        count = min(self.geometry.sink, start)
        shift = start - self._visible(start, size) - self.base
        if self.fixed or not count or (layer is None and shift == self._sink_shift):
            return
        at = slice(None) if layer is None else slice(layer, layer + 1)
        moved = [i + shift for i in range(count)]
        turned = self.positions.turn(self.sink_raw[at, :, :count], moved)
        self.k[at, :, :count, ..., : self._time] = turned
        self._sink_shift = shift

    # -- going back -----------------------------------------------------------------------

    def turn_slot(self, slot: int, positions: int) -> None:
        """Turn the keys in a slot of the ring on by so many positions (may be < 0)."""
        keys = self.k[:, :, slot : slot + 1, ..., : self._time]
        keys.copy_(self.positions.turn(keys, [positions]))

    def move_base(self, base: int) -> None:
        """Count positions from another frame; the ring's keys have been turned to it."""
        self.base = base
        self._sink_shift = None
