"""Shards on disk: what is written is read, lazily, and damage is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aad1.data.batch import Clips
from aad1.data.shard_file import ShardFile
from aad1.data.shards import (
    ClipShards,
    preview_sheet,
    read_header,
    shard_name,
    write_manifest,
    write_shard,
)
from aad1.errors import UserError

CHUNKS = 3


def _captions(start: int, count: int) -> list[list[str]]:
    return [[f"clip {start + i}"] * CHUNKS for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 3 and 2 video clips; all pixels of clip i, frame t are 10 * i + t."""
    start, shards = 0, []
    for index, count in enumerate((3, 2)):
        values = 10 * np.arange(start, start + count)[:, None] + np.arange(5)
        video = np.broadcast_to(values[:, :, None, None, None], (count, 5, 4, 6, 3))
        write_shard(tmp_path / shard_name(index), video.astype(np.uint8), _captions(start, count))
        shards.append((shard_name(index), count))
        start += count
    write_manifest(tmp_path, world="test", split="train", seed=3, config={"size": 4}, shards=shards)
    return tmp_path


def test_round_trip_across_shards(folder: Path) -> None:
    clips = ClipShards(folder)
    assert len(clips) == 5
    assert clips.clip_shape == (5, 4, 6, 3)
    assert clips.manifest["seed"] == 3
    assert clips.manifest["config"] == {"size": 4}
    batch = clips.batch([4, 0, 3])  # order is the caller's, shards are crossed
    assert batch.video.dtype == torch.uint8
    assert batch.video[:, 1, 0, 0, 0].tolist() == [41, 1, 31]
    assert batch.captions == [["clip 4"] * 3, ["clip 0"] * 3, ["clip 3"] * 3]
    assert torch.equal(clips[2].video, clips.read_all().video[2:3])
    assert clips.read_all().captions == clips.captions


def test_batch_captions_are_copies(folder: Path) -> None:
    clips = ClipShards(folder)
    clips.batch([0]).captions[0][0] = "changed"
    assert clips.captions[0][0] == "clip 0"


def test_latents_under_another_name(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(2, 4, 3, 2, 2)).astype(np.float16)
    write_shard(tmp_path / shard_name(0), latents, _captions(0, 2), tensor="latents")
    write_manifest(
        tmp_path,
        world="test",
        split="train",
        seed=0,
        config={},
        shards=[(shard_name(0), 2)],
        tensor="latents",
    )
    clips = ClipShards(tmp_path)
    assert clips.tensors([1]).dtype == torch.float16
    assert np.array_equal(clips.read_tensors().numpy(), latents)
    assert np.array_equal(clips.tensors([1, 0]).numpy(), latents[::-1])
    with pytest.raises(ValueError, match="holds latents"):
        clips.batch([0])


@pytest.mark.parametrize("index", [-1, 5])
def test_index_out_of_range(folder: Path, index: int) -> None:
    with pytest.raises(IndexError):
        ClipShards(folder).batch([index])


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / shard_name(1)).unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is missing"):
        ClipShards(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard_is_named(folder: Path, keep: int) -> None:
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is cut short"):
        ClipShards(folder)
    assert read_header(path) is None


def test_a_shard_that_cannot_be_read_later_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ShardFile, rows: torch.Tensor, first: int) -> None:
        if self.path.name == shard_name(1):
            raise OSError(5, "Input/output error")

    clips = ClipShards(folder)
    monkeypatch.setattr(ShardFile, "read", broken)
    with pytest.raises(UserError, match=r"clip 3 in .*shard-00001\.safetensors: .*Input/output"):
        clips.tensors([0, 3])
    with pytest.raises(UserError, match=r"clips in .*shard-00001\.safetensors: .*Input/output"):
        clips.read_tensors()


@pytest.mark.parametrize("read", ["tensors", "read_tensors"])
def test_a_shard_that_is_cut_short_or_gone_during_a_run_is_named(folder: Path, read: str) -> None:
    """A memory map would end the process by SIGBUS here."""
    clips = ClipShards(folder)
    call = (lambda: clips.tensors([4])) if read == "tensors" else clips.read_tensors
    want = call()
    path = folder / shard_name(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(
        UserError, match=rf"shard-00001\.safetensors has {len(whole) - 200} bytes, it had"
    ):
        call()
    path.unlink()
    with pytest.raises(UserError, match=r"in .*shard-00001\.safetensors: .*No such file"):
        call()
    path.write_bytes(whole)
    assert torch.equal(call(), want)


def test_a_shard_that_is_cut_short_within_a_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = ClipShards(folder)
    real = os.stat(folder / shard_name(1))
    monkeypatch.setattr("aad1.data.shard_file.os.fstat", lambda _: real)  # asked, then cut short
    os.truncate(folder / shard_name(1), real.st_size - 100)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors has"):
        clips.tensors([4])


def test_shards_of_different_types_are_refused(folder: Path) -> None:
    video = np.zeros((2, 5, 4, 6, 3), np.float32)
    write_shard(folder / shard_name(1), video, _captions(3, 2))
    with pytest.raises(UserError, match="shard-00001.* holds numbers of torch.float32, others of"):
        ClipShards(folder)
    write_shard(folder / shard_name(1), video.astype(np.float64), _captions(3, 2))
    with pytest.raises(UserError, match="shard-00001.* is of type F64, not U8, F16"):
        ClipShards(folder)


def test_shard_of_another_length_is_named(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["clips"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-00001.*holds 2 clips.*says 3"):
        ClipShards(folder)


@pytest.mark.parametrize("content", [None, "{", '{"format": "other"}', "[]"])
def test_folder_without_manifest(folder: Path, content: str | None) -> None:
    path = folder / "manifest.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        ClipShards(folder)


def test_failed_write_leaves_the_old_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / shard_name(0)
    before = path.read_bytes()

    def broken(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, np.zeros((1, 5, 4, 6, 3), np.uint8), _captions(0, 1))
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        shard_name(0),
        shard_name(1),
    ]


def test_captions_must_match_clips(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 captions for 2 clips"):
        write_shard(tmp_path / "a.safetensors", np.zeros((2, 1, 1, 1, 3), np.uint8), [["a"]])


def test_preview_sheet_shows_first_and_last_frame(tmp_path: Path) -> None:
    video = torch.zeros(2, 9, 96, 128, 3, dtype=torch.uint8)
    video[1, 0, :, :, 0] = 250  # red first, green last
    video[1, 8, :, :, 1] = 250
    captions = [["walk"] * 3, ["walk", "walk", "turn"]]
    path = tmp_path / "sheet.png"
    preview_sheet(Clips(video=video, captions=captions), path, columns=3)
    sheet = np.asarray(Image.open(path))
    height, width, _ = sheet.shape
    assert width >= 3 * 128
    middle = height * 3 // 4 + 4  # in the second row's frames
    assert sheet[middle, 64].tolist() == [250, 0, 0]
    assert sheet[middle, width - 64].tolist() == [0, 250, 0]
