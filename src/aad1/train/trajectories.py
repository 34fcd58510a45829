"""Teacher trajectories for stage I: sampled once, kept as shards, resumable.

`trajectories` serves the small worlds from within a run; `write_trajectories` makes a folder of
shards for Wan beforehand (`aad1 data trajectories`). Both sample with `solve`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aad1.atomic import replace_file
from aad1.data.shards import MANIFEST, read_header, shard_name, write_manifest, write_shard
from aad1.errors import UserError
from aad1.models.dit import WanTransformer
from aad1.models.weights import read_json, write_json
from aad1.pipeline import Pipeline
from aad1.rollout.solvers import grid
from aad1.rollout.teacher import on_grid, sample
from aad1.stages.base import Conditioner
from aad1.train.config import TrajectoryConfig
from aad1.train.log import RunLog
from aad1.train.sources import Source, key

_ORIGIN = "origin.json"


@torch.no_grad()
def solve(
    teacher: WanTransformer,
    conditioner: Conditioner,
    noise: torch.Tensor,
    captions: list[list[str]],
    sigmas: tuple[float, ...],
    config: TrajectoryConfig,
    *,
    bf16: bool,
    image: torch.Tensor | None = None,
) -> torch.Tensor:
    """The teacher's states at `sigmas` and its end point, float16 [B, len(sigmas) + 1, C, F, h, w].

    noise: [B, C, F, h, w]; image: clean first frames that stay as they are, or None.
    """
    text = conditioner(captions, noise.shape[2])
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=bf16):
        x0, states = sample(
            teacher,
            noise,
            text,
            conditioner.null(text),
            steps=config.steps,
            shift=config.shift,
            guidance_scale=config.guidance_scale,
            keep=sigmas,
            image=image,
        )
    return torch.cat([states, x0[:, None]], 1).half().cpu()


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
            image = batch.latents[:, :, :1] if config.from_image else None
            states = solve(
                teacher.transformer, conditioner, noise, batch.captions, sigmas, config,
                bf16=bf16, image=image,
            )  # fmt: skip
            with replace_file(path) as temporary:
                save_file({"states": states}, temporary, {"captions": json.dumps(batch.captions)})
        parts.append(load_file(path)["states"])
        log.say(f"trajectories {start + count}/{config.clips}")
    return torch.cat(parts), captions


def write_trajectories(
    out: Path,
    teacher: WanTransformer,
    conditioner: Conditioner,
    captions: Sequence[str],
    shape: tuple[int, int, int, int],
    sigmas: tuple[float, ...],
    config: TrajectoryConfig,
    *,
    made_by: str,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    bf16: bool = False,
) -> bool:
    """Sample config.clips trajectories into a folder of shards; returns whether all are there.

    captions: clip n gets caption n modulo their number. shape: (C, F, h, w) of a clip. Noise
    depends on (seed, n) alone and is drawn on the CPU: not on batch, part or device.
    made_by: what tells the teacher and the prompts from others. part: (i, n), do every n-th shard
    from the i-th on; whichever run finds all shards there writes the manifest.
    One shard is config.batch clips. Shards that are there are kept.

    Raises UserError if `out` was begun with other settings, or a level is not on the grid.
    """
    if config.from_image:
        raise UserError("trajectories.from_image needs clips; Wan's teacher draws its own frames")
    facts = {
        "sigmas": list(sigmas), "steps": config.steps, "shift": config.shift,
        "guidance_scale": config.guidance_scale, "clips": config.clips, "batch": config.batch,
        "shape": list(shape), "seed": seed, "made_by": made_by,
        "captions": f"{key(*captions):016x}",
    }  # fmt: skip
    on_grid(sigmas, grid("exact", config.steps, config.shift).sigmas, config.shift)
    mine = shards_of_part(config, part)
    begin(out, facts)
    for done, (number, clips) in enumerate(mine, 1):
        path = out / shard_name(number)
        if read_header(path) is None:
            noise = torch.stack([_noise(seed, clip, shape) for clip in clips]).to(teacher.device)
            told = [[captions[clip % len(captions)]] for clip in clips]
            states = solve(teacher, conditioner, noise, told, sigmas, config, bf16=bf16)
            write_shard(path, states.numpy(), told, tensor="states")
        print(f"trajectory shards {done}/{len(mine)}", file=sys.stderr, flush=True)
    return finish(out, facts, [len(clips) for _, clips in shards_of_part(config, (0, 1))])


def shards_of_part(config: TrajectoryConfig, part: tuple[int, int]) -> list[tuple[int, range]]:
    """(number, clips) of the shards that part i of n makes: every n-th from the i-th on.

    UserError unless 0 <= i < n.
    """
    index, parts = part
    if not 0 <= index < parts:
        raise UserError(f"--part must be i/n with 0 <= i < n, got {index}/{parts}")
    starts = range(0, config.clips, config.batch)
    shards = [range(start, min(start + config.batch, config.clips)) for start in starts]
    return [(n, clips) for n, clips in enumerate(shards) if n % parts == index]


def begin(out: Path, facts: dict[str, Any]) -> None:
    """Note what makes the shards of `out`; UserError if it was begun with anything else."""
    path = out / _ORIGIN
    if path.exists():
        before = read_json(path)
        for name, value in facts.items():
            if before.get(name) != value:
                raise UserError(
                    f"{out} was begun with {name} {before.get(name)!r}, now it is {value!r}: "
                    "remove it or change --out"
                )
    write_json(path, facts)


def finish(out: Path, facts: dict[str, Any], sizes: Sequence[int]) -> bool:
    """Write the manifest if all shards (of so many clips) are there; returns whether they are."""
    missing = [n for n in range(len(sizes)) if read_header(out / shard_name(n)) is None]
    if missing:
        print(f"{out}: {len(sizes) - len(missing)} of {len(sizes)} shards are there")
        return False
    listed = [(shard_name(n), size) for n, size in enumerate(sizes)]
    write_manifest(
        out, world="wan", split="train", seed=int(facts.get("seed", 0)), config=facts,
        shards=listed, tensor="states",
    )  # fmt: skip
    print(f"{out / MANIFEST}: {sum(sizes)} trajectories")
    return True


def _noise(seed: int, clip: int, shape: tuple[int, ...]) -> torch.Tensor:
    rng = torch.Generator().manual_seed(key("trajectory", seed, clip))
    return torch.randn(shape, generator=rng)
