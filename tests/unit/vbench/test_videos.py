"""The video set: names, resuming, settings, and every gap found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.media.mp4 import record
from aad1.media.reading import read_video
from aad1.vbench.protocol import read_pairs, video_names
from aad1.vbench.videos import (
    Make,
    Wanted,
    check_videos,
    make_videos,
    read_settings,
    spread,
    wanted_videos,
)
from vbench_standin import build, moving


class Counting:
    """A generator of videos that counts, and may break off in the middle of one."""

    def __init__(self, break_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.break_at = break_at

    def __call__(self, image: Path, prompt: str, seed: int) -> Iterator[torch.Tensor]:
        assert image.is_file()
        self.seeds.append(seed)
        yield moving(seed, side=32)[:2]
        if len(self.seeds) == self.break_at:
            raise KeyboardInterrupt
        yield moving(seed, side=32)[2:]


@pytest.fixture
def wanted(tmp_path: Path) -> list[Wanted]:
    places = build(tmp_path / "VBench")
    return wanted_videos(read_pairs(places.root), places.images, seed=100)


def made(folder: Path, wanted: list[Wanted], make: Make, part: tuple[int, int] = (0, 1)) -> int:
    return make_videos(folder, wanted, make, fps=8.0, settings={"model": "m"}, part=part)


def test_a_set_is_made_in_two_goes_without_a_half_written_video(
    wanted: list[Wanted], tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "videos"
    first = Counting(break_at=4)
    with pytest.raises(KeyboardInterrupt):
        made(folder, wanted, first)
    names = [w.name for w in wanted]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names[:3])
    assert len(check_videos(folder, names)[0]) == 12  # each of the missing ones is named

    second = Counting()
    assert made(folder, wanted, second) == 12
    assert second.seeds == list(range(103, 115))  # each video has a seed of its own
    problems, shape = check_videos(folder, names)
    assert problems == []
    assert shape is not None
    assert (shape.width, shape.height, shape.frames, shape.fps) == (32, 32, 5, pytest.approx(8))
    assert made(folder, wanted, Counting()) == 0


def test_a_video_holds_its_frames_at_high_quality(wanted: list[Wanted], tmp_path: Path) -> None:
    made(tmp_path / "v", wanted[:1], Counting())
    video = read_video(tmp_path / "v" / "a dog runs-0.mp4")
    error = (video.float() - moving(100, side=32).float()).abs().mean()
    assert error < 4


def test_parts_share_a_set(wanted: list[Wanted], tmp_path: Path) -> None:
    folder = tmp_path / "v"
    counts = [made(folder, wanted, Counting(), part=(k, 4)) for k in range(4)]
    assert counts == [4, 4, 4, 3]
    assert check_videos(folder, [w.name for w in wanted])[0] == []
    with pytest.raises(UserError, match="0 <= i < n, got 4/4"):
        made(folder, wanted, Counting(), part=(4, 4))


def test_another_model_s_set_is_not_mixed_in(wanted: list[Wanted], tmp_path: Path) -> None:
    folder = tmp_path / "v"
    made(folder, wanted[:2], Counting())
    with pytest.raises(UserError, match="begun with model 'm', not 'other'"):
        make_videos(folder, wanted[:2], Counting(), fps=8.0, settings={"model": "other"})
    with pytest.raises(UserError, match="other prompts or seeds"):
        made(folder, wanted[1:3], Counting())
    kept = read_settings(folder)
    assert kept is not None
    assert kept["settings"] == {"model": "m", "fps": 8.0, "crf": 10}
    assert kept["seeds"]["a dog runs-1.mp4"] == 101
    (tmp_path / "v.json").write_text("{")
    with pytest.raises(UserError, match="v.json is damaged"):
        made(folder, wanted[:2], Counting())


def test_missing_images_stop_it_before_the_first_video(
    wanted: list[Wanted], tmp_path: Path
) -> None:
    wanted[-1].image.unlink()
    make = Counting()
    with pytest.raises(UserError, match=r"1 of 3 images are missing.*A cat sleeps\.\.png"):
        made(tmp_path / "v", wanted, make)
    assert make.seeds == []
    assert not (tmp_path / "v.json").exists()


def test_every_fault_of_a_set_is_listed_with_its_path(wanted: list[Wanted], tmp_path: Path) -> None:
    folder = tmp_path / "v"
    made(folder, wanted, Counting())
    names = [w.name for w in wanted]
    (folder / names[1]).unlink()
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:-2000])
    with record(folder / names[3], 8.0) as encoder:
        encoder.write(moving(0, side=64).numpy())
    (folder / "notes.txt").write_text("x")
    problems, _ = check_videos(folder, names, least_side=128, least_frames=6)
    assert len(problems) == 6
    for part in (
        f"{folder / names[1]}: missing",
        f"{folder / names[2]} is damaged",
        f"{folder / names[3]}: 64x64, 5 frames at 8 fps, others 32x32",
        f"{folder / 'notes.txt'}: not one of the set",
        "videos of 32x32 are too small",
        "5 frames a video, at least 6",
    ):
        assert any(part in problem for problem in problems), part
    assert len(check_videos(tmp_path / "nowhere", names)[0]) == 15


def test_long_videos_are_spread_over_the_prompts(tmp_path: Path) -> None:
    pairs = read_pairs(build(tmp_path / "VBench").root)
    assert spread(pairs, 2) == [pairs[0], pairs[1]]
    assert spread(pairs, 3) == pairs
    with pytest.raises(UserError, match="1..3, got 4"):
        spread(pairs, 4)
    assert len(set(video_names(pairs))) == 15
    with pytest.raises(UserError, match="1..5, which is what VBench looks at, got 6"):
        wanted_videos(pairs, tmp_path, seeds=6)
    json.dumps([w.seed for w in wanted_videos(pairs, tmp_path)])
