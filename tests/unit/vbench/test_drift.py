"""The drift score against its formula, and pieces that are the video's own frames."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from aad1.errors import UserError
from aad1.media.mp4 import record
from aad1.vbench.drift import cut_pieces, drift, drift_scores
from vbench_standin import moving


def planes(path: Path) -> np.ndarray[Any, Any]:
    """The YCbCr values that a file decodes to."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="yuv420p") for f in container.decode(video=0)])


def test_pieces_are_the_video_bit_for_bit(tmp_path: Path) -> None:
    with record(tmp_path / "long.mp4", 8.0, 10) as encoder:
        encoder.write(moving(0, frames=27, side=48).numpy())
    assert cut_pieces(tmp_path / "long.mp4", tmp_path / "pieces", "0007", 8) == 3
    names = sorted(p.name for p in (tmp_path / "pieces").iterdir())
    assert names == ["0007-0.mp4", "0007-1.mp4", "0007-2.mp4"]
    whole = planes(tmp_path / "long.mp4")
    parts = [planes(tmp_path / "pieces" / name) for name in names]
    assert [len(part) for part in parts] == [8, 8, 8]  # the last three frames are left out
    np.testing.assert_array_equal(np.concatenate(parts), whole[:24])
    with av.open(str(tmp_path / "pieces" / names[0])) as piece:
        stream = piece.streams.video[0]
        assert float(stream.average_rate or 0) == 8
        assert stream.codec_context.colorspace == 1  # or a reader would convert it differently


def test_a_video_shorter_than_a_piece_is_refused(tmp_path: Path) -> None:
    with record(tmp_path / "short.mp4", 8.0) as encoder:
        encoder.write(moving(0, side=32).numpy())
    with pytest.raises(UserError, match=r"short.mp4 has 5 frames, fewer than one piece of 8"):
        cut_pieces(tmp_path / "short.mp4", tmp_path / "pieces", "0", 8)


def test_drift_is_the_population_deviation_of_segment_means() -> None:
    pieces = [70.0, 71.0, 68.0, 66.0, 66.5, 60.0, 59.0]
    segments = [(70 + 71) / 2, (68 + 66) / 2, (66.5 + 60) / 2]  # the seventh second is left over
    assert drift(pieces, 2) == pytest.approx(statistics.pstdev(segments))
    assert drift(pieces, 1) == pytest.approx(statistics.pstdev(pieces))
    assert drift([64.0] * 20, 5) == 0
    with pytest.raises(UserError, match="at least 2 segments of 5 s, a video of 7 s has 1"):
        drift(pieces, 5)


def test_scores_are_means_over_videos_and_say_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    videos = {str(k): rng.uniform(50, 80, 20).tolist() for k in range(6)}
    found = drift_scores(videos)
    of_each = [statistics.pstdev(np.reshape(v, (10, 2)).mean(1)) for v in videos.values()]
    two = found["2s"]
    assert isinstance(two, dict)
    assert two["mean"] == pytest.approx(statistics.mean(of_each))
    assert two["standard_error"] == pytest.approx(statistics.stdev(of_each) / 6**0.5)
    assert two["videos"] == 6
    short = drift_scores({"a": [70.0, 60.0, 50.0, 40.0]})
    assert short["1s"] == {"mean": pytest.approx(125**0.5), "videos": 1}
    assert short["5s"] == "not computed: drift needs at least 2 segments of 5 s, a video of 4 s " \
        "has 0"  # fmt: skip
