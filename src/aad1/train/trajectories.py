"""Teacher trajectories for stage I: sampled once, kept as shards, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from aad1.atomic import replace_file
from aad1.pipeline import Pipeline
from aad1.rollout.teacher import sample
from aad1.stages.base import Conditioner
from aad1.train.config import TrajectoryConfig
from aad1.train.log import RunLog
from aad1.train.sources import Source, key


@torch.no_grad()
def trajectories(
    teacher: Pipeline,
    conditioner: Conditioner,
    source: Source,
    sigmas: tuple[float, ...],
    config: TrajectoryConfig,
    folder: Path,
    log: RunLog,
    *,
    bf16: bool,
) -> tuple[torch.Tensor, list[list[str]]]:
    """Trajectories [N, len(sigmas) + 1, C, F, h, w] (float16) and their captions.

    Prompts are those of the source's first clips, and so is the first frame if config.from_image
    (otherwise the teacher draws its own). Written one file a batch, named by what made it, so an
    interrupted run goes on.
    """
    device = teacher.device
    parts, captions = [], []
    identity = key(teacher.info.sha256, sigmas, config)
    for number, start in enumerate(range(0, config.clips, config.batch)):
        count = min(config.batch, config.clips - start)
        batch = source.batch(start, count)
        captions += batch.captions
        first = batch.latents[:, :, :1].sum(dim=(1, 2, 3, 4)).tolist() if config.from_image else []
        name = key(identity, batch.captions, first) % 10**12
        path = folder / f"trajectories-{name:012d}-{number:04d}.safetensors"
        if not path.exists():
            rng = torch.Generator(device=device).manual_seed(key("trajectory", identity, number))
            noise = torch.randn(batch.latents.shape, generator=rng, device=device)
            text = conditioner(batch.captions, noise.shape[2])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x0, states = sample(
                    teacher.transformer,
                    noise,
                    text,
                    conditioner.null(text),
                    steps=config.steps,
                    shift=config.shift,
                    guidance_scale=config.guidance_scale,
                    keep=sigmas,
                    image=batch.latents[:, :, :1] if config.from_image else None,
                )
            states = torch.cat([states, x0[:, None]], 1).half().cpu()
            with replace_file(path) as temporary:
                save_file({"states": states}, temporary, {"captions": json.dumps(batch.captions)})
        parts.append(load_file(path)["states"])
        log.say(f"trajectories {start + count}/{config.clips}")
    return torch.cat(parts), captions
