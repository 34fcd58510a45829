"""Shards in a folder: a seed gives one recording, whatever happens to the workers."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from aad1.data.shards import ClipShards, shard_name
from aad1.errors import UserError
from aad1.worlds.doom import DoomConfig, record, record_clips, worker

needs_vizdoom = pytest.mark.skipif(find_spec("vizdoom") is None, reason="vizdoom is not installed")

SMALL = DoomConfig(clips_per_shard=4, maps_per_shard=2, maps_train=("MAP29", "E1M5", "MAP14"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"clips": 0}, "clips 0"), ({"workers": 0}, "workers 0"), ({"split": "test"}, "split 'test'")],
)
def test_impossible_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"split": "train", "clips": 1, "seed": 0, "out": tmp_path / "x"}
    with pytest.raises(UserError, match=message):
        record(SMALL, **(given | arguments))
    assert not (tmp_path / "x").exists()


def test_missing_vizdoom_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(UserError, match=r"pip install aad1\[doom\]"):
        record(SMALL, split="train", clips=1, seed=0, out=tmp_path)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClipShards]:
    folder = tmp_path_factory.mktemp("doom")
    return folder, record(SMALL, split="train", clips=10, seed=5, out=folder, workers=2)


@needs_vizdoom
def test_recording_is_seeded_and_independent_of_workers(
    recording: tuple[Path, ClipShards], tmp_path: Path
) -> None:
    clips = recording[1].read_all()
    assert clips.video.shape == (10, 81, 96, 128, 3)
    assert [entry["clips"] for entry in recording[1].manifest["shards"]] == [4, 4, 2]
    again = record(SMALL, split="train", clips=6, seed=5, out=tmp_path / "a", workers=1).read_all()
    assert again.captions == clips.captions[:6]
    assert torch.equal(again.video, clips.video[:6])
    other = record_clips(SMALL, split="train", clips=2, seed=6)
    assert not torch.equal(other.video, clips.video[:2])


@needs_vizdoom
def test_pictures_are_lit_varied_and_in_motion(recording: tuple[Path, ClipShards]) -> None:
    video = recording[1].read_all().video.float()
    ends = video[:, ::16]
    assert ends.mean(dim=(2, 3, 4)).min() >= SMALL.min_brightness
    assert ends.std(dim=(2, 3)).mean(-1).min() >= SMALL.min_contrast
    for clip, captions in zip(video, recording[1].captions, strict=True):
        for chunk in range(1, 6):
            if captions[chunk] != "stand still":
                change = (clip[16 * chunk] - clip[16 * chunk - 8]).abs().mean()
                assert change >= SMALL.min_change


@needs_vizdoom
def test_complete_shards_are_kept_and_damaged_ones_made_anew(
    recording: tuple[Path, ClipShards],
) -> None:
    folder, clips = recording
    before = clips.read_all().video.clone()
    times = {i: (folder / shard_name(i)).stat().st_mtime_ns for i in range(3)}
    damaged = folder / shard_name(1)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    seen: list[tuple[int, int]] = []
    again = record(
        SMALL,
        split="train",
        clips=10,
        seed=5,
        out=folder,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(6, 10), (10, 10)]
    assert torch.equal(again.read_all().video, before)
    assert (folder / shard_name(0)).stat().st_mtime_ns == times[0]
    with pytest.raises(UserError, match="holds another recording"):
        record(SMALL, split="train", clips=10, seed=6, out=folder)


@needs_vizdoom
def test_a_crashed_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PROGRAM", "import os; os._exit(7)")
    with pytest.raises(UserError, match=r"0 of 2 clips.*shard-00000.*twice.*code 7"):
        record(SMALL, split="train", clips=2, seed=0, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@needs_vizdoom
def test_a_map_without_space_is_reported(tmp_path: Path) -> None:
    config = replace(SMALL, maps_train=("MAP31",), min_brightness=255.0)
    with pytest.raises(UserError, match=r"MAP31: no clip in"):
        record(config, split="train", clips=1, seed=0, out=tmp_path)
