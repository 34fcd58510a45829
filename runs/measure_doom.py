"""What a doom model does on held-out frames: motion, drift over 20 s, obedience, first frame.

    python runs/measure_doom.py out/doom-aad/final --data out/data/doom-heldout --picture out/8.png

Held-out clips come from maps and seeds that no training clip has (`aad1 data doom --split heldout
--clips 256 --seed 1`). The first `clips` of them give first frames, captions and the real motion
that M refers to; the next ones give the floors: what real clips score against real clips. `--skip
64` leaves out those that the collapse monitor showed during training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aad1.atomic import replace_file
from aad1.data.shards import ClipShards
from aad1.evaluate.motion import motion
from aad1.evaluate.report import evaluate_videos, measure_real
from aad1.media import contact_sheet
from aad1.models.weights import write_json
from aad1.pipeline import Pipeline, pick_device

CHUNKS_5S, CHUNKS_20S = 5, 20
STRIDE = 2
TURNS = {"turn left": 1.0, "turn right": -1.0}
"""Prompt -> sign of the mean horizontal flow: what turns left sees things move right."""


def rollouts(
    pipe: Pipeline, images: torch.Tensor, captions: list[list[str]], chunks: int
) -> torch.Tensor:
    """uint8 [N, 1 + 16 chunks, H, W, 3] from first frames (latents [N, C, 1, h, w])."""
    out = []
    for part in torch.arange(len(images)).split(16):
        numbers = part.tolist()
        texts = [captions[i] for i in numbers]
        latents = pipe.generate_latents(images[numbers], texts, numbers, chunks)
        out.append(pipe.codec.decode(latents).cpu())
    return torch.cat(out)


def measure(
    pipe: Pipeline, data: Path, clips: int, skip: int
) -> tuple[dict[str, object], torch.Tensor]:
    """The figures, and [clips, 2, T, H, W, 3]: real and generated 5 s clips."""
    shards = ClipShards(data)
    clips = min(clips, len(shards) // 2)
    numbers = [(skip + i) % len(shards) for i in range(2 * clips)]
    real, other = shards.tensors(numbers[:clips]), shards.tensors(numbers[clips:])
    captions = [list(shards.captions[i]) for i in numbers[:clips]]
    device = pipe.device
    real, other = real.to(device), other.to(device)
    images = torch.cat([pipe.codec.encode(v[:, :1]) for v in real.split(32)])
    statistics = measure_real(real, other, stride=STRIDE)

    frames = real.shape[1]
    long = rollouts(pipe, images, captions, CHUNKS_20S)
    first, last = long[:, :frames], long[:, -frames:]
    keep = ("M", "late_M", "S", "FDtd", "FDnss_early", "FDnss_late")
    figures: dict[str, object] = {"clips": clips, "skipped": skip, "stage": pipe.info.stage}
    for name, video in (("5s", first), ("15s_to_20s", last)):
        made = evaluate_videos(video.to(device), statistics)
        figures[name] = {k: round(made[k], 3) for k in keep}
    figures["floor"] = {k: round(v, 3) for k, v in statistics.floors.items()}
    frozen = real[:, :1].expand(-1, frames, -1, -1, -1)
    made = evaluate_videos(frozen, statistics)
    figures["frozen"] = {k: round(made[k], 3) for k in keep}
    reconstructed = torch.cat([pipe.codec.decode(pipe.codec.encode(v)) for v in real.split(8)])
    made = evaluate_videos(reconstructed, statistics)
    figures["codec"] = {k: round(made[k], 3) for k in keep}

    turning = images[:64]
    for prompt, sign in TURNS.items():
        video = rollouts(pipe, turning, [[prompt]] * len(turning), CHUNKS_5S)
        across = motion(video.to(device), stride=STRIDE).direction[:, 0]
        figures[f"{prompt}: right sign"] = float((across * sign > 0).double().mean())
        figures[f"{prompt}: px/frame"] = round(float(across.mean()), 3)
    # Left for the first half, right for the second: does a prompt change take hold?
    switch = [["turn left"] * 4 + ["turn right"] * 4] * len(turning)
    video = rollouts(pipe, turning, switch, 6)
    halves = [motion(v.to(device), stride=STRIDE).direction[:, 0] for v in
              (video[:, 1:49], video[:, 49:])]  # fmt: skip
    figures["switch left to right: both signs right"] = float(
        ((halves[0] > 0) & (halves[1] < 0)).double().mean()
    )
    error = (long[:, 0].float() - real[:, 0].cpu().float()).square().mean(dim=(1, 2, 3))
    figures["first frame PSNR, dB"] = round(float((10 * (255**2 / error).log10()).mean()), 2)
    return figures, torch.stack([real.cpu(), first], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", help="folder or packaged name")
    parser.add_argument("--data", type=Path, default=Path("out/data/doom-heldout"))
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--skip", type=int, default=0, help="begin at this clip instead of 0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--picture", type=Path, help="the first 8 rollouts beside real clips")
    args = parser.parse_args()
    with torch.no_grad():
        pipe = Pipeline.from_pretrained(args.model, device=pick_device(args.device))
        figures, pairs = measure(pipe, args.data, args.clips, args.skip)
    print(json.dumps(figures, indent=1))
    if args.json:
        write_json(args.json, figures)
    if args.picture:
        captions = ClipShards(args.data).captions
        rows: list[npt.NDArray[np.uint8]] = []
        labels: list[str] = []
        for i in range(8):
            said = list(dict.fromkeys(captions[(args.skip + i) % len(captions)][1:]))
            rows += [pairs[i, 0].numpy(), pairs[i, 1].numpy()]
            labels += [f"real: {', then '.join(said)}", "generated from its first frame"]
        with replace_file(args.picture) as temporary:
            contact_sheet(rows, labels).save(temporary)


if __name__ == "__main__":
    main()
