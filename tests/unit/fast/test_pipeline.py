"""A pipeline on the fast path against the same one on the plain path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.fast.config import OFF, FastConfig
from aad1.fast.handover import Handover
from aad1.fast.rollout import Session
from aad1.models.causal_codec import CausalCodec, CausalCodecConfig
from aad1.models.dit import WanTransformer
from aad1.pipeline import Pipeline

Build = Callable[..., Pipeline]
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
EARLY = replace(OFF, precompute=True, decoder=True, early=True)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("config", [None, EARLY], ids=["default", "early"])
def test_the_same_video_also_when_the_prompt_changes(
    tiny_pipeline: Build, config: FastConfig | None
) -> None:
    pipe = tiny_pipeline()

    def video() -> torch.Tensor:
        stream = pipe.stream(PICTURE, "left", seed=3)
        parts = []
        for i, frames in enumerate(stream):
            parts.append(frames)
            if i == 1:
                stream.prompt = "right"
            if i == 4:
                break
        return torch.cat(parts)

    plain, whole = video(), pipe(PICTURE, "left", num_chunks=3)
    pipe.speed_up(config)
    assert close(video(), plain)
    assert close(pipe(PICTURE, "left", num_chunks=3), whole)
    with torch.inference_mode():  # a mode of its own, over the same memory
        assert close(video(), plain)
    assert close(video(), plain)


@pytest.mark.parametrize("early", [True, False])
def test_when_the_cache_pass_is_launched(
    tiny_pipeline: Build, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("generate", "commit"):
        plain = getattr(Session, name)

        def note(
            self: Session, *args: object, _p: Callable = plain, _n: str = name, **more: object
        ) -> object:
            events.append(_n)
            return _p(self, *args, **more)

        monkeypatch.setattr(Session, name, note)
    wait = Handover.wait

    def arrive(self: Handover) -> torch.Tensor:
        events.append("frames")
        return wait(self)

    monkeypatch.setattr(Handover, "wait", arrive)
    pipe = tiny_pipeline()
    pipe.speed_up(EARLY if early else EARLY.without("early"))
    pipe(PICTURE, "left", num_chunks=2)
    chunk = ["generate", "commit", "frames"] if early else ["generate", "frames", "commit"]
    assert events == ["commit", *chunk, "generate", "frames"]  # and none after the last


def test_a_decoder_is_not_compiled_where_that_cannot_work(
    tiny_pipeline: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out is left out of the decoder too: once, with one warning."""
    pytest.importorskip("diffusers")
    from aad1.fast import config as config_module
    from aad1.models.wan_codec import WanCodec

    torch.manual_seed(0)
    pipe = tiny_pipeline(codec=WanCodec.from_config(base_dim=8, num_res_blocks=1), size=32)
    monkeypatch.setattr(WanTransformer, "device", torch.device("cuda"))
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name, *_: None)
    with pytest.warns(UserWarning, match="compile_decoder .the compiler needs Triton") as caught:
        pipe.speed_up(FastConfig(compile=False, cudnn=False, early=False))
    assert len(caught) == 1
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    pipe.decoder_stream()
    pipe(PICTURE.repeat(2, 0).repeat(2, 1), "left", num_chunks=1)


def test_a_geometry_it_does_not_know_streams_plainly_with_a_warning(tiny_pipeline: Build) -> None:
    pipe = tiny_pipeline(geometry=ChunkGeometry(relative=False))
    want = pipe(PICTURE, "left", num_chunks=2)
    pipe.speed_up()
    with pytest.warns(UserWarning, match="the fast path is off"):
        got = pipe(PICTURE, "left", num_chunks=2)
    assert torch.equal(got, want)


def test_a_pipeline_on_the_fast_path_is_saved_as_any(tiny_pipeline: Build, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.speed_up()
    want = pipe(PICTURE, "left", num_chunks=2)
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path, fast=True)
    assert again.fast_rollout(again.rollout) is not None
    assert torch.equal(again(PICTURE, "left", num_chunks=2), want)
    assert Pipeline.from_pretrained(tmp_path).fast_rollout(again.rollout) is not None
    plain = Pipeline.from_pretrained(tmp_path, fast=False)
    assert plain.fast_rollout(plain.rollout) is None


def test_the_light_codec_in_half_precision_is_within_two_levels(tiny_pipeline: Build) -> None:
    torch.manual_seed(0)
    codec = CausalCodec(CausalCodecConfig(latent_channels=4, widths=(16, 16, 8, 8))).eval()
    pipe = tiny_pipeline(codec=codec)
    want = pipe(PICTURE, "left", num_chunks=2)
    pipe.speed_up(EARLY)
    assert close(pipe(PICTURE, "left", num_chunks=2), want)
    pipe.speed_up(replace(EARLY, half_decoder=True))
    got = pipe(PICTURE, "left", num_chunks=2)
    error = (got.int() - want.int()).abs()
    assert 0 < int(error.max()) <= 3 and float(error.float().mean()) < 0.5
    assert next(codec.parameters()).dtype == torch.float32  # the codec itself is left alone


@pytest.mark.gpu
def test_cuda_is_fast_by_default_and_frames_are_not_overwritten(
    tiny_pipeline: Build, tmp_path: Path
) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, device="cuda")
    assert pipe.fast_rollout(pipe.rollout) is not None
    stream = pipe.stream(PICTURE, "left", seed=3)
    stream.chunks = 6
    held = list(stream)  # all of them, while later chunks are made
    plain = Pipeline.from_pretrained(tmp_path, device="cuda", fast=False)
    want = plain.stream(PICTURE, "left", seed=3)
    want.chunks = 6
    assert close(torch.cat(held), torch.cat(list(want)))
