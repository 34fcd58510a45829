"""`aad1 data`: any world's clips as shards, with a sheet to look at."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

from aad1.data.batch import Clips
from aad1.data.shards import (
    ClipShards,
    preview_sheet,
    shard_name,
    write_manifest,
    write_shard,
)
from aad1.errors import UserError

_CLIPS_PER_SHARD = 32


def write_world(
    world: str,
    out: Path,
    *,
    clips: int,
    split: str = "train",
    seed: int = 0,
    workers: int = 2,
    size: int = 64,
    width: int = 128,
    height: int = 96,
    frames: int | None = None,
    fps: float = 16.0,
) -> ClipShards:
    """Write `clips` clips of "sprites", "doom" or a folder of mp4 files to `out`.

    Returns the shards; preview.png beside them shows the first clips with their captions.
    Raises UserError for an unknown world, a bad number, or a folder without usable clips.
    """
    if clips < 1:
        raise UserError(f"--clips must be at least 1, got {clips}")
    if split not in ("train", "heldout"):
        raise UserError(f"--split must be train or heldout, got {split!r}")
    if world == "sprites":
        shards = _sprites(out, clips, seed, size, frames or 21, split)
    elif world == "doom":
        from aad1.worlds.doom import DoomConfig, record

        shards = record(
            DoomConfig(frames=frames or 81),
            split=split,  # type: ignore[arg-type]
            clips=clips,
            seed=seed,
            out=out,
            workers=min(workers, os.cpu_count() or 1),
            progress=_progress,
        )
    elif Path(world).is_dir():
        shards = _folder(Path(world), out, clips, width, height, frames or 81, fps)
    else:
        raise UserError(f"world must be sprites, doom or an existing folder, got {world!r}")
    preview_sheet(shards.batch(range(min(8, len(shards)))), out / "preview.png")
    return shards


def _progress(done: int, total: int) -> None:
    print(f"clips {done}/{total}", file=sys.stderr, flush=True)


def _sprites(out: Path, clips: int, seed: int, size: int, frames: int, split: str) -> ClipShards:
    from aad1.worlds.sprites import SpritesConfig, draw

    config = SpritesConfig(size=size, frames=frames)
    listed = []
    for index, start in enumerate(range(0, clips, _CLIPS_PER_SHARD)):
        count = min(_CLIPS_PER_SHARD, clips - start)
        made, _ = draw(config, count, seed=seed + (split == "heldout") * 2**32, start=start)
        listed.append(_write(out, index, made))
        _progress(start + count, clips)
    write_manifest(
        out, world="sprites", split=split, seed=seed, config=asdict(config), shards=listed
    )
    return ClipShards(out)


def _folder(
    folder: Path, out: Path, clips: int, width: int, height: int, frames: int, fps: float
) -> ClipShards:
    from aad1.worlds.folder import FolderWorld

    world = FolderWorld(folder, width=width, height=height, frames=frames, fps=fps)
    total = min(clips, len(world))
    listed = []
    for index, start in enumerate(range(0, total, _CLIPS_PER_SHARD)):
        numbers = range(start, min(total, start + _CLIPS_PER_SHARD))
        listed.append(_write(out, index, world.batch(numbers)))
        _progress(numbers.stop, total)
    config = {"folder": folder.name, "width": width, "height": height, "frames": frames}
    write_manifest(out, world=folder.name, split="train", seed=0, config=config, shards=listed)
    return ClipShards(out)


def _write(out: Path, index: int, clips: Clips) -> tuple[str, int]:
    name = shard_name(index)
    write_shard(out / name, clips.video.cpu().numpy(), clips.captions)
    return name, len(clips.captions)
