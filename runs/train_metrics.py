"""Trains the two metric networks of a world on real clips (a few minutes on a CPU).

    python runs/train_metrics.py sprites
    aad1 data doom --split train --clips 320 --seed 3 --out out/data/doom-metrics
    python runs/train_metrics.py doom --data out/data/doom-metrics

Writes src/aad1/packaged/metric_networks/WORLD.safetensors and prints figures on clips that were not
trained on: how often a frame's nearest neighbour among 64 videos is of its own video, and how much
of what moves is told. Neither sees what is measured later; the drawn clips have seeds of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from aad1.data.shards import ClipShards
from aad1.evaluate.networks import (
    PACKAGED,
    Networks,
    NetworksConfig,
    frames_of,
    windows_of,
)
from aad1.train.sources import key
from aad1.worlds.doom import CAPTIONS
from aad1.worlds.sprites import SpritesConfig, draw

TEMPERATURE = 0.1
HELDOUT = 64


def sprites(clips: int) -> tuple[NetworksConfig, Tensor, Tensor, Tensor]:
    """(config, pictures [N, T, 3, h, w], windows [N, W, 8, h, w], targets [N, W, 5])."""
    config = NetworksConfig(world="sprites", height=32, width=32, stride=1, targets=5)
    pictures, windows, targets = [], [], []
    # Both worlds that presets draw, and their sizes.
    for number, world in enumerate(
        (
            SpritesConfig(size=64, frames=24),
            SpritesConfig(size=32, frames=24, num_sprites=1, texture_frequency=0.5,
                          texture_contrast=0.7),
        )
    ):  # fmt: skip
        for start in range(0, clips // 2, 50):
            drawn, state = draw(world, 50, seed=key("metric networks", number) >> 2, start=start)
            pictures.append(frames_of(drawn.video[:, ::4], config))
            windows.append(windows_of(drawn.video, config))
            side = world.size
            camera = state.camera.diff(dim=1)[:, :1] / side  # it moves evenly
            count = windows[-1].shape[1]
            velocity = state.velocity[:, : 8 * count].unflatten(1, (count, 8)) / side
            mean = velocity.mean(dim=(2, 3))
            speed = velocity.norm(dim=-1).mean(dim=(2, 3))[..., None]
            targets.append(torch.cat([camera.expand(-1, count, -1), mean, speed], dim=-1).float())
    order = torch.randperm(clips, generator=torch.Generator().manual_seed(0))
    return (
        config,
        torch.cat(pictures)[order],
        torch.cat(windows)[order],
        torch.cat(targets)[order],
    )


def doom(folder: Path) -> tuple[NetworksConfig, Tensor, Tensor, Tensor]:
    """The same of recorded clips; targets [N, W] are numbers of actions."""
    config = NetworksConfig(
        world="doom", height=48, width=64, stride=2, targets=len(CAPTIONS)
    )  # fmt: skip
    shards = ClipShards(folder)
    pictures, windows, targets = [], [], []
    for number in range(len(shards)):
        video = shards.tensors([number])
        pictures.append(frames_of(video[:, ::4], config))
        # Windows of 15 frames inside chunks of 16; frame 0 is a chunk of its own.
        chunks = (video.shape[1] - 1) // 16
        windows.append(
            torch.cat([windows_of(video[:, 2 + 16 * k : 17 + 16 * k], config)
                       for k in range(chunks)], dim=1)
        )  # fmt: skip
        said = shards.captions[number][1 : 1 + chunks]
        targets.append(torch.tensor([[CAPTIONS.index(caption) for caption in said]]))
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0))
    return (
        config,
        torch.cat(pictures)[order],
        torch.cat(windows)[order],
        torch.cat(targets)[order],
    )


def cropped(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each picture [N, 3, H, W], from 3/8 to all of its sides, at full size."""
    number = len(pictures)
    share = 0.375 + 0.625 * torch.rand(number, generator=generator)
    share = torch.where(torch.rand(number, generator=generator) < 0.5, torch.ones(()), share)
    place = (1 - share)[:, None] * (2 * torch.rand(number, 2, generator=generator) - 1)
    theta = torch.zeros(number, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = share
    theta[:, :, 2] = place
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def train_encoder(networks: Networks, pictures: Tensor, minutes: float, batch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    encoder = networks.encoder
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.01)
    began, step, total = time.monotonic(), 0, 60 * minutes
    while (spent := time.monotonic() - began) < total:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.51 + 0.49 * math.cos(math.pi * spent / total))
        rows = torch.randperm(len(pictures), generator=generator)[:batch]
        times = torch.randint(pictures.shape[1], (2, len(rows)), generator=generator)
        one, two = (encoder(cropped(pictures[rows, t], generator)) for t in times)
        logits = one @ two.T / TEMPERATURE
        own = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"encoder {step} {spent:.0f} s loss {float(loss.detach()):.3f}", flush=True)


