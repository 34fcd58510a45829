"""Which frames a chunk sees, and at which positions: the geometry of every attention pass.

A clip is split into chunks (the image alone, then `chunk` frames each). An attention pass is
described by a *plan*: groups of query frames, each with the key frames that it sees and the
RoPE positions of both. Bidirectional, block-causal, cached and parallel-over-chunks passes are
plans over the same code, so they cannot drift apart (algorithm.md, sections 3 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from aad1.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ChunkGeometry:
    """Chunk size, attention sink and window of the causal generator, in latent frames."""

    chunk: int = 4
    """Latent frames generated per pass."""
    sink: int = 1
    """First frames of the video that every chunk sees."""
    window: int = 9
    """Frames visible to a chunk in all: sink, recent past and the chunk itself."""
    first: int = 1
    """Latent frames of chunk 0; 1 where chunk 0 is the conditioning image."""
    relative: bool = True
    """Positions count from the start of the visible set (True) or of the video (False)."""

    def __post_init__(self) -> None:
        for name in ("chunk", "sink", "window", "first"):
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        for name, low in (("chunk", 1), ("sink", 0), ("first", 1)):
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, got {getattr(self, name)}")
        need = self.sink + max(self.chunk, self.first)
        if self.window < need:
            raise UserError(
                f"window must be at least sink + chunk = {need} frames, got {self.window}"
            )

    def start(self, index: int) -> int:
        """First frame of chunk `index`."""
        return 0 if index == 0 else self.first + (index - 1) * self.chunk

    def size(self, index: int) -> int:
        """Frames in chunk `index`."""
        return self.first if index == 0 else self.chunk

    def frames(self, chunks: int) -> int:
        """Frames in the first `chunks` chunks."""
        return self.start(chunks)

    def chunks(self, frames: int) -> int:
        """Number of chunks that make up `frames` latent frames; ValueError if not whole."""
        rest = frames - self.first
        if rest < 0 or rest % self.chunk:
            raise UserError(
                f"{frames} latent frames do not split into {self.first} + n x {self.chunk}"
            )
        return 1 + rest // self.chunk

    def kept(self, start: int, size: int) -> tuple[int, ...]:
        """Past frames visible to a chunk of `size` frames that begins at frame `start`."""
        local = self.window - self.sink - size
        return tuple(f for f in range(start) if f < self.sink or f >= start - local)

    def positions(self, past: tuple[int, ...], start: int, size: int) -> tuple[int, ...]:
        """RoPE positions of the past frames followed by the chunk's own frames."""
        if self.relative:
            return tuple(range(len(past) + size))
        return past + tuple(range(start, start + size))


@dataclass(frozen=True)
class Group:
    """Query frames (indices into the pass's own frames), key frames (indices into past + own
    frames), and the RoPE positions of both."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_positions: tuple[int, ...]
    key_positions: tuple[int, ...]


Plan = tuple[Group, ...]


@lru_cache(maxsize=64)
def bidirectional(frames: int) -> Plan:
    """Every frame sees every frame."""
    every = tuple(range(frames))
    return (Group(every, every, every, every),)


@lru_cache(maxsize=64)
def block_causal(geometry: ChunkGeometry, frames: int) -> Plan:
    """A whole clip in one pass: chunk by chunk, each sees what it would see in a rollout."""
    groups = []
    for i in range(geometry.chunks(frames)):
        start, size = geometry.start(i), geometry.size(i)
        past = geometry.kept(start, size)
        own = tuple(range(start, start + size))
        positions = geometry.positions(past, start, size)
        groups.append(Group(own, past + own, positions[len(past) :], positions))
    return tuple(groups)


@lru_cache(maxsize=256)
def cached(geometry: ChunkGeometry, past: tuple[int, ...], start: int, size: int) -> Plan:
    """One chunk over a cache that holds the frames `past` (global frame numbers, in order).

    The cache may hold more than the chunk sees; keys outside the visible set are skipped.
    """
    visible = geometry.kept(start, size)
    index = {frame: i for i, frame in enumerate(past)}
    keys = tuple(index[f] for f in visible) + tuple(range(len(past), len(past) + size))
    positions = geometry.positions(visible, start, size)
    return (Group(tuple(range(size)), keys, positions[len(visible) :], positions),)


@lru_cache(maxsize=64)
def parallel_chunks(geometry: ChunkGeometry, past_frames: int, frames: int, skip: int) -> Plan:
    """All chunks from `skip` on in one pass, each over *given* keys of the frames before it.

    Past = clean frames 0 .. past_frames - 1; own = frames start(skip) .. frames - 1. Used for
    phase two of the generator step and for teacher forcing (algorithm.md, section 10).
    """
    base = geometry.start(skip)
    groups = []
    for i in range(skip, geometry.chunks(frames)):
        start, size = geometry.start(i), geometry.size(i)
        past = geometry.kept(start, size)
        positions = geometry.positions(past, start, size)
        own = tuple(range(start - base, start - base + size))
        keys = past + tuple(past_frames + f for f in own)
        groups.append(Group(own, keys, positions[len(past) :], positions))
    return tuple(groups)


def without_unseen(plan: Plan, past_frames: int) -> tuple[Plan, tuple[int, ...]]:
    """A plan over those past frames alone that it sees, and their numbers.

    Chunks in the middle of a long clip then have the same plan wherever they are.
    """
    seen = tuple(sorted({k for group in plan for k in group.keys if k < past_frames}))
    place = {frame: i for i, frame in enumerate(seen)}
    fewer = past_frames - len(seen)

    def moved(group: Group) -> Group:
        keys = tuple(place[k] if k < past_frames else k - fewer for k in group.keys)
        return Group(group.queries, keys, group.query_positions, group.key_positions)

    return tuple(map(moved, plan)), seen
