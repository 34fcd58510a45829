"""A model in its world: what is generated, measured and written."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.compare import QUALITY, compare
from aad1.evaluate.measure import stride_for
from aad1.evaluation.model import Plan, chunks_for, evaluate_model, rollouts
from aad1.evaluation.page import number, page
from aad1.evaluation.result import Result
from aad1.evaluation.worlds import RealWorld, drawn, pack, packaged, packaged_folder, recorded
from aad1.pipeline import Pipeline
from aad1.worlds.sprites import SpritesConfig
from aad1.worlds.write import write_world

CONFIG = SpritesConfig(size=16, frames=9, num_sprites=1)
PLAN = Plan(
    clips=5, long_clips=2, seconds=2, long_seconds=4, steered=2, repeated=2, samples=2, seed=3
)
Build = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def world() -> RealWorld:
    return drawn(CONFIG, clips=5, long_frames=17, fps=4.0, reference_clips=20)


@pytest.fixture
def pipe(tiny_pipeline: Build) -> Pipeline:
    made = tiny_pipeline()

    class AnyWords:  # the tiny prompt encoder knows five words; sprites have more
        dim = 8

        def __call__(self, prompts: list[str]) -> torch.Tensor:
            return torch.stack([torch.full((4, 8), (sum(map(ord, p)) % 7) / 7) for p in prompts])

    made.text = AnyWords()  # type: ignore[assignment]
    return made


def test_every_section_is_there_and_written(
    pipe: Pipeline, world: RealWorld, tmp_path: Path
) -> None:
    said: list[str] = []
    result = evaluate_model(pipe, world, PLAN, said.append)
    assert [s.name for s in result.sections] == [
        "short",
        "long",
        "last",
        "frozen",
        "diversity",
        "oracle",
    ]
    short, long = result.section("short"), result.section("long")
    assert short.videos is not None and len(short.videos) == 5
    assert long.videos is not None and long.videos.frames == 17
    assert short.figures["M"].value is not None
    assert short.figures["FDtd"].reason == "needs at least 16 videos, 5 are there"
    assert long.figures["drift_ratio_2s"].value is not None
    assert long.figures["M"].value == long.figures["drift_ratio_2s"].M
    assert short.figures["first_frame_psnr"].value == 60  # a lossless codec
    frozen = result.section("frozen").figures
    assert frozen["M"].value == pytest.approx(0, abs=1e-4) and frozen["drift_1s"].value == 0
    assert result.section("oracle").figures["colors"].floor == pytest.approx(1, abs=0.3)
    result.write(tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["sections"]["short"]["figures"]["M"]["value"] == short.figures["M"].value
    assert record["sections"]["short"]["figures"]["FDtd"]["value"] is None
    rows = list(csv.DictReader((tmp_path / "videos.csv").open()))
    assert [r["section"] for r in rows] == ["short"] * 5 + ["long"] * 2 + ["last"] * 2
    assert float(rows[0]["flow"]) == pytest.approx(float(short.videos.magnitude[0]))
    html = (tmp_path / "report.html").read_text()
    mp4 = re.compile(r'data:video/mp4;base64,[^"]+')  # not always the same bytes of the same frames
    assert mp4.sub("", html) == mp4.sub("", page(result)) != ""
    outside = re.findall(r'(?:src|href)="(?!data:)', html) + re.findall(r"url\((?!data:)", html)
    assert not outside
    assert html.count("<video") == 7 and html.count("<svg") == 6
    assert "not computed: needs at least 16 videos, 5 are there" in html


def test_short_videos_are_the_beginnings_of_long_ones(pipe: Pipeline, world: RealWorld) -> None:
    """So none is made twice; and a rollout is what the public call gives for its seed."""
    short = list(rollouts(pipe, world.starts, [3, 4, 5, 6, 7], 2))
    long = list(rollouts(pipe, world.starts[:2], [3, 4], 4))
    for i in range(2):
        assert torch.equal(long[i][:9], short[i])
    start = world.starts[1]
    assert torch.equal(short[1], pipe(start.image, start.prompt, num_chunks=2, seed=4))


def test_lengths_must_fit(pipe: Pipeline) -> None:
    assert chunks_for(pipe, 9) == 2
    with pytest.raises(UserError, match="have 12 frames, but this model makes 1 \\+ 4"):
        chunks_for(pipe, 12)


def test_long_must_not_be_shorter(pipe: Pipeline, world: RealWorld) -> None:
    with pytest.raises(UserError, match="--long-seconds 1 is 1 chunks, short videos have 2"):
        evaluate_model(pipe, world, replace(PLAN, long_seconds=1), print)


def test_the_oracle_sees_the_beginning_of_every_long_video(
    pipe: Pipeline, world: RealWorld
) -> None:
    plans = (replace(PLAN, long_clips=n, steered=0, repeated=0) for n in (1, 5))
    few, many = (evaluate_model(pipe, world, plan, print).section("oracle") for plan in plans)
    assert few.figures == many.figures


def test_another_size_is_refused(tiny_pipeline: Build, world: RealWorld) -> None:
    with pytest.raises(UserError, match="makes 24x24 pixels, the real videos have 16x16"):
        evaluate_model(tiny_pipeline(size=24), world, PLAN, print)


def test_a_packed_world_judges_like_the_one_it_was_made_from(
    pipe: Pipeline, world: RealWorld, tmp_path: Path
) -> None:
    pack(world, tmp_path, starts=4, videos=1)
    again = packaged(tmp_path, clips=4)
    assert [s.captions for s in again.starts] == [s.captions for s in world.starts[:4]]
    assert torch.equal(again.starts[3].image, world.starts[3].image)
    assert len(again.clips) == 1
    plan = Plan(
        clips=4, long_clips=2, seconds=2, long_seconds=4, steered=0, repeated=0, samples=1, seed=3
    )

    def figures(w: RealWorld) -> Result:
        return evaluate_model(pipe, w, plan, lambda _: None)

    one, two = figures(world), figures(again)
    for name in ("short", "long", "last"):
        for metric, figure in one.section(name).figures.items():
            other = two.section(name).figures[metric]
            if figure.value is None:
                assert other.value is None
            else:  # half-precision statistics of frames
                assert other.value == pytest.approx(figure.value, rel=0.02, abs=1e-3), metric
    with pytest.raises(UserError, match="9 is more than the 4 packaged"):
        packaged(tmp_path, clips=9)


def test_what_the_package_carries_is_measured_as_videos_are_today() -> None:
    """Statistics of another stride, or without the networks' figures, would refuse every model."""
    folder = packaged_folder("doom")
    world = packaged(folder, clips=1)
    for videos in (world.short.reference.videos, world.long.reference.videos):  # type: ignore[union-attr]
        assert videos.stride == stride_for(videos.frames)
        assert videos.consistency.shape == (len(videos), 4)
        assert videos.motion.shape[1] == videos.frames // 15 and bool(videos.motion.any())
    assert world.networks is not None and world.short.reference.motion is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (1.234, "1.23"), (57.31, "57.3"), (1234.5, "1234"), (2e-7, "2.00e-07")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_recorded_clips_and_the_controls_of_a_codec(pipe: Pipeline, tmp_path: Path) -> None:
    shards = write_world("sprites", tmp_path / "clips", clips=40, size=16, frames=9)
    world = recorded(shards.folder, clips=4, skip=3, fps=4.0, long=None)
    assert [s.key for s in world.starts] == ["clip 3", "clip 8", "clip 13", "clip 18"]
    assert torch.equal(world.starts[0].image, shards.tensors([3])[0, 0])
    assert world.short.other is not None
    assert set(world.short.reference.videos.keys).isdisjoint(world.short.other.keys)

    class Lossless:  # not known to be lossless, so it is measured
        temporal_stride = pipe.codec.temporal_stride
        encode, decode = pipe.codec.encode, pipe.codec.decode

    pipe.codec = Lossless()  # type: ignore[assignment]
    result = evaluate_model(pipe, world, PLAN, lambda _: None)
    codec = result.section("codec").figures
    real = compare(
        world.short.other.select(range(4)), world.short.reference, None, QUALITY, resamples=0
    )
    for name in ("niqe", "sharpness"):
        assert codec[name].value == pytest.approx(real[name].value, rel=1e-6)
    for name in ("short", "last"):  # a codec that loses nothing: reconstructions are the real clips
        raw, beside_codec = result.section(name).figures, result.section(f"{name}_codec").figures
        for metric in ("M", "niqe", "sharpness"):
            assert beside_codec[metric].value == pytest.approx(raw[metric].value, rel=1e-6)
            assert beside_codec[metric].floor == pytest.approx(raw[metric].floor, rel=1e-6)

    class Faint(Lossless):
        @staticmethod
        def decode(latents: torch.Tensor) -> torch.Tensor:
            return Lossless.decode(latents) // 2

    pipe.codec = Faint()  # type: ignore[assignment]
    faint = evaluate_model(pipe, world, PLAN, lambda _: None)
    name = "sharpness"  # half the contrast: seen beside real clips, on both sides beside the codec
    assert faint.section("codec").figures[name].value < 0.6  # type: ignore[operator]
    assert faint.section("short").figures[name].value < 0.6 * (  # type: ignore[operator]
        result.section("short").figures[name].value or 0.0
    )
    assert faint.section("short_codec").figures[name].value == pytest.approx(
        result.section("short_codec").figures[name].value, rel=0.1
    )
    assert faint.section("short_codec").figures[name].floor == pytest.approx(
        result.section("short_codec").figures[name].floor, rel=0.1
    )
    assert "no real videos of 17 frames" in result.section("long").figures["drift_ratio_2s"].reason
    assert result.section("long").figures["drift_2s"].value is not None
    with pytest.raises(UserError, match="at least 32 are needed"):
        recorded(
            write_world("sprites", tmp_path / "few", clips=8, size=16, frames=9).folder,
            clips=4, skip=0, fps=4.0, long=None,
        )  # fmt: skip
