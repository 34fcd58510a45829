"""The environment equals a plain rollout, and steering a packaged model moves the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.motion import motion
from aad1.model_names import PACKAGED
from aad1.pipeline import Pipeline
from aad1.serve.environment import Environment
from aad1.serve.facts import KEYS, read_facts
from aad1.serve.model import PipelineModel
from aad1.serve.session import Session

Build = Callable[..., Pipeline]
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_steps_equal_a_rollout_with_a_prompt_per_chunk(tiny_pipeline: Build) -> None:
    pipe = tiny_pipeline()
    environment = Environment(pipe)
    for _ in range(2):  # the same again after a second reset
        pieces = [environment.reset(PICTURE, "red", seed=5)]
        pieces += [environment.step(a) for a in (None, "left", "right", None)]
        assert [len(p) for p in pieces] == [1, 4, 4, 4, 4]
        texts = ["red", "red", "left", "right", "right"]
        whole = pipe.generate_latents(pipe.encode_image(PICTURE), [texts], [5], 4)
        np.testing.assert_array_equal(np.concatenate(pieces), pipe.codec.decode(whole)[0].numpy())


def test_mistakes(tiny_pipeline: Build) -> None:
    environment = Environment(tiny_pipeline())
    with pytest.raises(UserError, match="reset"):
        environment.step("left")
    with pytest.raises(UserError, match="teacher"):
        Environment(tiny_pipeline(stage="teacher"))


def test_the_packaged_worlds_know_the_prompts_of_their_keys() -> None:
    pipe = Pipeline.from_pretrained("doom")
    model = PipelineModel(pipe)
    assert Environment(pipe).actions["left"] == "turn left"
    for prompt in KEYS["doom"].values():
        assert model.unknown_words(prompt) == []
    assert model.unknown_words("fly left") == ["fly"]
    facts = read_facts("doom", pipe)
    assert facts.chunk_frames == 16
    assert len(facts.samples) == 12
    assert all(facts.sample(name) for name in facts.samples)
    assert facts.sample("captions.json") is None
    assert "folder" not in facts.public()


@pytest.mark.slow
def test_twenty_switches_between_left_and_right_are_obeyed_at_once() -> None:
    """What turns left sees things move right: the flow's sign follows in the very next chunk."""
    model = PipelineModel(Pipeline.from_pretrained("doom"))
    texts = {name: model.encode(name) for name in ("turn left", "turn right")}
    session = Session(model.fps)
    picture = PACKAGED / "doom_frames" / "01.png"
    session.start(model.begin(picture, 0), "turn left", texts["turn left"], 0.0)
    now, last, right = 0.0, None, []
    for switch in range(21):
        wanted = ("turn left", "turn right")[switch % 2]
        if switch:
            session.steer(wanted, texts[wanted], now)
        while True:  # until the first chunk that obeys has been shown
            job = session.next_job(now)
            if job is not None:
                made = model.generate(job.point, job.text)
                session.deliver(job, made.frames, [], made.after, made.seconds, now)
            shown = []
            while (due := session.next_due()) is not None and len(shown) < 16 + (not switch):
                now = max(now, due)
                shown += session.take(now)
            video = np.stack([*([] if last is None else [last]), *(f.pixels for f in shown)])
            last = shown[-1].pixels
            if shown[0].steer == switch + 1:
                break
        flow = float(motion(torch.from_numpy(video)[None]).direction[0, 0])
        right.append((flow > 0) == (wanted == "turn left"))
    assert len(right) == 21
    assert np.mean(right[1:]) >= 0.8
