"""Going back on the fast path: any place may be continued again, equal to the plain rollout."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.fast import slots as slots_module
from aad1.fast import timeline as timeline_module
from aad1.fast.config import FastConfig
from aad1.fast.rollout import FastRollout
from aad1.fast.timeline import Place, Timeline
from aad1.models.dit import WanConfig, WanTransformer
from aad1.pipeline import Pipeline
from aad1.rollout.stream import Rollout, State, seeded_noise
from aad1.serve.model import FastVideo, PipelineModel, PlainVideo
from aad1.serve.session import Session

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=3, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip
PLAIN = FastConfig(compile=False, cudnn=False, compile_decoder=False, early=False)
SHAPE = (4, 4, 6)
GEOMETRIES = [
    ChunkGeometry(),
    ChunkGeometry(window=5),
    ChunkGeometry(window=13),
    ChunkGeometry(window=12),
    ChunkGeometry(chunk=2, sink=3, window=9),  # a sink longer than the image
    ChunkGeometry(chunk=3, first=3, sink=0, window=9),
]


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    torch.manual_seed(0)
    net = WanTransformer(TINY).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@dataclass
class Both:
    """The same place on both paths."""

    state: State
    place: Place


class Walk:
    """A video on both paths, made from whatever place one likes."""

    def __init__(self, model: WanTransformer, geometry: ChunkGeometry, image: bool = True) -> None:
        torch.manual_seed(1)
        self.noise = seeded_noise([0], geometry, SHAPE, torch.device("cpu"))
        self.prompts = [torch.randn(1, 3, 8) for _ in range(3)]
        first = torch.randn(1, 4, geometry.first, 4, 6) if image else None
        self.plain = Rollout(model, geometry)
        self.fast = FastRollout(model, geometry, config=PLAIN)
        self.timeline = Timeline(self.fast, 1, *SHAPE[1:])
        text = self.prompts[0]
        state = State() if first is None else self.plain.prefill(first, text)
        self.start = Both(state, self.timeline.begin(first, text))

    def follow(self, at: Both, prompt: int, commit: bool = True) -> Both | None:
        """One chunk on; both paths must agree on it."""
        text = self.prompts[prompt]
        plain = self.plain.generate(at.state, text, self.noise).x0
        x0 = self.timeline.generate(at.place, text, self.noise)
        assert float((x0 - plain).abs().max() / plain.abs().max()) < 1e-5
        if not commit:
            return None
        place = self.timeline.commit(at.place, x0, text)
        return Both(self.plain.commit(at.state, plain, text), place)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@torch.no_grad()
def test_any_place_can_be_continued_again(
    model: WanTransformer, geometry: ChunkGeometry, seed: int
) -> None:
    """A walk that goes on from a random place that it has been to, with a random prompt."""
    rng = random.Random(seed)
    walk = Walk(model, geometry)
    known = [walk.start]
    for _ in range(24):
        at = known[-1] if rng.random() < 0.5 else rng.choice(known)
        new = walk.follow(at, rng.randrange(3), commit=rng.random() < 0.8)
        if new is not None:
            known.append(new)
    assert max(both.state.chunk for both in known) >= 4


@torch.no_grad()
def test_a_chunk_may_be_committed_after_another_was_made(model: WanTransformer) -> None:
    """Two continuations of one place, committed in the other order."""
    walk = Walk(model, ChunkGeometry())
    for _ in range(3):
        walk.start = walk.follow(walk.start, 0) or walk.start
    at, made = walk.start, []
    for text in walk.prompts[:2]:
        plain = walk.plain.generate(at.state, text, walk.noise).x0
        made.append((plain, walk.timeline.generate(at.place, text, walk.noise), text))
    ends = []
    for plain, x0, text in reversed(made):
        place = walk.timeline.commit(at.place, x0, text)
        ends.append(Both(walk.plain.commit(at.state, plain, text), place))
    for end in (*ends, *reversed(ends)):
        walk.follow(end, 2)


@pytest.mark.parametrize(
    "geometry", [ChunkGeometry(window=13), ChunkGeometry(chunk=3, first=3, sink=0, window=12)],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_going_back_past_the_turn_of_positions(
    model: WanTransformer, geometry: ChunkGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "LIMIT", 24)
    walk = Walk(model, geometry)
    known = [walk.start]
    for step in range(16):
        known.append(walk.follow(known[-1], step % 3) or walk.start)
    bases = {both.place.base for both in known}
    assert len(bases) > 2
    for index in (3, 14, 5, 15, 0, 9):
        again = walk.follow(known[index], 1)
        assert again is not None
        walk.follow(again, 2)


@torch.no_grad()
def test_a_live_video_copies_nothing_and_old_places_cost_what_they_lose(
    model: WanTransformer,
) -> None:
    walk = Walk(model, ChunkGeometry())
    slots = walk.timeline.session.slots
    where = slots.k.data_ptr()
    tip = walk.start
    for chunk in range(6):
        for dropped in range(chunk % 3):  # made ahead, steered past, made again
            ahead = walk.follow(tip, dropped)
            del ahead
        following = walk.follow(tip, chunk % 3)
        assert following is not None
        assert not tip.place.copies
        tip = following
    assert slots.k.data_ptr() == where
    held = tip  # somebody keeps this one while the video goes on by three chunks
    for _ in range(3):
        tip = walk.follow(tip, 0) or tip
    assert sorted(held.place.copies) == [1, 2, 3, 4] or sorted(held.place.copies) == [5, 6, 7, 8]
    walk.follow(held, 1)


@torch.no_grad()
def test_memory_is_used_again_when_a_video_is_gone(model: WanTransformer) -> None:
    walk = Walk(model, ChunkGeometry())
    walk.follow(walk.start, 0)
    session = walk.timeline.session
    other = Timeline(walk.fast, 1, *SHAPE[1:])
    assert other.session is not session  # the first one is still there
    del walk.timeline
    again = Timeline(walk.fast, 1, *SHAPE[1:])
    assert again.session is session and session.start == 0


@torch.no_grad()
@pytest.mark.parametrize("bug", ["no copies", "no check", "sink", "base"])
def test_planted_bugs_are_seen(
    model: WanTransformer, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = ChunkGeometry(window=13) if bug in ("sink", "base") else ChunkGeometry()
    if bug == "no copies":
        monkeypatch.setattr(Timeline, "_copy", lambda self, slots: None)
    elif bug == "no check":
        monkeypatch.setattr(Timeline, "_restore", lambda self, place, lost: None)
    elif bug == "sink":  # its rotation for the chunk before is left as it is
        turn = slots_module.Slots.move_base
        monkeypatch.setattr(slots_module.Slots, "turn_sink", lambda *_, **__: None)
        monkeypatch.setattr(slots_module.Slots, "move_base", turn)
    else:
        monkeypatch.setattr(slots_module, "LIMIT", 24)
        monkeypatch.setattr(slots_module.Slots, "turn_slot", lambda self, slot, positions: None)
    walk = Walk(model, geometry)
    known = [walk.start]
    with pytest.raises(AssertionError):
        for step in range(12):
            known.append(walk.follow(known[-1], step % 3) or walk.start)
        for index in (4, 10, 2):
            walk.follow(known[index], 1)


# -- under a live session -------------------------------------------------------------------------


def play(pipe: Pipeline, seed: int) -> tuple[list[np.ndarray], list[tuple[int, int]], int]:
    """A session that is steered at random: what it shows, which switch each frame obeys, and how
    many chunks were dropped."""
    model = PipelineModel(pipe)
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    session = Session(16.0)
    session.start(model.begin(picture, 7), "left", model.encode("left"), 0.0)
    shown: list[np.ndarray] = []
    order: list[tuple[int, int]] = []
    rng = random.Random(seed)
    job, ready = None, 0.0
    for tick in range(240):
        now = tick / 64
        for frame in session.take(now):
            shown.append(frame.pixels)
            order.append((frame.chunk, frame.steer))
        if job is None:
            job, ready = session.next_job(now), now + 0.05
        if job is not None and now >= ready:
            made = model.generate(job.point, job.text)
            if session.deliver(job, made.frames, [], made.after, made.seconds, now):
                model.settle(made.after)
                session.settled(job, 0.0, now)
            job = made = None  # nobody else holds the point of a chunk that was thrown away
        if rng.random() < 0.15:
            prompt = rng.choice(["left", "right", "red disc"])
            session.steer(prompt, model.encode(prompt), now, blend=rng.choice([1, 1, 3]))
        if tick == 150:
            session.reset(now)
    return shown, order, session.dropped_chunks


def test_a_steered_session_shows_what_the_plain_one_shows(
    tiny_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that change, fade, and drop the chunk that was made ahead; and a reset. Without one
    copy of the cache."""
    monkeypatch.setattr(timeline_module, "_Copy", lambda *_: pytest.fail("a slot was copied"))
    pipe = tiny_pipeline(fps=16.0)
    want, order, dropped = play(pipe, 3)
    pipe.speed_up(FastConfig(compile=False, cudnn=False, compile_decoder=False, early=False))
    got, same_order, _ = play(pipe, 3)
    assert dropped > 5 and order == same_order and len({steer for _, steer in order}) > 5
    difference = np.abs(np.stack(got).astype(int) - np.stack(want).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # rounding to levels alone


def test_the_session_is_on_the_path_of_its_pipeline(
    tiny_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    picture = np.zeros((16, 16, 3), np.uint8)
    assert isinstance(PipelineModel(pipe).begin(picture, 0).video, PlainVideo)
    pipe.speed_up()
    model = PipelineModel(pipe)
    point = model.begin(picture, 0)
    assert isinstance(point.video, FastVideo)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the plain transformer was run")

    monkeypatch.setattr(WanTransformer, "forward", refuse)
    monkeypatch.setattr(WanTransformer, "keys_values", refuse)
    text = model.encode("left")
    for _ in range(3):
        point = model.generate(point, text).after
