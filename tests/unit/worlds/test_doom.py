"""The doom world: what the captions say is what the frames show, and a seed gives one recording."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from aad1.data.batch import Clips
from aad1.data.shards import ClipShards, shard_name
from aad1.errors import UserError
from aad1.worlds import doom
from aad1.worlds.doom import CAPTIONS, WORDS, DoomConfig, record

needs_vizdoom = pytest.mark.skipif(find_spec("vizdoom") is None, reason="vizdoom is not installed")

SMALL = DoomConfig(clips_per_shard=4, maps_per_shard=2, maps_train=("MAP29", "E1M5", "MAP14"))


def _recorder_clips(captions: list[list[str]], config: DoomConfig = SMALL) -> Clips:
    """Clips that follow these captions, recorded in this process on MAP29."""
    recorder = doom._Recorder(config)
    try:
        game, space = recorder._game("MAP29"), recorder._space("MAP29")
        game.enter("MAP29", 1)
        rng = np.random.default_rng(0)
        video = np.empty((len(captions), config.frames, config.height, config.width, 3), np.uint8)
        for row, captions_of_clip in enumerate(captions):
            for _ in range(200):
                walk = doom._draw_walk(config, captions_of_clip, rng)
                start = doom._place_walk(space, walk, rng)
                if start and recorder._play(game, walk, *start, video[row]) is None:
                    break
            else:
                raise AssertionError(f"no place for {captions_of_clip}")
        return Clips(video=torch.from_numpy(video), captions=captions)
    finally:
        recorder.close()


def _shift(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> int:
    """Whole pixels by which the picture moved to the right, by least absolute difference."""
    a, b = (x.astype(np.float32).mean(-1) for x in (before, after))
    costs = {s: np.abs(b[:, 16 + s : 112 + s] - a[:, 16:112]).mean() for s in range(-10, 11)}
    return min(costs, key=lambda s: float(costs[s]))


# --- without the game ---


def test_vocabulary() -> None:
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 9
    assert {word for caption in CAPTIONS for word in caption.split()} == set(WORDS)


def test_default_splits_share_no_map() -> None:
    config = DoomConfig()
    assert not set(config.maps("train")) & set(config.maps("heldout"))
    assert config.chunks == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "100x96"),
        ({"frames": 80}, "frames 80"),
        ({"frames": 1}, "frames 1"),
        ({"tics_per_frame": 0}, "tics_per_frame 0"),
        ({"switch_share": 1.5}, "switch_share 1.5"),
        ({"walk_speed": (0.9, 0.5)}, "walk_speed"),
        ({"turn_speed": (0.0, 4.0)}, "turn_speed"),
        ({"gamma": 9.0}, "gamma 9"),
        ({"clips_per_shard": 0}, "clips_per_shard"),
        ({"maps_train": ("MAP33",)}, "MAP33"),
        ({"maps_train": ("map01",)}, "map01"),
        ({"maps_train": ()}, "must each name"),
        ({"maps_train": ("MAP07",)}, "both for training and held out"),
    ],
)
def test_impossible_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DoomConfig(**change)


def test_config_survives_the_manifest() -> None:
    config = replace(SMALL, gamma=2.0, walk_speed=(0.5, 0.6))
    assert doom.config_from_dict(config.as_dict()) == config


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


def test_captions_follow_the_shares() -> None:
    rng = np.random.default_rng(0)
    drawn = [doom._draw_captions(DoomConfig(), rng) for _ in range(4000)]
    changed = [c for c in drawn if len(set(c)) > 1]
    assert abs(len(changed) / len(drawn) - 1 / 3) < 0.03
    for captions in drawn:
        assert len(captions) == 6
        assert captions[0] == captions[1]
        assert sum(a != b for a, b in pairwise(captions)) <= 1
    words = [caption for captions in drawn for caption in captions[1:]]
    assert words.count("stand still") / len(words) <= 0.03
    for caption in CAPTIONS[:-1]:
        assert abs(words.count(caption) / len(words) - 1 / 8) < 0.02


def test_script_walks_at_walking_speed_and_turns_left_counter_clockwise() -> None:
    config = DoomConfig()
    forward = doom._script(config, ["walk forward"] * 6, 25.0, 2.0)
    # Doom's walk: 25/32 units of thrust a tic, friction 0.90625, so 8.33 units a tic.
    assert np.allclose(np.diff(forward.path), 2 * 25 / 32 / (1 - 0.90625))
    strafe = doom._script(config, ["strafe left"] * 6, 25.0, 2.0)
    assert np.allclose(np.diff(strafe.path) / np.diff(forward.path), 1j)
    turn = doom._script(config, ["turn left"] * 6, 25.0, 2.0)
    assert np.allclose(np.diff(turn.headings), 4.0)
    assert np.allclose(turn.path, 0)
    circle = doom._script(config, ["turn left while walking"] * 6, 25.0, 2.0)
    steps = np.diff(circle.path)
    assert np.allclose(np.abs(steps), np.abs(steps[0]))  # steady from the first frame on
    assert np.allclose(np.angle(steps[1:] / steps[:-1]), math.radians(4))


def test_reachable_keeps_to_connected_cells() -> None:
    free = np.zeros((7, 9), bool)
    free[1:6, 1:4] = True  # a room
    free[3, 4:7] = True  # a corridor, winding
    free[1:4, 6] = True
    free[5, 6:8] = True  # another room, touching by a corner only
    reached = doom._reachable(free, np.array([1]), np.array([1]))
    expected = free.copy()
    expected[5, 6:8] = False
    assert np.array_equal(reached, expected)


# --- with the game ---


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine leaves its settings in the current folder."""
    monkeypatch.chdir(tmp_path)


