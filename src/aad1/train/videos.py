"""A folder of captioned videos -> latents and text embeddings in shards (`aad1 data videos`)."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aad1.data.shards import read_header, shard_name, write_manifest, write_shard
from aad1.errors import UserError
from aad1.models.codec import Codec
from aad1.models.weights import read_json, write_json
from aad1.train.wan_base import LoadText, VideoSize, store_prompts
from aad1.worlds.folder import FolderClip, FolderWorld

_ORIGIN = "origin.json"


def encode_videos(
    folder: Path,
    out: Path,
    codec: Codec,
    load_text: LoadText,
    *,
    size: VideoSize,
    origin: dict[str, Any],
    negative: str,
    device: torch.device,
    bf16: bool = False,
    clips_per_shard: int = 16,
) -> int:
    """Encode the videos of `folder` into `out`; returns how many clips `out` holds.

    load_text: gives the text encoder, called only if prompts are to be encoded, and let go of
        before the first video. origin: facts on codec and encoder; a folder begun with other facts
        or another size is refused. negative: the negative prompt, encoded along.

    A clip is known by its file's content and its place in it, so running again takes up where the
    last run stopped, and neither a second run nor a copied file gives a clip twice. Files without a
    caption, damaged, too short or copied are left out and listed at the end.

    Raises UserError for a size off the grid, another origin, or a folder without usable clips.
    """
    size.latent(codec.temporal_stride, codec.spatial_stride)
    if clips_per_shard < 1:
        raise UserError(f"clips per shard must be at least 1, got {clips_per_shard}")
    facts = origin | {"size": [size.width, size.height, size.frames, size.fps]}
    if (out / _ORIGIN).exists() and read_json(out / _ORIGIN) != facts:
        raise UserError(
            f"{out} was begun with another model, size or frame rate: remove it or change --out"
        )
    world = FolderWorld(
        folder, width=size.width, height=size.height, frames=size.frames, fps=size.fps
    )
    skipped = [f"{world.name(s.path)}: {s.reason}" for s in world.skipped]
    write_json(out / _ORIGIN, facts)
    shards = _finished(out)
    done = {key for _, keys in shards for key in keys}
    before = len(done)
    pending, copies = _pending(world, done)
    skipped += copies
    captions = [world.clips[index].caption for _, index in pending]
    store_prompts(
        out / "text", captions, load_text, negative=negative, encoder=str(origin.get("text", ""))
    )

    batch: list[tuple[str, FolderClip, np.ndarray[Any, Any]]] = []
    number = 1 + max((int(name.split("-")[1].split(".")[0]) for name, _ in shards), default=-1)
    for position, (key, index) in enumerate(pending, 1):
        clip = world.clips[index]
        try:
            video = world.batch([index]).video
        except UserError as error:
            skipped.append(f"{world.name(clip.path)}: {str(error).removeprefix(f'{clip.path} ')}")
        else:
            with _autocast(device, bf16):
                latents = codec.encode(video.to(device))
            batch.append((key, clip, latents[0].half().cpu().numpy()))
        if batch and (len(batch) == clips_per_shard or position == len(pending)):
            shards.append((shard_name(number), [k for k, _, _ in batch]))
            _write(out / shard_name(number), world, batch)
            number += 1
            batch = []
        print(f"clips {position}/{len(pending)}", file=sys.stderr, flush=True)
    if not shards:
        raise UserError(f"{folder} gives no clip: {'; '.join(skipped[:3])}")
    write_manifest(
        out, world="wan", split="train", seed=0, config=facts, tensor="latents",
        shards=[(name, len(keys)) for name, keys in shards],
    )  # fmt: skip
    total = sum(len(keys) for _, keys in shards)
    print(f"{out}: {total} clips, {total - before} of them new; {len(skipped)} skipped")
    for line in skipped:
        print(f"  {line}")
    return total


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def _finished(out: Path) -> list[tuple[str, list[str]]]:
    """(file name, clip keys) of every complete shard."""
    found = []
    for path in sorted(out.glob("shard-*.safetensors")):
        header = read_header(path)
        if header is None:
            raise UserError(f"shard {path} is damaged or foreign: remove it and run again")
        found.append((path.name, json.loads(header.get("keys", "[]"))))
    return found


def _pending(world: FolderWorld, done: set[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """(key, number) of clips still to be encoded, and a line for each file that is a copy."""
    first: dict[str, Path] = {}
    content: dict[Path, str] = {}
    pending: list[tuple[str, int]] = []
    copies = []
    for index, clip in enumerate(world.clips):
        if clip.path not in content:
            with clip.path.open("rb") as file:
                content[clip.path] = hashlib.file_digest(file, "sha256").hexdigest()[:32]
            if first.setdefault(content[clip.path], clip.path) != clip.path:
                original = world.name(first[content[clip.path]])
                copies.append(f"{world.name(clip.path)}: is a copy of {original}")
        digest = content[clip.path]
        key = f"{digest}@{clip.start:.4f}"
        if first[digest] == clip.path and key not in done:
            pending.append((key, index))
    return pending, copies


def _write(
    path: Path, world: FolderWorld, batch: list[tuple[str, FolderClip, np.ndarray[Any, Any]]]
) -> None:
    write_shard(
        path,
        np.stack([latents for _, _, latents in batch]),
        [[clip.caption] for _, clip, _ in batch],
        tensor="latents",
        metadata={
            "keys": json.dumps([key for key, _, _ in batch]),
            "files": json.dumps([world.name(clip.path) for _, clip, _ in batch]),
        },
    )
