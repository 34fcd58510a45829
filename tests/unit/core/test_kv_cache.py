"""The rolling cache: it keeps exactly what later chunks see, and never changes in place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.kv_cache import KV, KVCache


def new(frames: range, layers: int = 2) -> tuple[KV, ...]:
    """K and V whose values name their frame (V negative) and layer."""

    def one(layer: int, sign: float) -> torch.Tensor:
        numbers = torch.tensor([float(f) for f in frames]) + 1000 * layer
        return sign * numbers.view(1, -1, 1, 1, 1).expand(2, -1, 3, 1, 2)

    return tuple((one(n, 1.0), one(n, -1.0)) for n in range(layers))


def fill(geometry: ChunkGeometry, chunks: int) -> list[KVCache]:
    cache, out = KVCache(), []
    for i in range(chunks):
        start = geometry.start(i)
        cache = cache.append(new(range(start, start + geometry.size(i))), geometry, start)
        out.append(cache)
    return out


@pytest.mark.parametrize(
    "geometry",
    [
        ChunkGeometry(),
        ChunkGeometry(chunk=1, sink=0, window=1),
        ChunkGeometry(chunk=2, sink=3, window=8),
        ChunkGeometry(chunk=3, sink=2, window=12, first=3),
        ChunkGeometry(chunk=4, sink=1, window=5),
    ],
    ids=str,
)
def test_it_holds_exactly_what_the_next_chunk_sees(geometry: ChunkGeometry) -> None:
    for i, cache in enumerate(fill(geometry, 12)):
        start = geometry.start(i + 1)
        assert cache.frames == geometry.kept(start, geometry.chunk)
        assert len(cache.frames) <= geometry.window - geometry.chunk
        for layer, (k, v) in enumerate(cache.layers):
            assert k.shape == v.shape == (2, len(cache.frames), 3, 1, 2)
            want = torch.tensor([float(f) for f in cache.frames]) + 1000 * layer
            assert torch.equal(k[0, :, 0, 0, 0], want)
            assert torch.equal(v[1, :, 2, 0, 1], -want)


def test_the_default_keeps_the_image_for_ever() -> None:
    assert fill(ChunkGeometry(), 6)[-1].frames == (0, 17, 18, 19, 20)


def test_older_states_stay_as_they_were() -> None:
    """A consumer may branch: appending gives a new cache and leaves the old one's tensors."""
    geometry = ChunkGeometry()
    states = fill(geometry, 4)
    before = [k.clone() for k, _ in states[1].layers]
    a = states[1].append(new(range(5, 9)), geometry, 5)
    b = states[1].append(tuple((k + 0.5, v) for k, v in new(range(5, 9))), geometry, 5)
    assert a.frames == b.frames == states[2].frames
    assert not torch.equal(a.layers[0][0], b.layers[0][0])
    for (k, _), old in zip(states[1].layers, before, strict=True):
        assert torch.equal(k, old)


def test_gradients_pass_through_what_is_kept() -> None:
    geometry = ChunkGeometry()
    k = torch.zeros(1, 1, 1, 1, 2, requires_grad=True)
    cache = KVCache().append(((k, k),), geometry, 0)
    for i in range(1, 6):
        start = geometry.start(i)
        extra = torch.zeros(1, 4, 1, 1, 2)
        cache = cache.append(((extra, extra),), geometry, start)
        assert cache.frames[-1] == start + 3
    cache.layers[0][0].sum().backward()
    assert k.grad is not None
    assert float(k.grad.min()) == 1


def storages(cache: KVCache) -> dict[int, int]:
    """Bytes by place of all memory that a cache keeps alive."""
    held = [t for piece in cache.pieces for kv in piece.layers for t in kv]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}


def made(start: int, size: int) -> tuple[KV, ...]:
    """K and V in memory of their own, as a pass gives them."""
    return tuple((k.clone(), v.clone()) for k, v in new(range(start, start + size)))


def test_states_share_what_both_see() -> None:
    """Self-Forcing's window: a state and the next hold 18 + 3 frames in all, not 2 x 18."""
    geometry = ChunkGeometry(chunk=3, first=3, sink=0, window=21)
    states = [KVCache()]
    for i in range(12):
        states.append(states[-1].append(made(3 * i, 3), geometry, 3 * i))
    frame = sum(2 * t.nbytes for t in (states[1].layers[0][0], states[1].layers[1][0])) // 3
    for before, after in pairwise(states[6:]):
        assert sum(storages(after).values()) == 18 * frame
        assert sum((storages(before) | storages(after)).values()) == (18 + 3) * frame


@pytest.mark.parametrize(
    "geometry",
    [ChunkGeometry(window=7), ChunkGeometry(chunk=4, first=4, sink=1, window=9)],
    ids=str,
)
def test_frames_that_are_not_seen_are_not_held(geometry: ChunkGeometry) -> None:
    """Of a chunk that is seen in part; a view of that part would hold all of it."""
    cache = KVCache()
    for i in range(6):
        start = geometry.start(i)
        cache = cache.append(made(start, geometry.size(i)), geometry, start)
        seen = sum(t.nbytes for kv in cache.layers for t in kv)
        assert sum(storages(cache).values()) == seen
    assert len(cache.frames) == geometry.window - geometry.chunk
