"""What a folder has of a recording, without the game."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aad1.data.shards import ClipShards, read_header
from aad1.errors import UserError
from aad1.worlds.doom import DoomConfig
from aad1.worlds.doom.job import Job, Shard

CONFIG = DoomConfig(clips_per_shard=4)


def _write(job: Job, shard: Shard) -> None:
    captions = [["turn left"]] * shard.clips
    job.write(shard, np.zeros((shard.clips, 1, 2, 2, 3), np.uint8), captions)


@pytest.mark.parametrize(
    ("clips", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4]), (15, [4, 4, 4, 3])]
)
def test_shards_are_full_but_for_the_last(tmp_path: Path, clips: int, sizes: list[int]) -> None:
    shards = Job(CONFIG, "train", 0, tmp_path).shards(clips)
    assert [shard.clips for shard in shards] == sizes
    assert [shard.number for shard in shards] == list(range(len(sizes)))


def test_only_whole_shards_of_the_same_recording_count(tmp_path: Path) -> None:
    job, shard = Job(CONFIG, "train", 0, tmp_path), Shard(1, 4)
    assert not job.has(shard)
    _write(job, shard)
    assert job.has(shard)
    assert not job.has(Shard(1, 3))
    for other in (
        replace(job, seed=1),
        replace(job, split="heldout"),
        replace(job, config=replace(CONFIG, gamma=2.0)),
    ):
        assert not other.has(shard)
    assert replace(job, folder=tmp_path / ".." / tmp_path.name).has(shard)
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:-1])
    assert not job.has(shard)


def test_recordings_of_earlier_versions_are_recognised(tmp_path: Path) -> None:
    # Changes with DoomConfig's fields and defaults; with anything else it must not.
    job = Job(DoomConfig(), "train", 3, tmp_path)
    _write(job, Shard(0, 4))
    header = read_header(tmp_path / "shard-00000.safetensors")
    assert header is not None
    assert (header["identity"], header["clips"]) == ("961e868731278c12", "4")


def test_a_manifest_claims_the_folder(tmp_path: Path) -> None:
    job, shards = Job(CONFIG, "train", 0, tmp_path), [Shard(0, 4), Shard(1, 1)]
    job.check_folder()
    for shard in shards:
        _write(job, shard)
    job.write_manifest(shards)
    assert len(ClipShards(tmp_path)) == 5
    job.check_folder()
    with pytest.raises(UserError, match=r"another recording \(doom, split train, seed 0\)"):
        replace(job, split="heldout").check_folder()


def test_a_worker_gets_the_same_job(tmp_path: Path) -> None:
    job = Job(replace(CONFIG, walk_speed=(0.5, 0.6)), "heldout", 7, tmp_path.resolve())
    line = job.to_json()
    assert "\n" not in line
    assert Job.from_json(line) == job
