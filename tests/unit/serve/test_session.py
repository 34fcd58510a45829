"""The session's decisions, on a clock of its own: pace, stalls, bounds and steering."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from aad1.errors import UserError
from aad1.pipeline import Pipeline
from aad1.rollout.stream import State
from aad1.serve.model import PipelineModel
from aad1.serve.session import LATE, REMEMBERED, Session
from serve_fakes import CHUNK, FPS, Drive


def numbers(drive: Drive) -> list[int]:
    return [frame.number for _, frame in drive.shown]


def positions(drive: Drive) -> list[tuple[int, int]]:
    """(chunk, frame within it), from the pixels themselves."""
    return [(int(f.pixels[0, 0, 1]), int(f.pixels[0, 0, 0]) // 8) for _, f in drive.shown]


def test_frames_come_at_the_native_rate_in_order_and_none_is_missing() -> None:
    drive = Drive(seconds=0.2)
    drive.until(20.1)
    times = [t for t, _ in drive.shown]
    assert times[0] == pytest.approx(0.2)
    assert np.allclose(np.diff(times), 1 / FPS)
    assert numbers(drive) == list(range(len(times)))
    assert positions(drive) == [divmod(k, CHUNK) for k in range(len(times))]
    assert len(times) == 1 + int((20.1 - 0.2) * FPS)


def test_at_most_one_chunk_is_made_ahead() -> None:
    drive = Drive(seconds=0.01)
    drive.until(10)
    assert len(drive.model.made) == 11  # one on show, one ready, however fast the model
    assert drive.most_queued <= 2 * CHUNK


def test_a_stall_moves_what_follows_and_nothing_comes_in_a_burst() -> None:
    drive = Drive(seconds=0.2)
    drive.until(3)
    drive.seconds = 3.0
    drive.until(8)
    drive.seconds = 0.2
    drive.until(14)
    times = [t for t, _ in drive.shown]
    gaps = np.diff(times)
    assert gaps.min() > 0.9 / FPS
    assert (gaps > 2 / FPS).sum() == drive.stats()["stalls"] > 0
    assert numbers(drive) == list(range(len(times)))
    # the time lost is the time stalled, and none is made up for
    lost = times[-1] - times[0] - (len(times) - 1) / FPS
    assert lost == pytest.approx(drive.stats()["stalled_ms"] / 1000, abs=1e-3)


def test_a_reader_that_comes_late_by_little_is_caught_up_and_by_much_is_not() -> None:
    for late, frames in ((0.2, 4), (LATE + 0.05, 1)):
        drive = Drive()
        drive.until(2.0)
        due = drive.session.next_due()
        assert due is not None
        assert len(drive.session.take(due + late)) == frames


def test_a_slow_model_shows_every_chunk_and_says_that_it_is_slow() -> None:
    drive = Drive(seconds=2.0)
    drive.until(21)
    assert numbers(drive) == list(range(len(drive.shown)))
    assert drive.stats()["speed"] == pytest.approx(0.5)
    assert drive.stats()["stalls"] >= 8


def test_the_rate_has_the_stalls_in_it() -> None:
    drive = Drive(seconds=2.0)  # a second of video every two seconds
    rates = []
    for k in range(100):
        drive.until(10 + 0.2 * k)
        rates.append(drive.stats()["fps"])
    assert np.mean(rates) == pytest.approx(FPS / 2, rel=0.05)
    assert max(rates) <= FPS * 2 / 3 + 0.5  # the last 3 s have at most two of the chunks
    drive.seconds = 60.0
    drive.until(40)
    assert drive.stats()["fps"] == 0


def test_the_rate_counts_from_the_first_frame_and_from_the_end_of_a_pause() -> None:
    drive = Drive(seconds=0.2)
    for time in (0.7, 1.2, 5.0, 9.0):
        drive.until(time)
        assert drive.stats()["fps"] == pytest.approx(FPS, abs=2)
    drive.session.pause(drive.now)
    drive.until(20)
    drive.session.resume(drive.now)
    drive.until(20.7)
    assert drive.stats()["fps"] == pytest.approx(FPS, abs=2)


@pytest.mark.parametrize("phase", np.linspace(0.02, 0.98, 13))
def test_a_switch_is_seen_after_the_chunk_on_show(phase: float) -> None:
    drive = Drive(seconds=0.2)
    drive.until(5.2 + phase)  # chunk 5 begins at 5.2
    number = drive.steer("abc")
    drive.until(8.5)
    possible = 1 - phase >= 1.3 * 0.2
    expected = (1 - phase) if possible else (2 - phase)
    assert drive.latency(number, 5.2 + phase) == pytest.approx(expected, abs=1.1 / FPS)
    # no jump, nothing twice, no stall
    assert positions(drive) == [divmod(k, CHUNK) for k in range(len(drive.shown))]
    assert drive.stats()["stalls"] == 0
    assert drive.stats()["dropped_chunks"] == int(possible)
    first = 6 if possible else 7
    assert drive.texts()[:8] == [1] * first + [3] * (8 - first)


def test_steering_never_stutters_where_the_cache_pass_is_dear() -> None:
    """A chunk of 1 s takes 0.35 s and 0.6 s more for the cache pass: 1.05 times real time."""
    rng = random.Random(0)
    drive = Drive(seconds=0.35, settle=0.6)
    time = 4.0
    for k in range(200):
        time += rng.uniform(0.05, 2.0)
        drive.until(time)
        drive.steer("ab"[k % 2])
    drive.until(time + 3)
    gaps = np.diff([t for t, _ in drive.shown])
    assert gaps.max() < 1.1 / FPS
    assert drive.session.dropped_chunks > 10
    assert drive.session.stalled_seconds == 0
    assert drive.stats()["speed"] == pytest.approx(1 / 0.95, rel=0.02)


def test_a_model_slowed_by_its_cache_pass_says_so() -> None:
    drive = Drive(seconds=0.8, settle=0.8)
    drive.until(30)
    assert drive.stats()["speed"] == pytest.approx(1 / 1.6, rel=0.02)
    assert len(drive.shown) == pytest.approx(30 / 1.6 * CHUNK, rel=0.1)


def test_median_and_worst_latency_keep_the_goal() -> None:
    rng = random.Random(0)
    latencies = []
    drive = Drive(seconds=0.25)
    time = 1.0
    for k in range(60):
        time += rng.uniform(1.8, 3.5)
        drive.until(time)
        latencies.append((drive.steer("ab"[k % 2]), time))
    drive.until(time + 5)
    measured = [drive.latency(number, asked) for number, asked in latencies]
    assert np.median(measured) <= 1.0
    assert max(measured) <= 1.5
    assert drive.stats()["stalls"] == 0


def test_the_chunk_after_a_switch_continues_what_was_shown() -> None:
    drive = Drive(seconds=0.1)
    drive.until(3.5)
    drive.steer("bbb")
    drive.until(7)
    shown = [f"seed {0}", *(float(t) for t in drive.texts())]
    last = drive.model.made[-2]  # the one on show; the last one is ready
    assert list(last) == shown[: len(last)]


def test_keys_held_down_neither_stall_nor_starve_the_stream() -> None:
    for seconds in (0.2, 0.8, 2.0):  # also slower than real time
        drive = Drive(seconds=seconds)
        for k in range(200):
            drive.until(3 + 0.05 * k)
            drive.steer("ab"[k % 2] * (1 + k % 3))
        drive.until(16)
        quiet = Drive(seconds=seconds)
        quiet.until(16)
        assert len(drive.shown) == len(quiet.shown)


def test_a_blend_fades_over_chunks() -> None:
    drive = Drive(prompt="")
    drive.until(2.5)
    drive.steer("x" * 40, blend=4)
    drive.until(9)
    texts = drive.texts()
    first = next(k for k, text in enumerate(texts) if text)
    assert texts[first : first + 6] == [10, 20, 30, 40, 40, 40]
    drive.until(9.3)
    drive.steer("", blend=2)
    drive.until(13)
    after = drive.texts()[drive.texts().index(40) :]
    assert [t for t in after if t != 40][:2] == [20, 0]


def test_pause_holds_and_resume_goes_on_without_a_gap_in_the_frames() -> None:
    drive = Drive()
    drive.until(3.37)
    drive.session.pause(drive.now)
    shown = len(drive.shown)
    drive.until(60)
    assert len(drive.shown) == shown
    assert len(drive.model.made) <= 5
    drive.session.resume(drive.now)
    drive.until(63)
    assert numbers(drive) == list(range(len(drive.shown)))
    times = [t for t, _ in drive.shown]
    assert times[shown] - 60 <= 1 / FPS
    assert drive.stats()["stalls"] == 0
    with pytest.raises(UserError, match="running"):
        drive.session.resume(drive.now)


def test_a_switch_while_paused_drops_the_chunk_that_waits() -> None:
    drive = Drive()
    drive.until(3.9)
    drive.session.pause(drive.now)
    drive.until(5)
    number = drive.steer("abcd")
    drive.until(6)
    drive.session.resume(drive.now)
    drive.until(9)
    assert drive.latency(number, 6 - 0) < 0.5  # 0.3 s of the chunk on show were left
    assert drive.stats()["stalls"] == 0


def test_reset_begins_again_with_a_new_generation_and_drops_what_is_in_the_making() -> None:
    drive = Drive()
    drive.until(2.45)  # chunk 3 is ready, or in the making
    drive.steer("abc")
    before = len(drive.shown)
    assert drive.session.reset(drive.now) == 2
    drive.until(5)
    new = [frame for _, frame in drive.shown[before:]]
    assert {f.generation for f in new} == {2}
    assert [f.number for f in new] == list(range(len(new)))
    assert int(new[0].pixels[0, 0, 1]) == 0
    assert {int(f.pixels[0, 0, 2]) for f in new} == {3}


def test_stop_ends_and_start_begins_anew() -> None:
    drive = Drive()
    drive.until(2)
    drive.session.stop()
    shown = len(drive.shown)
    drive.until(6)
    assert len(drive.shown) == shown
    for call in (
        lambda: drive.session.steer("a", 1.0, drive.now),
        lambda: drive.session.reset(drive.now),
        lambda: drive.session.pause(drive.now),
    ):
        with pytest.raises(UserError, match="idle|start"):
            call()
    drive.session.start(drive.model.begin(None, 1), "ab", 2.0, drive.now)
    drive.until(9)
    assert drive.shown[shown][1].number == 0


def test_hours_keep_memory_constant() -> None:
    drive = Drive(seconds=0.4)
    drive.until(1200)
    kept = vars(drive.session).items()
    sizes = {k: len(v) for k, v in kept if hasattr(v, "__len__") and k != "_tip"}  # the model's
    assert max(sizes.values()) <= REMEMBERED
    assert len(drive.shown) > 1198 * FPS
    gaps = np.diff([t for t, _ in drive.shown])
    assert np.allclose(gaps, 1 / FPS)


def test_bad_values_are_refused() -> None:
    with pytest.raises(UserError, match="fps must be above 0, got 0"):
        Session(0)
    drive = Drive()
    with pytest.raises(UserError, match="blend must be in 1..64 chunks, got 0"):
        drive.steer("a", blend=0)


# -- the real model under the session -------------------------------------------------------------


def test_what_is_shown_equals_a_plain_rollout_with_a_prompt_per_chunk(
    tiny_pipeline: Callable[..., Pipeline],
) -> None:
    """Whatever is dropped and made again, the video is that of its prompts, to the bit."""
    pipe = tiny_pipeline(fps=16.0)
    model = PipelineModel(pipe)
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    session = Session(16.0)
    session.start(model.begin(picture, 7), "left", model.encode("left"), 0.0)
    shown: list[np.ndarray] = []
    prompts: dict[int, str] = {}
    by_number = {1: "left"}
    rng = random.Random(3)
    now, job, ready = 0.0, None, 0.0
    for tick in range(400):
        now = tick / 64
        for frame in session.take(now):
            shown.append(frame.pixels)
            prompts[frame.chunk] = by_number[frame.steer]
        if job is None:
            job, ready = session.next_job(now), now + 0.05
        if job is not None and now >= ready:
            made = model.generate(job.point, job.text)
            model.settle(made.after)
            session.deliver(job, made.frames, [], made.after, made.seconds, now)
            job = None
        if rng.random() < 0.1:
            prompt = rng.choice(["left", "right", "red disc"])
            by_number[session.steer(prompt, model.encode(prompt), now)] = prompt
    assert session.dropped_chunks > 5
    chunks = max(prompts) + 1
    texts = [prompts[0], *(prompts[k] for k in range(chunks))]
    # generate_latents takes the image's prompt first: it is written with that of chunk 0
    whole = pipe.generate_latents(pipe.encode_image(picture), [texts], [7], chunks)
    expected = pipe.codec.decode(whole)[0].numpy()[: len(shown)]
    assert len(set(prompts.values())) == 3
    np.testing.assert_array_equal(np.stack(shown), expected)


def test_a_settled_point_holds_one_cache_and_decodes_as_the_pipeline_does(
    tiny_pipeline: Callable[..., Pipeline],
) -> None:
    pipe = tiny_pipeline()
    taken = []
    real = pipe.decoder_stream
    pipe.decoder_stream = lambda: taken.append(real()) or taken[-1]  # type: ignore[method-assign]
    model = PipelineModel(pipe)
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    point = model.begin(picture, 0)
    assert taken and point.decoder is taken[0]
    text = model.encode("left")
    gc.collect()
    others = [o for o in gc.get_objects() if type(o) is State]  # each holds a cache
    for _ in range(3):
        point = model.generate(point, text).after
        model.settle(point)
    gc.collect()
    states = [o for o in gc.get_objects() if type(o) is State]
    assert sum(all(state is not o for o in others) for state in states) == 1


def test_points_of_every_codec_can_be_continued_twice(
    tiny_pipeline: Callable[..., Pipeline],
) -> None:
    """A decoder's state is kept per point: another chunk made in between leaves no trace."""
    from aad1.models.causal_codec import CausalCodec, CausalCodecConfig

    torch.manual_seed(0)
    codec = CausalCodec(CausalCodecConfig(latent_channels=6, widths=(16, 12, 8, 8))).eval()
    for p in codec.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = PipelineModel(tiny_pipeline(codec=codec, size=32))
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    left, right = model.encode("left"), model.encode("right")
    one = model.generate(model.begin(picture, 0), left)
    first = model.generate(one.after, left)
    other = model.generate(one.after, right)
    again = model.generate(one.after, left)
    np.testing.assert_array_equal(first.frames, again.frames)
    assert (first.frames != other.frames).any()
    plain = model.pipeline(picture, "left", num_chunks=2).numpy()
    np.testing.assert_array_equal(np.concatenate([one.frames, first.frames]), plain)
