"""What is measured of a video, against plain loops, and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.frechet import frame_features, temporal_features
from aad1.evaluate.measure import (
    TENSORS,
    Measured,
    color_shift,
    flicker,
    join,
    measure,
    measure_all,
    smoothness,
    stride_for,
)
from aad1.evaluate.motion import grey, motion, quarter
from aad1.evaluate.networks import for_world
from aad1.worlds.sprites import SpritesConfig, draw

CONFIG = SpritesConfig(size=32, frames=13)


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return draw(CONFIG, 10, seed=4)[0].video


def test_a_table_holds_what_the_metrics_give(videos: torch.Tensor) -> None:
    table = measure(videos, fps=4, keys=[str(i) for i in range(10)])
    moving = motion(videos)
    assert torch.allclose(table.magnitude, moving.magnitude)
    assert torch.allclose(table.temporal, temporal_features(videos, moving.predictability))
    late = table.nss[:, -quarter(13) :].flatten(0, 1)
    assert torch.allclose(late, frame_features(videos, "late"))
    assert {getattr(table, name).shape[0] for name in TENSORS} == {10}


def test_measuring_one_by_one_is_the_same(videos: torch.Tensor) -> None:
    keys = [str(i) for i in range(10)]
    networks = for_world("sprites")
    whole = measure(videos, fps=4, keys=keys, networks=networks)
    one_by_one = ((k, "", v) for k, v in zip(keys, videos, strict=True))
    single = measure_all(one_by_one, fps=4, networks=networks)
    assert whole.consistency.shape == (10, 4) and whole.motion.shape == (10, 1, 16)
    for name in TENSORS:
        assert torch.allclose(getattr(whole, name), getattr(single, name), atol=1e-5), name


def test_a_table_survives_its_file(videos: torch.Tensor, tmp_path: Path) -> None:
    table = measure(videos[:3], fps=4, keys=["a", "b", "c"], prompts=["x", "y", "z"])
    table.save(tmp_path / "t.safetensors")
    again = Measured.load(tmp_path / "t.safetensors")
    assert (again.keys, again.prompts, again.fps, again.frames) == (
        table.keys, table.prompts, 4.0, 13,
    )  # fmt: skip
    assert torch.allclose(again.nss, table.nss, rtol=1e-3, atol=1e-3)
    assert torch.allclose(again.temporal, table.temporal, rtol=1e-6)
    (tmp_path / "t.safetensors").write_bytes(b"not a table")
    with pytest.raises(UserError, match=r"t\.safetensors"):
        Measured.load(tmp_path / "t.safetensors")


def test_selecting_and_joining(videos: torch.Tensor) -> None:
    table = measure(videos[:4], fps=4, keys=list("abcd"))
    both = join([table.select([3, 1]), table.select([0])])
    assert both.keys == ("d", "b", "a")
    assert torch.equal(both.magnitude, table.magnitude[[3, 1, 0]])
    with pytest.raises(UserError, match="frames"):
        join([table, measure(videos[:1, :9], fps=4, keys=["e"])])


def test_flicker_against_a_plain_loop(videos: torch.Tensor) -> None:
    light = grey(videos[:1])
    mean = [float(frame.mean()) for frame in light[0]]
    expected = np.mean([abs(mean[t + 1] - 2 * mean[t] + mean[t - 1]) for t in range(1, 12)])
    assert float(flicker(light)) == pytest.approx(expected, rel=1e-4)


def test_color_shift_against_numpy(videos: torch.Tensor) -> None:
    video = videos[2].numpy()
    distance = 0.0
    for channel in range(3):
        first, _ = np.histogram(video[:3, ..., channel], bins=8, range=(0, 256))
        last, _ = np.histogram(video[-3:, ..., channel], bins=8, range=(0, 256))
        distance += np.abs(first - last).sum() / (3 * 32 * 32) / 2 / 3
    assert float(color_shift(videos[2:3])) == pytest.approx(distance, rel=1e-9)


def test_smoothness_is_1_for_static_and_even_motion_and_low_for_jumps() -> None:
    texture = draw(SpritesConfig(size=64, frames=1), 1, seed=0)[0].video[0, 0]
    static = texture.expand(1, 9, -1, -1, -1)
    assert float(smoothness(grey(static))) == 1.0
    pan = torch.stack([texture.roll(k, 1)[:, 16:48] for k in range(9)])[None]
    jumps = pan[:, [0, 5, 2, 7, 1, 8, 3, 6, 4]]
    even, uneven = float(smoothness(grey(pan))), float(smoothness(grey(jumps)))
    assert even > 0.99
    # Without moving the neighbours half way along the flow even motion would fare no better.
    mean = grey(pan)[:, 0:-2:2].add(grey(pan)[:, 2::2]) / 2
    blend = 1 - float((mean - grey(pan)[:, 1::2]).abs().mean()) / 255
    assert uneven < blend < even


@pytest.mark.parametrize(("frames", "stride"), [(5, 1), (21, 1), (81, 3), (161, 5), (321, 9)])
def test_long_videos_are_measured_at_a_stride(frames: int, stride: int) -> None:
    assert stride_for(frames) == stride


def test_a_stride_does_not_hide_frames_that_come_in_pairs() -> None:
    """An even stride sees only the pairs that move of a video whose every frame comes twice."""
    video = draw(replace(CONFIG, frames=81), 4, seed=1)[0].video
    doubled = video[:, torch.arange(81) // 2]
    true = float(motion(video[:, :41]).magnitude.mean()) / 2
    seen = float(measure(doubled, fps=4, keys=list("abcd")).magnitude.mean())
    assert seen == pytest.approx(true, rel=0.1)
    assert float(motion(doubled, stride=2).magnitude.mean()) > 1.7 * true


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(UserError, match="no videos"):
        measure_all([], fps=4)


def test_files_from_before_the_networks_are_read(tmp_path: Path, videos: torch.Tensor) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    measured = measure(videos[:3], fps=4, keys=list("abc"), networks=for_world("sprites"))
    measured.save(tmp_path / "new.safetensors")
    again = Measured.load(tmp_path / "new.safetensors")
    assert torch.allclose(again.motion, measured.motion, atol=1e-2)
    assert torch.allclose(again.consistency, measured.consistency, atol=1e-6)
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        old = {n: file.get_tensor(n) for n in TENSORS if n not in ("consistency", "motion")}
        save_file(old, tmp_path / "old.safetensors", file.metadata())
    without = Measured.load(tmp_path / "old.safetensors")
    assert without.consistency.shape == (3, 0) and without.motion.shape == (3, 0, 0)
    assert torch.equal(without.magnitude, again.magnitude)
