"""Where batches come from: positions, epochs, worlds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from aad1.data.shards import shard_name, write_manifest, write_shard
from aad1.errors import UserError
from aad1.models.codec import PixelCodec
from aad1.train.config import LatentData, SpritesData
from aad1.train.sources import (
    LatentWorld,
    ShardSource,
    SpritesWorld,
    key,
    open_world,
    permuted,
)
from aad1.worlds.sprites import SpritesConfig

CPU = torch.device("cpu")
TINY = SpritesData(world=SpritesConfig(size=32, frames=5), stride=4)


def test_keys_are_stable_and_distinct() -> None:
    # The same in every process and on every machine: runs are resumed elsewhere.
    assert key("epoch", 0, 1) == key("epoch", 0, 1)
    assert key("a") == 1702698405120146464
    assert len({key("epoch", s, e) for s in range(20) for e in range(20)}) == 400
    assert 0 <= key("x") < 2**63


def test_every_epoch_shows_every_sample_once() -> None:
    order = permuted(0, 30, 10, seed=3)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert permuted(0, 10, 10, seed=4) != order[:10]


def test_a_position_is_the_whole_state() -> None:
    order = permuted(0, 40, 7, seed=0)
    for start, count in ((0, 5), (5, 9), (13, 1), (20, 20)):
        assert permuted(start, count, 7, seed=0) == order[start : start + count]


def test_sprites_batches_are_a_function_of_position() -> None:
    source = SpritesWorld(TINY, 0, CPU).train()
    whole = source.batch(0, 6)
    assert whole.latents.shape == (6, 48, 5, 8, 8)
    assert [len(c) for c in whole.captions] == [2] * 6
    part = SpritesWorld(TINY, 0, CPU).train().batch(3, 3)
    assert torch.equal(part.latents, whole.latents[3:])
    assert part.captions == whole.captions[3:]
    other = SpritesWorld(TINY, 1, CPU).train().batch(0, 6)
    assert not torch.equal(other.latents, whole.latents)


def test_held_out_sprites_are_fixed_and_apart_from_training() -> None:
    worlds = [SpritesWorld(TINY, seed, CPU) for seed in (0, 1)]
    (video, batch), (again, _) = (w.heldout(4) for w in worlds)
    assert torch.equal(video, again)
    assert torch.equal(worlds[0].codec.decode(batch.latents), video)
    train = worlds[0].train().batch(0, 64).latents
    for clip in batch.latents:
        assert not any(torch.equal(clip, t) for t in train)
    longer, _ = worlds[0].heldout(2, frames=9)
    assert longer.shape[1] == 9


def test_shards_give_latents_and_trajectories() -> None:
    states = torch.arange(6.0).view(6, 1, 1, 1, 1, 1).expand(6, 2, 3, 5, 2, 2).clone()
    states[:, 1] += 100
    captions = [[str(i)] for i in range(6)]
    batch = ShardSource(states, captions, 0, CPU, trajectory=True).batch(4, 5)
    assert batch.trajectory is not None and batch.trajectory.shape == (5, 2, 3, 5, 2, 2)
    assert torch.equal(batch.latents, batch.trajectory[:, -1])
    for row, caption in zip(batch.latents, batch.captions, strict=True):
        assert float(row.mean()) == 100 + int(caption[0])
    plain = ShardSource(states[:, 0].half(), captions, 0, CPU).batch(0, 6)
    assert plain.trajectory is None
    assert plain.latents.dtype == torch.float32
    assert Counter(c[0] for c in plain.captions) == Counter("012345")


@pytest.fixture
def latent_data(tmp_path: Path) -> LatentData:
    codec = PixelCodec(4)
    codec.save_pretrained(tmp_path / "codec")
    rng = np.random.default_rng(0)
    for split, clips in (("train", 6), ("heldout", 3)):
        video = torch.from_numpy(rng.integers(0, 256, (clips, 5, 8, 8, 3), dtype=np.uint8))
        latents = codec.encode(video).half().numpy()
        captions = [["walk", f"turn {split}"] for _ in range(clips)]
        folder = tmp_path / split
        write_shard(folder / shard_name(0), latents, captions, tensor="latents")
        write_manifest(folder, world="doom", split=split, seed=0, config={}, tensor="latents",
                       shards=[(shard_name(0), clips)])  # fmt: skip
    return LatentData(
        train=tmp_path / "train", heldout=tmp_path / "heldout", codec=tmp_path / "codec"
    )


def test_a_latent_world_reads_its_folders(latent_data: LatentData) -> None:
    world = open_world(latent_data, 0, CPU)
    assert isinstance(world, LatentWorld)
    assert world.frames == 5
    assert world.words == ("train", "turn", "walk")
    assert world.train().batch(0, 4).latents.shape == (4, 48, 5, 2, 2)
    video, batch = world.heldout(3, frames=5)
    assert video.shape == (3, 5, 8, 8, 3)
    assert torch.equal(world.codec.decode(batch.latents), video)
    assert batch.captions[0] == ["walk", "turn heldout"]
    assert world.heldout(2, frames=1)[0].shape[1] == 1


def test_a_latent_world_names_what_it_lacks(latent_data: LatentData, tmp_path: Path) -> None:
    world = open_world(latent_data, 0, CPU)
    with pytest.raises(UserError, match="holds 3 clips, 4 were asked for"):
        world.heldout(4)
    with pytest.raises(UserError, match="5 latent frames, not 9"):
        world.heldout(1, frames=9)
    gone = LatentData(train=tmp_path / "none", heldout=latent_data.heldout, codec=latent_data.codec)
    with pytest.raises(UserError, match="none does not exist: record with `aad1 data doom`"):
        open_world(gone, 0, CPU)
