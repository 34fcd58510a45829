"""Video shards -> latent shards, once, so that training never runs the codec."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from aad1.data.shards import MANIFEST, ClipShards, shard_name, write_manifest, write_shard
from aad1.errors import UserError
from aad1.models.codec import load_codec
from aad1.models.weights import read_json, write_json

_ORIGIN = "origin.json"


def _digest(codec: Path) -> dict[str, Any]:
    """sha256 of the codec's files, so that latents of another one are not taken for its own."""
    files = sorted(p for p in codec.iterdir() if p.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files))
    return {"codec": digest.hexdigest()}


@torch.no_grad()
def encode_shards(
    data: Path, codec_folder: Path, out: Path, device: torch.device, batch: int
) -> None:
    """Encode every clip of `data` (float16 latents, same captions); finished shards are kept.

    Raises UserError if `out` holds latents of another codec or recording.
    """
    shards = ClipShards(data)
    if shards.tensor != "video":
        raise UserError(f"{data} holds {shards.tensor}, not video")
    codec = load_codec(codec_folder, device=device)
    made_by = _digest(codec_folder)
    if (out / MANIFEST).exists() or any(out.glob("shard-*")):
        before = read_json(out / _ORIGIN) if (out / _ORIGIN).exists() else {}
        if before != made_by | {"data": shards.manifest["config"]}:
            raise UserError(
                f"{out} holds latents of another codec or recording: remove it or change --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _ORIGIN, made_by | {"data": shards.manifest["config"]})
    listed: list[tuple[str, int]] = []
    start = 0
    for index, entry in enumerate(shards.manifest["shards"]):
        count = int(entry["clips"])
        name = shard_name(index)
        if not (out / name).exists():
            numbers = range(start, start + count)
            video = shards.tensors(numbers)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                parts = [codec.encode(v.to(device)).half().cpu() for v in video.split(batch)]
            captions = [shards.captions[i] for i in numbers]
            write_shard(out / name, torch.cat(parts).numpy(), captions, tensor="latents")
        listed.append((name, count))
        start += count
    write_manifest(
        out, world=shards.manifest["world"], split=shards.manifest["split"],
        seed=shards.manifest["seed"], config=shards.manifest["config"], tensor="latents",
        shards=listed,
    )  # fmt: skip
    print(f"{out}: {start} clips encoded")
