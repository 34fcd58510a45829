"""What is measured of each video, once: a table from which every figure is computed.

Measuring takes the time, comparing does not. So videos are measured piece by piece and let go, and
real ones are kept as a small file instead of as videos.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.evaluate.frechet import temporal_features
from aad1.evaluate.motion import check_videos, flow, grey, motion, quarter, warp
from aad1.evaluate.networks import Networks
from aad1.evaluate.niqe import nss_features

FORMAT = "aad1.measured.1"
PAIRS_PER_VIDEO = 40
"""About as many pairs of frames get their flow measured, however long the video."""

_VIDEOS_AT_ONCE = 8
_FLOWS_AT_ONCE = 2**19  # pixels of a batch of flow fields
_HISTOGRAM_BINS = 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """N videos of one shape; every tensor's first dimension counts videos."""

    frames: int
    height: int
    width: int
    fps: float
    """Frames a second; what seconds mean in this table."""
    stride: int
    """Every stride-th pair of frames had its flow measured."""
    keys: tuple[str, ...]
    """What each video begins with. Videos of equal keys are samples of one prompt, and a real
    video with the key of a generated one is its true continuation."""
    prompts: tuple[str, ...]
    magnitude: Tensor
    """float64 [N], pixels per frame, as `motion.Motion.magnitude`."""
    late: Tensor
    """float64 [N]: the same over the last quarter."""
    direction: Tensor
    """float64 [N, 2]: mean (x, y) flow."""
    smoothness: Tensor
    """float64 [N], see `smoothness`."""
    flicker: Tensor
    """float64 [N], see `flicker`."""
    color_shift: Tensor
    """float64 [N], see `color_shift`."""
    temporal: Tensor
    """float64 [N, 10]: the statistics of FDtd."""
    nss: Tensor
    """float64 [N, T, 14]: natural-scene statistics of every frame."""
    consistency: Tensor
    """float64 [N, 4], see `networks.Networks.consistency`; [N, 0] without networks."""
    motion: Tensor
    """float64 [N, windows, features] of the motion network; [N, 0, 0] without networks."""

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, index: Sequence[int]) -> Measured:
        """These videos, in this order."""
        rows = torch.tensor(list(index), dtype=torch.long)
        changes = {name: getattr(self, name)[rows] for name in TENSORS}
        return replace(
            self, **changes,
            keys=tuple(self.keys[i] for i in index), prompts=tuple(self.prompts[i] for i in index),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes one safetensors file: the frames' statistics as float16, the rest as float32."""
        from safetensors.torch import save_file

        tensors = {
            name: getattr(self, name).to(torch.float16 if name in _HALVES else torch.float32)
            for name in TENSORS
        }
        facts = {"keys": self.keys, "prompts": self.prompts, "fps": self.fps}
        facts |= {name: getattr(self, name) for name in ("frames", "height", "width", "stride")}
        with replace_file(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "facts": json.dumps(facts)})

    @staticmethod
    def load(path: Path) -> Measured:
        """Reads what `save` wrote; raises UserError for a missing or foreign file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                facts = json.loads(header["facts"])
                if header.get("format") != FORMAT:
                    raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
                # Files from before there were networks have none of their figures.
                tensors: dict[str, Any] = dict(_without_networks(len(facts["keys"])))
                tensors |= {
                    name: file.get_tensor(name).double()
                    for name in TENSORS
                    if name not in tensors or name in list(file.keys())
                }
            facts["keys"], facts["prompts"] = tuple(facts["keys"]), tuple(facts["prompts"])
            return Measured(**facts, **tensors)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read measured videos from {path}: {error}") from None


_HALVES = ("nss", "motion")


def _without_networks(number: int) -> dict[str, Tensor]:
    """What stands for the networks' figures where there are none."""
    return {
        "consistency": torch.zeros(number, 0, dtype=torch.float64),
        "motion": torch.zeros(number, 0, 0, dtype=torch.float64),
    }


TENSORS = tuple(field.name for field in fields(Measured) if field.type == "Tensor")


def join(parts: Sequence[Measured]) -> Measured:
    """One table of several; UserError if their videos differ in shape or rate."""
    first = parts[0]
    for part in parts[1:]:
        check_alike(part, first)
    changes: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS
    }
    return replace(
        first, **changes,
        keys=tuple(key for part in parts for key in part.keys),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
    )  # fmt: skip


def check_alike(videos: Measured, others: Measured) -> None:
    """UserError unless both have the same frames, size, frame rate and measured pairs."""
    for what in ("frames", "height", "width", "fps", "stride"):
        one, other = getattr(videos, what), getattr(others, what)
        if abs(one - other) > 0.01 * other:
            raise UserError(f"videos must all have the same {what}, got {one:g} and {other:g}")


