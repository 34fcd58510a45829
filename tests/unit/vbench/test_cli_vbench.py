"""`aad1 vbench videos`: a model's set, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from aad1 import cli
from aad1.media.images import read_image
from aad1.media.reading import probe_video, read_video
from aad1.pipeline import Pipeline
from aad1.vbench.protocol import Places
from vbench_standin import build

Build = Callable[..., Pipeline]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return build(tmp_path / "VBench")


def videos(places: Places, model: Path, *more: object) -> int:
    """Exit code of `aad1 vbench videos ...`."""
    out = places.root.parent / "out"
    words = ["vbench", "videos", "--model", model, "--vbench-root", places.root, "--out", out]
    return cli.main([str(word) for word in [*words, "--device", "cpu", *more]])


def test_a_model_s_set_has_vbench_s_names_lengths_and_first_frames(
    tiny_pipeline: Build, places: Places, capsys: Capture
) -> None:
    root = places.root.parent
    tiny_pipeline().save_pretrained(root / "model")
    assert videos(places, root / "model", "--seconds", 2, "--seeds", 2, "--seed", 7) == 0
    out, err = capsys.readouterr()
    assert "6 videos made, 6 of 6 are there" in out
    assert "not the published set: 2 videos a prompt, published 5" in err
    names = sorted(p.name for p in (root / "out" / "videos").iterdir())
    assert names == sorted(
        f"{p}-{k}.mp4" for p in ("a dog runs", "a lake, with fog", "A cat sleeps.") for k in (0, 1)
    )
    info = probe_video(root / "out" / "videos" / "a lake, with fog-1.mp4")
    assert (info.width, info.height, info.frames) == (16, 16, 9)  # 1 + 2 chunks of 4, at 4 fps
    record = json.loads((root / "out" / "videos.json").read_text())
    assert record["seeds"]["a lake, with fog-1.mp4"] == 7 + 3
    assert record["settings"]["passes_per_chunk"] == 1

    # The first frame is the prompt's own image, as the model sees it.
    found = read_video(root / "out" / "videos" / "A cat sleeps.-0.mp4")[0].float()
    distances = {
        image.name: float((found - read_image(image, width=16, height=16).float()).abs().mean())
        for image in places.images.iterdir()
    }
    assert min(distances, key=lambda name: distances[name]) == "A cat sleeps..png"

    assert videos(places, root / "model", "--seconds", 2, "--seeds", 2, "--seed", 7) == 0
    assert "0 videos made, 6 of 6 are there" in capsys.readouterr().out
    assert videos(places, root / "model", "--seconds", 3, "--seeds", 2, "--seed", 7) == 2
    assert "was begun with seconds 2.0, not 3.0" in capsys.readouterr().err


def test_the_drift_set_is_longer_and_lies_beside(
    tiny_pipeline: Build, places: Places, capsys: Capture
) -> None:
    root = places.root.parent
    tiny_pipeline().save_pretrained(root / "model")
    assert videos(places, root / "model", "--drift", "--drift-videos", 2) == 0
    found = sorted((root / "out" / "drift").iterdir())
    assert [p.name for p in found] == ["a dog runs-0.mp4", "a lake, with fog-0.mp4"]
    assert probe_video(found[0]).frames == 81  # 20 s at 4 fps, rounded up to whole chunks
    assert videos(places, root / "model", "--drift", "--drift-videos", 9) == 2
    assert "must be in 1..3, got 9" in capsys.readouterr().err


def test_a_teacher_cannot_make_the_set(
    tiny_pipeline: Build, places: Places, capsys: Capture
) -> None:
    tiny_pipeline("teacher").save_pretrained(places.root.parent / "teacher")
    assert videos(places, places.root.parent / "teacher") == 2
    assert "teacher and cannot stream" in capsys.readouterr().err
    assert not (places.root.parent / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--part", "x"], "--part must be i/n"),
        (["--part", "3/3"], "--part must be i/n"),
        (["--seeds", "6"], "1..5, which is what VBench looks at, got 6"),
        (["--ratio", "7-4"], "3 of 3 images are missing, for example"),
        (["--size", "17x16"], "17 is not divisible"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(
    tiny_pipeline: Build, places: Places, capsys: Capture, flags: list[str], says: str
) -> None:
    tiny_pipeline().save_pretrained(places.root.parent / "model")
    capsys.readouterr()
    assert videos(places, places.root.parent / "model", *flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1]
    assert err[-1].startswith("aad1: ")
    assert not (places.root.parent / "out").exists()
