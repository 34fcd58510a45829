"""A folder of a user's own clips: what is found, what is skipped and why, what comes out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.media.writing import write_video
from aad1.worlds.folder import FolderWorld

SIZE = {"width": 32, "height": 24}


def video(frames: int, level: int) -> torch.Tensor:
    """Grey of brightness level, level + 2, level + 4, ...: the frame tells clip and time."""
    levels = (level + 2 * torch.arange(frames)).to(torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(-1, 48, 64, 3).contiguous()


def add(folder: Path, name: str, frames: int, level: int, caption: str | None = None) -> Path:
    write_video(folder / name, video(frames, level), 16, scale=1)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder / name


def levels(clip_video: torch.Tensor) -> list[float]:
    return clip_video.float().mean((-1, -2, -3)).tolist()


def test_clips_and_captions(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", 9, 20, " walk\nforward ")
    add(tmp_path, "b.mp4", 9, 120, "turn left")
    world = FolderWorld(tmp_path, **SIZE, frames=9, frames_per_chunk=4)
    assert len(world) == 2
    assert world.skipped == ()
    assert world.report() == "2 clips of 9 frames from 2 videos"
    clips = world.batch([1])
    assert clips.video.shape == (1, 9, 24, 32, 3)
    assert clips.video.dtype == torch.uint8
    assert clips.captions == [["turn left"] * 3]
    assert levels(clips.video[0]) == pytest.approx(levels(video(9, 120)), abs=2)
    both = world.batch(range(2))
    assert both.captions == [["walk forward"] * 3, ["turn left"] * 3]
    torch.testing.assert_close(both.video[1:], clips.video)
    with pytest.raises(UserError, match="at least one clip"):
        world.batch([])


def test_long_videos_give_several_clips(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", 20, 20, "walk")
    whole = FolderWorld(tmp_path, **SIZE, frames=9)
    assert [round(clip.start * 16) for clip in whole.clips] == [0, 9]
    overlapping = FolderWorld(tmp_path, **SIZE, frames=9, hop=5)
    assert [round(clip.start * 16) for clip in overlapping.clips] == [0, 5, 10]
    assert levels(overlapping.batch([2]).video[0]) == pytest.approx(
        levels(video(20, 20)[10:19]), abs=2
    )


def test_another_rate_is_resampled(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", 20, 20, "walk")
    world = FolderWorld(tmp_path, **SIZE, frames=10, fps=8)
    assert len(world) == 1
    assert levels(world.batch([0]).video[0]) == pytest.approx(levels(video(20, 20)[1::2]), abs=2)


def test_captions_from_tables_and_their_rank(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        add(tmp_path, f"{name}.mp4", 5, 50)
    (tmp_path / "a.txt").write_text("from txt")
    (tmp_path / "captions.csv").write_text(
        'file,caption\na.mp4,from csv\nb.mp4,"from csv, quoted"\nc,from csv by stem\n'
    )
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "e.mp4", "caption": "from\u2028jsonl"}\n\n{"file": "b", "caption": "jsonl"}\n'
    )
    (tmp_path / "captions.json").write_text(
        json.dumps(
            {"e.mp4": "from json", "b.mp4": "from json", "d.mp4": "from json", "gone.mp4": "x"}
        )
    )
    world = FolderWorld(tmp_path, **SIZE, frames=5)
    found = {clip.path.name: clip.caption for clip in world.clips}
    assert found == {
        "a.mp4": "from txt",
        "b.mp4": "from csv, quoted",
        "c.mp4": "from csv by stem",
        "d.mp4": "from json",
        "e.mp4": "from jsonl",
    }
    assert [(s.path.name, s.reason) for s in world.skipped] == [
        ("gone.mp4", "has a caption but no video")
    ]


def test_folders_within(tmp_path: Path) -> None:
    """Two files of one name are two videos; a table tells them apart by their paths."""
    for name in ("a", "b", "b/c", ".hidden"):
        (tmp_path / name).mkdir()
    add(tmp_path / "a", "x.mp4", 9, 20, "in a")
    add(tmp_path / "b", "x.mp4", 9, 60)
    add(tmp_path / "b" / "c", "y.mp4", 9, 90)
    add(tmp_path / "b" / "c", "x.mp4", 9, 90)
    add(tmp_path, "z.mp4", 9, 90)
    add(tmp_path / ".hidden", "h.mp4", 9, 20, "not seen")
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\nb/x.mp4,in b\ny,in c\nz.mp4,here\nx.mp4,which\nw.mp4,none\n")
    world = FolderWorld(tmp_path, **SIZE, frames=9)
    assert {world.name(clip.path): clip.caption for clip in world.clips} == {
        "a/x.mp4": "in a", "b/x.mp4": "in b", "b/c/y.mp4": "in c", "z.mp4": "here",
    }  # fmt: skip
    assert {world.name(s.path): s.reason for s in world.skipped} == {
        "b/c/x.mp4": "no caption: 3 videos are called x.mp4; name them by their paths",
        "w.mp4": "has a caption but no video",
    }
    assert "  b/c/x.mp4: no caption" in world.report()


def test_what_is_skipped_and_why(tmp_path: Path) -> None:
    whole = add(tmp_path, "good.mp4", 9, 20, "walk").read_bytes()
    add(tmp_path, "short.mp4", 5, 20, "walk")
    add(tmp_path, "no_caption.mp4", 9, 20)
    add(tmp_path, "empty_caption.mp4", 9, 20, " \n")
    add(tmp_path, "latin1.mp4", 9, 20).with_suffix(".txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "empty.txt").write_text("walk")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.txt").write_text("walk")
    (tmp_path / "notes.md").write_text("not a video")
    world = FolderWorld(tmp_path, **SIZE, frames=9)
    assert [clip.path.name for clip in world.clips] == ["good.mp4"]
    reasons = {item.path.name: item.reason for item in world.skipped}
    assert reasons.keys() == {
        "short.mp4",
        "no_caption.mp4",
        "empty_caption.mp4",
        "latin1.mp4",
        "empty.mp4",
        "cut.mp4",
    }
    assert reasons["short.mp4"] == "too short: 0.31 s are 5 frames at 16 fps, 9 are needed"
    assert reasons["no_caption.mp4"].startswith("no caption: neither no_caption.txt nor")
    assert reasons["empty_caption.mp4"] == "no caption: empty_caption.txt is empty"
    assert "UTF-8" in reasons["latin1.mp4"]
    assert reasons["empty.mp4"] == "is empty (0 bytes)"
    assert "damaged" in reasons["cut.mp4"]
    lines = world.report().splitlines()
    assert lines[0] == "1 clips of 9 frames from 1 videos; 6 skipped:"
    assert len(lines) == 7


def test_batches_shuffle_each_round_and_repeat_by_seed(tmp_path: Path) -> None:
    for k in range(5):
        add(tmp_path, f"{k}.mp4", 3, 20 + 40 * k, f"clip {k}")
    world = FolderWorld(tmp_path, **SIZE, frames=3)

    def order(seed: int, count: int) -> list[str]:
        batches = itertools.islice(world.batches(2, seed=seed), count)
        return [captions[0] for batch in batches for captions in batch.captions]

    ten = order(0, 5)
    assert sorted(ten[:5]) == sorted(ten[5:]) == [f"clip {k}" for k in range(5)]
    assert ten == order(0, 5)
    assert ten != order(1, 5)
    assert ten[:5] != ten[5:]
    batch = next(world.batches(2, seed=0))
    assert batch.video.shape == (2, 3, 24, 32, 3)
    for clip, captions in zip(batch.video, batch.captions, strict=True):
        assert levels(clip)[0] == pytest.approx(20 + 40 * int(captions[0][-1]), abs=2)


def test_files_that_break_later_are_left_out_with_a_warning(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", 3, 20, "a")
    add(tmp_path, "b.mp4", 3, 60, "b")
    world = FolderWorld(tmp_path, **SIZE, frames=3)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"clip left out: .*a\.mp4"):
        assert [clips.captions[0][0] for clips in world] == ["b"]
    (tmp_path / "b.mp4").unlink()
    with (
        pytest.warns(UserWarning, match="clip left out"),
        pytest.raises(UserError, match="none of the 2 clips"),
    ):
        next(world.batches(1, seed=0))


def test_folders_that_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        FolderWorld(tmp_path / "nowhere", **SIZE)
    with pytest.raises(UserError, match=r"gives no clip: it holds no file that ends in \.mp4"):
        FolderWorld(tmp_path, **SIZE)
    add(tmp_path, "a.mp4", 3, 20, "a")
    with pytest.raises(UserError, match=r"gives no clip: a\.mp4 too short") as caught:
        FolderWorld(tmp_path, **SIZE, frames=81)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.json", "{", "is not valid JSON"),
        ("captions.json", "[1]", "must be {"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": 1}\n', "line 2 must be"),
        ("captions.jsonl", "[1]", "line 1 must be"),
        ("captions.jsonl", "walk", "line 1 must be"),
        ("captions.csv", "a.mp4,walk\n", "columns file, caption"),
        ("captions.csv", "file,caption\na.mp4,walk, then turn\n", "line 2 .*double quotes"),
        ("captions.csv", "file,caption\na.mp4\n", "line 2 .*columns"),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    add(tmp_path, "a.mp4", 3, 20)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        FolderWorld(tmp_path, **SIZE, frames=3)


@pytest.mark.parametrize("name", ["width", "height", "frames", "fps", "frames_per_chunk", "hop"])
def test_numbers_out_of_range(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0 must be > 0"):
        FolderWorld(tmp_path, **{**SIZE, name: 0})  # type: ignore[arg-type]