def stride_for(frames: int) -> int:
    """The stride at which about `PAIRS_PER_VIDEO` pairs of a video are measured, an odd number.

    An even one would see every other pair only of a video whose frames come in pairs: repeated
    frames would seem to move twice as much as they do, and swapped ones in the right order.
    """
    return (frames - 1) // PAIRS_PER_VIDEO // 2 * 2 + 1


def measure(
    videos: Tensor, *, fps: float, keys: Sequence[str], prompts: Sequence[str] | None = None,
    networks: Networks | None = None,
) -> Measured:  # fmt: skip
    """Measure videos, uint8 [N, T, H, W, 3]; the result lies on the CPU.

    networks: the world's, on the videos' device; without them some figures cannot be computed.
    Raises UserError as `motion.check_videos` does, or for another number of keys or prompts.
    """
    check_videos(videos, "measured")
    prompts = [""] * len(videos) if prompts is None else prompts
    if not len(videos) == len(keys) == len(prompts):
        raise UserError(f"{len(videos)} videos, {len(keys)} keys and {len(prompts)} prompts")
    stride = stride_for(videos.shape[1])
    parts = []
    for rows in torch.arange(len(videos)).split(_VIDEOS_AT_ONCE):
        some = videos[rows]
        light = grey(some)
        moving = motion(some, stride=stride)
        seen = _without_networks(len(some))
        if networks is not None:
            seen["consistency"] = networks.consistency(some)
            seen["motion"] = networks.motion_features(some)
        parts.append(
            Measured(
                frames=videos.shape[1], height=videos.shape[2], width=videos.shape[3],
                fps=float(fps), stride=stride,
                keys=tuple(keys[i] for i in rows.tolist()),
                prompts=tuple(prompts[i] for i in rows.tolist()),
                magnitude=moving.magnitude, late=moving.late, direction=moving.direction,
                smoothness=smoothness(light, stride), flicker=flicker(light),
                color_shift=color_shift(some),
                temporal=temporal_features(some, moving.predictability),
                nss=nss_features(light.flatten(0, 1)).unflatten(0, light.shape[:2]),
                **seen,
            )
        )  # fmt: skip
    return join(parts)


def measure_all(
    videos: Iterable[tuple[str, str, Tensor]], *, fps: float, device: torch.device | str = "cpu",
    networks: Networks | None = None,
) -> Measured:  # fmt: skip
    """Measure videos one after another: (key, prompt, uint8 [T, H, W, 3]); UserError for none."""
    parts = [
        measure(video[None].to(device), fps=fps, keys=[key], prompts=[prompt], networks=networks)
        for key, prompt, video in videos
    ]
    if not parts:
        raise UserError("there are no videos to measure")
    return join(parts)


def smoothness(light: Tensor, stride: int = 1) -> Tensor:
    """float64 [N]: how well every other frame is foretold by its neighbours, 1 at best.

    light: luminance, float [N, T, H, W] in 0..255.
    An odd frame is compared with the mean of the frames before and after it, each moved half way
    along the flow between them; the result is 1 - mean |difference| / 255. Static videos score 1.
    stride: takes only every stride-th odd frame.
    """
    number, frames, height, width = light.shape
    middles = torch.arange(1, frames - 1, 2)[::stride]
    video = torch.arange(number).repeat_interleave(len(middles))
    frame = middles.repeat(number)
    at_once = max(1, _FLOWS_AT_ONCE // (height * width))
    errors = []
    for some, now in zip(video.split(at_once), frame.split(at_once), strict=True):
        before, after = light[some, now - 1], light[some, now + 1]
        half = flow(before, after) / 2
        from_before, _ = warp(before[:, None], -half)
        from_after, _ = warp(after[:, None], half)
        guess = (from_before + from_after)[:, 0] / 2
        errors.append((guess - light[some, now]).abs().mean(dim=(1, 2)).cpu().double())
    return 1 - torch.cat(errors).view(number, -1).mean(dim=1) / 255


def flicker(light: Tensor) -> Tensor:
    """float64 [N]: mean |second difference| over time of a frame's mean luminance [N, T, H, W]."""
    brightness = light.double().mean(dim=(2, 3))
    return brightness.diff(n=2, dim=1).abs().mean(dim=1).cpu()


def color_shift(videos: Tensor) -> Tensor:
    """float64 [N]: distance of the colour histograms of the first and the last quarter, 0 to 1.

    videos: uint8 [N, T, H, W, 3]. Total variation distance of histograms with 8 bins per channel,
    mean over the channels. Real videos shift too, when new things come into view.
    """
    part = quarter(videos.shape[1])

    def histograms(some: Tensor) -> Tensor:
        bins = some // (256 // _HISTOGRAM_BINS)
        counts = [(bins == bin_).sum(dim=(1, 2, 3)) for bin_ in range(_HISTOGRAM_BINS)]
        return torch.stack(counts, dim=-1).double() / some[0, ..., 0].numel()

    change = histograms(videos[:, :part]) - histograms(videos[:, -part:])
    return (change.abs().sum(dim=-1) / 2).mean(dim=-1).cpu()