@needs_vizdoom
def test_frames_move_as_captions_say() -> None:
    clips = _recorder_clips(
        [[c] * 6 for c in ("turn left", "turn right", "turn left while walking", "stand still")]
        + [["turn right"] * 3 + ["turn left"] * 3]
    )
    video = clips.video.numpy()

    def shifts(clip: int, first: int, last: int) -> float:
        return float(
            np.median([_shift(video[clip, t - 1], video[clip, t]) for t in range(first, last)])
        )

    # Turning left by 3.2 to 4.8 of 90 degrees moves the picture right by 4 to 7 pixels.
    assert 3 <= shifts(0, 1, 81) <= 8
    assert -8 <= shifts(1, 1, 81) <= -3
    assert shifts(2, 1, 81) >= 2
    assert np.abs(video[3, 0].astype(int) - video[3, -1]).mean() < 2
    # The change comes at the chunk boundary: frame 32 is the last of the old action.
    assert shifts(4, 24, 33) <= -3
    assert shifts(4, 33, 42) >= 3


@needs_vizdoom
def test_walk_forward_approaches_and_backward_recedes() -> None:
    video = _recorder_clips([["walk forward"] * 6, ["walk backward"] * 6]).video.float()

    def zoom_gain(clip: int) -> float:
        """How much better a frame 4 later matches when enlarged than when shrunk by 6 %."""
        costs = []
        for t in range(4, 77, 8):
            now, later = (video[clip, f].permute(2, 0, 1)[None] for f in (t, t + 4))
            for scale, sign in ((1 / 1.06, 1), (1.06, -1)):
                theta = torch.tensor([[[scale, 0, 0], [0, scale, 0]]])
                grid = torch.nn.functional.affine_grid(theta, list(now.shape), align_corners=False)
                warped = torch.nn.functional.grid_sample(
                    now, grid, padding_mode="border", align_corners=False
                )
                costs.append(-sign * float((warped - later)[..., 16:80, 20:108].abs().mean()))
        return sum(costs)

    assert zoom_gain(0) > 0 > zoom_gain(1)


@needs_vizdoom
def test_a_held_up_player_is_noticed() -> None:
    recorder = doom._Recorder(SMALL)
    try:
        game, space = recorder._game("MAP29"), recorder._space("MAP29")
        game.enter("MAP29", 1)
        rng = np.random.default_rng(0)
        video = np.empty((81, 96, 128, 3), np.uint8)
        walk = doom._draw_walk(SMALL, ["walk forward"] * 6, rng)
        reasons = []
        while len(reasons) < 8:
            start = space.sample(rng, 1)[0].round()
            heading = float(rng.uniform(-180, 180))
            path = complex(*start) + walk.path * np.exp(1j * np.radians(heading))
            if not space.is_free(np.stack([path.real, path.imag], axis=1)).all():
                reasons.append(recorder._play(game, walk, complex(*start), heading, video))
        # The grid is careful, so a few of these walks may pass; a wall stops most of them.
        assert sum(reason == "held up" for reason in reasons) >= 5
        assert reasons.count(None) <= 2
    finally:
        recorder.close()


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
    other = doom.record_clips(SMALL, split="train", clips=2, seed=6)
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
    monkeypatch.setattr(doom, "_WORKER", "import os; os._exit(7)")
    with pytest.raises(UserError, match=r"0 of 2 clips.*shard-00000.*twice.*code 7"):
        record(SMALL, split="train", clips=2, seed=0, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@needs_vizdoom
def test_a_map_without_space_is_reported(tmp_path: Path) -> None:
    config = replace(SMALL, maps_train=("MAP31",), min_brightness=255.0)
    with pytest.raises(UserError, match=r"MAP31: no clip in"):
        record(config, split="train", clips=1, seed=0, out=tmp_path)
