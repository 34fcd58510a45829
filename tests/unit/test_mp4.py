"""The mp4 writer: as frames come, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aad1.errors import UserError
from aad1.media.mp4 import record
from aad1.media.reading import read_video
from aad1.media.writing import write_video

NOISE = np.random.default_rng(0).integers(0, 256, (120, 48, 64, 3), dtype=np.uint8)


def size_so_far(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.mp4"))


def test_the_file_grows_as_frames_come_and_is_named_at_the_end(tmp_path: Path) -> None:
    path, sizes = tmp_path / "o.mp4", []
    with record(path, 16) as encoder:
        for _ in range(4):
            encoder.write(NOISE)
            sizes.append(size_so_far(tmp_path))
            assert not path.exists()
    assert 0 < sizes[0] < sizes[1] < sizes[2] < sizes[3] <= 1.1 * path.stat().st_size
    assert encoder.count == len(read_video(path)) == 480
    assert list(tmp_path.iterdir()) == [path]


def test_pieces_and_single_frames_make_the_video_that_write_video_makes(tmp_path: Path) -> None:
    with record(tmp_path / "a.mp4", 12.5) as encoder:
        encoder.write(NOISE[:1])
        for frame in NOISE[1:5]:
            encoder.write(frame)
        encoder.write(NOISE[5:9])
    assert write_video(tmp_path / "b.mp4", NOISE[:9], 12.5, scale=1) == 9
    a, b = (read_video(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    assert np.array_equal(a.numpy(), b.numpy())


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), record(path, 16) as encoder:
        encoder.write(NOISE[:8])
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="no frames to write"), record(path, 16):
        pass
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_odd_sizes_get_one_more_row_or_column(tmp_path: Path) -> None:
    with record(tmp_path / "o.mp4", 16) as encoder:
        encoder.write(NOISE[:4, :47, :63])
        encoder.write(NOISE[4:8, :47, :63])
    assert read_video(tmp_path / "o.mp4").shape == (8, 48, 64, 3)


@pytest.mark.parametrize(
    "frames,message",
    [
        (NOISE[:2].astype(np.float32), "frames must be uint8"),
        (NOISE[0, 0], "frames must be uint8"),
        (NOISE[:2, :32], r"a frame is \(32, 64\), the first was \(48, 64\)"),
    ],
)
def test_other_frames_are_refused(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message), record(tmp_path / "o.mp4", 16) as encoder:
        encoder.write(NOISE[:1])
        encoder.write(frames)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, 2000])
def test_impossible_rates_are_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(UserError, match=f"fps={fps}"), record(tmp_path / "o.mp4", fps):
        pass
