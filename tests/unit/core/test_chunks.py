"""Chunk geometry and attention plans, against a definition written frame by frame."""

from __future__ import annotations

import itertools

import pytest

from aad1.core.chunks import (
    ChunkGeometry,
    bidirectional,
    block_causal,
    cached,
    parallel_chunks,
    without_unseen,
)
from aad1.errors import UserError

GEOMETRIES = [
    ChunkGeometry(chunk=c, sink=s, window=s + max(c, f) + p, first=f, relative=r)
    for c, s, p, f, r in itertools.product((1, 3, 4), (0, 1, 2), (0, 3, 8), (1, 2), (True, False))
]


def visible(geometry: ChunkGeometry, index: int) -> list[int]:
    """The sink, then the youngest frames that still fit in the window, then the chunk itself."""
    start, size = geometry.start(index), geometry.size(index)
    sink = [f for f in range(geometry.sink) if f < start]
    room = geometry.window - geometry.sink - size
    recent = [f for f in range(start) if f not in sink][-room:] if room else []
    return sink + recent + list(range(start, start + size))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_plan_shows_sink_recent_frames_and_the_chunk(geometry: ChunkGeometry) -> None:
    chunks = 7
    frames = geometry.frames(chunks)
    plan = block_causal(geometry, frames)
    assert len(plan) == chunks
    for i, group in enumerate(plan):
        assert list(group.keys) == visible(geometry, i)
        assert len(group.keys) <= geometry.window
        assert group.queries == tuple(
            range(geometry.start(i), geometry.start(i) + geometry.size(i))
        )
        if geometry.relative:
            assert group.key_positions == tuple(range(len(group.keys)))
        else:
            assert group.key_positions == group.keys
        assert group.query_positions == group.key_positions[-len(group.queries) :]
    assert [q for g in plan for q in g.queries] == list(range(frames))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_cached_and_parallel_plans_show_the_same_frames(geometry: ChunkGeometry) -> None:
    frames = geometry.frames(6)
    whole = block_causal(geometry, frames)
    parallel = parallel_chunks(geometry, frames, frames, 1)
    assert len(parallel) == 5
    for i, group in enumerate(whole[1:], start=1):
        start, size = geometry.start(i), geometry.size(i)
        past = tuple(range(start))  # a cache that has dropped nothing
        (own,) = cached(geometry, past, start, size)
        assert tuple((*past, *range(start, start + size))[k] for k in own.keys) == group.keys
        assert own.key_positions == group.key_positions
        assert own.query_positions == group.query_positions
        side = parallel[i - 1]
        named = [k if k < frames else k - frames + geometry.start(1) for k in side.keys]
        assert tuple(named) == group.keys
        assert all(k < frames for k in side.keys[:-size])  # the past is read from what was given
        assert all(k >= frames for k in side.keys[-size:])  # the chunk from its own pass
        assert side.key_positions == group.key_positions


def test_bidirectional_sees_everything() -> None:
    (group,) = bidirectional(5)
    assert group.queries == group.keys == group.query_positions == (0, 1, 2, 3, 4)


def test_a_cache_without_a_visible_frame_is_an_error() -> None:
    with pytest.raises(KeyError):
        cached(ChunkGeometry(), (1, 2, 3, 4), 5, 4)  # the sink, frame 0, is missing


def test_frames_and_chunks_are_inverse() -> None:
    geometry = ChunkGeometry(chunk=3, first=2, window=8)
    for n in range(1, 9):
        assert geometry.chunks(geometry.frames(n)) == n
        assert sum(geometry.size(i) for i in range(n)) == geometry.frames(n)
    for frames in (0, 1, 3, 4, 6):
        with pytest.raises(UserError, match=f"{frames} latent frames"):
            geometry.chunks(frames)


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(sink=-1), "sink must be at least 0, got -1"),
        (dict(first=0), "first must be at least 1, got 0"),
        (dict(window=4), "sink . chunk = 5 frames, got 4"),
        (dict(sink=6), "sink . chunk = 10 frames, got 9"),
        (dict(first=9), "sink . chunk = 10 frames, got 9"),
    ],
)
def test_impossible_geometry_names_value_and_range(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChunkGeometry(**values)  # type: ignore[arg-type]


def test_a_stretch_has_one_plan_wherever_it_lies() -> None:
    geometry, kept, stretch = ChunkGeometry(), 37, 20
    plans = {}
    for skip in (1, 2, 4, 6):
        whole = parallel_chunks(geometry, kept, geometry.start(skip) + stretch, skip)
        plan, seen = without_unseen(whole, kept)
        named = (*seen, *range(kept, kept + stretch))
        for before, after in zip(whole, plan, strict=True):
            assert tuple(named[k] for k in after.keys) == before.keys
            assert after.query_positions == before.query_positions
        assert max(k for group in plan for k in group.keys) < len(seen) + stretch
        plans[skip] = plan
    assert plans[2] == plans[4] == plans[6] != plans[1]
