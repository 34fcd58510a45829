"""Video shards -> latent shards, once, so that training never runs the codec."""

from __future__ import annotations

from pathlib import Path

import torch

from aad1.data.shards import ClipShards, shard_name, write_manifest, write_shard
from aad1.errors import UserError
from aad1.models.codec import load_codec


@torch.no_grad()
def encode_shards(
    data: Path, codec_folder: Path, out: Path, device: torch.device, batch: int
) -> None:
    """Encode every clip of `data` (float16 latents, same captions); finished shards are kept."""
    shards = ClipShards(data)
    if shards.tensor != "video":
        raise UserError(f"{data} holds {shards.tensor}, not video")
    codec = load_codec(codec_folder, device=device)
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