def train_motion(
    networks: Networks, windows: Tensor, targets: Tensor, minutes: float, batch: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    net = networks.motion
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    flat, told = windows.flatten(0, 1), targets.flatten(0, 1)
    if told.is_floating_point():
        told = (told - told.mean(dim=0)) / told.std(dim=0)
    began, step, total = time.monotonic(), 0, 60 * minutes
    while (spent := time.monotonic() - began) < total:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.51 + 0.49 * math.cos(math.pi * spent / total))
        rows = torch.randint(len(flat), (batch,), generator=generator)
        answer = net.told(net(flat[rows]))
        if told.is_floating_point():
            loss = F.mse_loss(answer, told[rows])
        else:
            loss = F.cross_entropy(answer, told[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"motion {step} {spent:.0f} s loss {float(loss.detach()):.3f}", flush=True)


@torch.no_grad()
def figures(networks: Networks, pictures: Tensor, windows: Tensor, targets: Tensor
            ) -> dict[str, float]:  # fmt: skip
    """On held-out clips."""
    early, late = (networks.encoder(pictures[:, t]) for t in (2, pictures.shape[1] - 2))
    hits = (early @ late.T).argmax(dim=1) == torch.arange(len(early))
    answer = networks.motion.told(networks.motion(windows.flatten(0, 1)))
    told = targets.flatten(0, 1)
    if told.is_floating_point():
        told = (told - told.mean(dim=0)) / told.std(dim=0)
        share = 1 - float((answer - told).square().mean())
    else:
        share = float((answer.argmax(dim=1) == told).double().mean())
    return {"own video nearest": float(hits.double().mean()), "motion told": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("world", choices=["sprites", "doom"])
    parser.add_argument("--data", type=Path, help="doom: shards of training clips")
    parser.add_argument("--clips", type=int, default=4800, help="sprites: drawn clips")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each network")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument(
        "--keep-encoder", action="store_true", help="train the motion network alone"
    )
    parser.add_argument("--out", type=Path, default=PACKAGED)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.world == "doom" and args.data is None:
        parser.error("doom needs --data")
    data = sprites(args.clips) if args.world == "sprites" else doom(args.data)
    config, pictures, windows, targets = data
    networks = Networks(config)
    path = args.out / f"{args.world}.safetensors"
    if args.keep_encoder:
        kept = {n: v.float() for n, v in load_file(path).items() if n.startswith("encoder.")}
        networks.load_state_dict(kept, strict=False)
    else:
        train_encoder(networks, pictures[HELDOUT:], args.minutes, args.batch)
    train_motion(networks, windows[HELDOUT:], targets[HELDOUT:], args.minutes, args.batch)
    networks.eval()
    found = figures(networks, pictures[:HELDOUT], windows[:HELDOUT], targets[:HELDOUT])
    networks.save(path)
    print(json.dumps(found), f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
