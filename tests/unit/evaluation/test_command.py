"""`aad1 evaluate` from the command line: two folders, and every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aad1.cli import main
from aad1.media.writing import write_video
from aad1.worlds.sprites import SpritesConfig, draw

CONFIG = SpritesConfig(size=32, frames=17)


def folder_of(path: Path, videos: torch.Tensor, fps: float = 4.0, name: str = "clip") -> Path:
    path.mkdir(parents=True)
    for i, video in enumerate(videos):
        write_video(path / f"{name} {chr(97 + i)}-0.mp4", video, fps, scale=1)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("videos")
    real = draw(CONFIG, 20, seed=1)[0].video
    made = draw(CONFIG, 16, seed=2)[0].video
    return folder_of(root / "made", made), folder_of(root / "real", real)


def run(*args: str | Path) -> int:
    return main(["evaluate", *(str(a) for a in args)])


def test_two_folders(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = ("--world", "sprites")
    assert run(*folders, *world, "--out", tmp_path / "out", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "motion ratio M" in printed and "N 16  real" in printed
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    figures = record["sections"]["videos"]["figures"]
    assert 0.6 < figures["M"]["value"] < 1.6
    assert figures["FDtd"]["value"] > 0
    assert figures["drift_5s"]["value"] is None and "5 s" in figures["drift_5s"]["reason"]
    assert figures["FD_motion"]["value"] > 0
    assert 0.3 < figures["consistency_subject"]["value"] < 1
    assert figures["consistency_subject"]["M"] == figures["M"]["value"]
    row = (tmp_path / "out" / "videos.csv").read_text().splitlines()[0]
    assert "consistency_first_frame" in row
    assert record["facts"]["paired by name"] is True
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000


def test_a_static_folder_is_told(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = draw(CONFIG, 3, seed=2)[0].video
    still = folder_of(tmp_path / "still", video[:, :1].expand_as(video))
    assert run(still, folders[1], "--out", tmp_path / "out", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "needs at least 16 videos, 3 are there" in printed
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    figures = record["sections"]["videos"]["figures"]
    assert figures["S"]["value"] == 1.0
    assert figures["consistency_subject"]["value"] is None  # nobody said which world it is
    assert "no metric networks" in figures["consistency_subject"]["reason"]
    assert figures["M"]["value"] < 0.05
    assert figures["smoothness"]["M"] == figures["M"]["value"]


def refused(capsys: pytest.CaptureFixture[str], out: Path, *args: str | Path) -> str:
    assert run(*args, "--out", out, "--device", "cpu") == 2
    assert not out.exists()
    line = capsys.readouterr().err
    assert line.startswith("aad1: ") and line.count("\n") == 1
    return line


def test_bad_folders(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, real = folders
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "holds no video" in refused(capsys, out, tmp_path / "empty", real)
    assert "is not a folder" in refused(capsys, out, tmp_path / "none", real)
    small = draw(SpritesConfig(size=16, frames=9), 2, seed=0)[0].video
    other = folder_of(tmp_path / "small", small)
    assert "size 32x32, those of" in refused(capsys, out, other, real)
    write_video(other / "odd.mp4", torch.zeros(9, 24, 16, 3, dtype=torch.uint8), 4.0, scale=1)
    assert "must have one size" in refused(capsys, out, other, real)
    fast = folder_of(tmp_path / "fast", draw(CONFIG, 2, seed=0)[0].video, fps=8.0)
    assert "frame rate 4, those of" in refused(capsys, out, fast, real)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.mp4").write_bytes(b"no video at all")
    assert "a.mp4" in refused(capsys, out, broken, real)
    brief = draw(SpritesConfig(size=32, frames=3), 2, seed=0)[0].video
    short = folder_of(tmp_path / "short", brief)
    assert "at least 5 frames" in refused(capsys, out, short, real)
    one = folder_of(tmp_path / "one", draw(CONFIG, 1, seed=0)[0].video)
    assert "at least 2 real" in refused(capsys, out, made, one)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "exactly one"),
        (("a",), "two folders"),
        (("a", "b", "--model", "doom"), "exactly one"),
        (("a", "b", "--world", "mars"), "--world must be sprites or doom"),
        (("--model", "doom", "--clips", "0"), "--clips must be at least 1"),
        (("--model", "doom", "--long-clips", "-1"), "--long-clips must be at least 0"),
        (("--model", "doom", "--long-seconds", "0"), "--long-seconds must be above 0"),
        (("--model", "doom", "--world", "mars"), "--world must be"),
        (("--model", "doom", "--world", "mars", "--quick"), "no statistics of real clips"),
        (("--model", "doom", "--data", "nowhere"), "aad1 data doom"),
        (("--model", "doom", "--quick", "--clips", "99"), "more than the 16 packaged"),
        (("--model", "doom", "--world", "sprites"), "no preset draws sprites of 128 pixels"),
        (("--validate", "--clips", "8"), "at least 16"),
    ],
)
def test_bad_flags(
    args: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, tmp_path / "out", *args)


def test_out_must_not_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f").write_text("")
    assert run("a", "b", "--out", tmp_path / "f") == 2
    assert "is a file" in capsys.readouterr().err
