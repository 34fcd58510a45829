"""The figures of one trained model: many held-out clips at once, the same for every arm.

Clips come from seeds that neither training nor its monitor draws. A long clip starts with the short
one of its number, so generated videos are set beside their true continuations at every length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aad1.core.chunks import ChunkGeometry
from aad1.data.batch import Clips
from aad1.data.shards import ClipShards
from aad1.errors import UserError
from aad1.evaluate.compare import (
    CONSISTENCY,
    DRIFT,
    METRICS,
    MOTION,
    QUALITY,
    Metric,
    Reference,
    compare,
)
from aad1.evaluate.corruptions import drift_contrast
from aad1.evaluate.frechet import LEAST_VIDEOS
from aad1.evaluate.measure import Measured, measure
from aad1.evaluate.networks import Networks, for_world
from aad1.evaluation.oracle_figures import obedience, pan_speed, true_pan_deviation
from aad1.models.codec import Codec
from aad1.pipeline import Pipeline
from aad1.rollout.stream import seeded_noise
from aad1.rollout.teacher import sample
from aad1.stages.base import Conditioner
from aad1.train.config import LatentData, TrajectoryConfig
from aad1.train.sources import key, open_world
from aad1.worlds.sprites import SpritesConfig, SpritesState, draw

FPS = 4.0
WATCHED = 64
"""Held-out clips of a recorded world that the collapse monitor shows in training."""
SHOWN = 16
"""Samples that are kept to look at: the first ones."""
TEST, VALIDATION = "evidence test", "evidence validation"
Figures = dict[str, dict[str, float | None]]
SHORT = (*MOTION, *QUALITY, *CONSISTENCY)
LONG = (*(METRICS[n] for n in ("M", "late_M", "S", "FDtd", "FDnss_late", "niqe")), *CONSISTENCY,
        *DRIFT)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is generated and measured for each model."""

    clips: int = 256
    long_clips: int = 128
    long_frames: int = 81
    longest_clips: int = 64
    longest_frames: int = 161
    """Only where drift beyond the training clip is the question."""
    repeated: int = 32
    samples: int = 8
    told: int = 128
    """Videos whose obedience is decoded."""
    together: int = 64


TINY = Sizes(
    clips=16, long_clips=4, long_frames=33, longest_clips=2, longest_frames=41, repeated=2,
    samples=2, told=4, together=8,
)  # fmt: skip


Draw = Callable[[str, str], Tensor]
"""("short", "long" or "longest", "clip" or "other") -> the videos again, uint8 [N, T, H, W, 3]."""


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real clips of one set of seeds, measured once."""

    fps: float
    video: Tensor
    """uint8 [N, T, H, W, 3]: the true continuations of the first frames."""
    captions: list[list[str]]
    first: Tensor | None
    """Latents of the first frames [N, C, 1, h, w], if they are not those of the video's."""
    sets: Mapping[str, tuple[Reference, Measured]]
    """"short", and "long" and "longest" where clips may have any length: (reference, others for
    the floor)."""
    draw: Draw
    state: SpritesState | None = None
    """What truly happens, on the drawn world."""
    networks: Networks | None = None

    @property
    def frames(self) -> int:
        """Of a short video."""
        return self.video.shape[1]

    def images(self, pipe: Pipeline, rows: list[int]) -> Tensor:
        """Latents of first frames."""
        if self.first is not None:
            return self.first[rows].to(pipe.device)
        return pipe.codec.encode(self.video[rows, :1].to(pipe.device))


def _keys(count: int, name: str = "clip") -> list[str]:
    return [f"{name} {i}" for i in range(count)]


def drawn_clips(
    config: SpritesConfig, sizes: Sizes, which: str, folder: Path, device: torch.device
) -> Real:
    """Draws and measures clips of the drawn world; what was measured is kept in the folder.

    which: `TEST` or `VALIDATION`.
    """
    seeds = {part: key(which, part) >> 2 for part in ("clip", "other")}
    shapes = {
        "short": (sizes.clips, config.frames),
        "long": (sizes.long_clips, sizes.long_frames),
        "longest": (sizes.longest_clips, sizes.longest_frames),
    }
    if which == VALIDATION:
        del shapes["longest"]  # nothing is judged there

    def drawn(name: str, part: str) -> tuple[Clips, SpritesState]:
        count, frames = shapes[name]
        return draw(replace(config, frames=frames), count, seed=seeds[part], device=device)

    networks = for_world("sprites", device)
    eyes = networks.fingerprint() if networks else ""
    tables: dict[tuple[str, str], Measured] = {}
    for name in shapes:
        for part in seeds:
            identity = key(which, name, part, config, shapes[name], eyes)
            path = folder / f"{identity:016x}-{name}-{part}.safetensors"
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                clips, _ = drawn(name, part)
                measure(
                    clips.video, fps=FPS, keys=_keys(len(clips.video), part),
                    prompts=[c[-1] for c in clips.captions], networks=networks,
                ).save(path)  # fmt: skip
            # Also when just measured: what is kept has fewer digits, and all runs read the same.
            tables[name, part] = Measured.load(path)
    short = Reference.of(tables["short", "clip"])
    sets = {
        name: (
            short if name == "short" else Reference.of(tables[name, "clip"], short.frames),
            tables[name, "other"],
        )
        for name in shapes
    }
    clips, state = drawn("short", "clip")
    return Real(
        fps=FPS, video=clips.video, captions=clips.captions, first=None, sets=sets, state=state,
        networks=networks, draw=lambda name, part: drawn(name, part)[0].video,
    )  # fmt: skip


def recorded_clips(data: LatentData, sizes: Sizes, device: torch.device) -> Real:
    """Held-out clips of a recorded world as its codec shows them, half of them for the floor.

    The collapse monitor watches the first 64, so these are left out. UserError if too few are left.
    """
    world = open_world(data, 0, device)
    shards = ClipShards(data.heldout)
    count = min(sizes.clips, (len(shards) - WATCHED) // 2)
    if count < LEAST_VIDEOS:
        raise UserError(
            f"{data.heldout} holds {len(shards)} clips, {WATCHED + 2 * LEAST_VIDEOS} are needed"
        )
    networks = for_world(data.name, device)

    def rows(part: str) -> range:
        begin = WATCHED + (count if part == "other" else 0)
        return range(begin, begin + count)

    def latents(part: str) -> Tensor:
        return shards.tensors(rows(part)).to(device).float()

    def videos(name: str, part: str) -> Tensor:
        assert name == "short", "recorded clips have one length"
        return torch.cat([world.codec.decode(some) for some in latents(part).split(16)])

    def measured(part: str) -> Measured:
        prompts = [shards.captions[i][-1] for i in rows(part)]
        return measure(
            videos("short", part), fps=data.fps, keys=_keys(count, part), prompts=prompts,
            networks=networks,
        )  # fmt: skip

    return Real(
        fps=data.fps, video=videos("short", "clip"),
        captions=[shards.captions[i] for i in rows("clip")], first=latents("clip")[:, :, :1],
        sets={"short": (Reference.of(measured("clip")), measured("other"))}, draw=videos,
        networks=networks,
    )  # fmt: skip


def figures_of(
    video: Tensor, real: Real, name: str, metrics: Sequence[Metric] = (), names: str = "clip"
) -> tuple[dict[str, float | None], dict[str, str]]:
    """(values, reasons of those missing) of videos set beside real ones of their length."""
    reference, _ = real.sets[name]
    chosen = metrics or (SHORT if name == "short" else LONG)
    prompts = [captions[-1] for captions in real.captions[: len(video)]]
    keys = _keys(len(video), names)
    made = measure(video, fps=real.fps, keys=keys, prompts=prompts, networks=real.networks)
    found = compare(made, reference, None, chosen, resamples=0)
    values = {metric: figure.value for metric, figure in found.items()}
    return values, {m: figure.reason for m, figure in found.items() if figure.reason}


class Sampler:
    """Videos of a model from real first frames; the video of a number is always the same."""

    def __init__(self, pipe: Pipeline, real: Real, together: int) -> None:
        self.pipe, self.real, self.together = pipe, real, together

    @torch.no_grad()
    def videos(
        self, numbers: Sequence[int], frames: int, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """uint8 [N, frames, H, W, 3] on the model's device, one for each number of a clip."""
        pipe, real = self.pipe, self.real
        seeds = list(numbers) if seeds is None else list(seeds)
        latent_frames = 1 + (frames - 1) // pipe.codec.temporal_stride
        chunks = pipe.info.geometry.chunks(latent_frames) - 1
        parts = []
        with _autocast(pipe):
            for index in torch.arange(len(numbers)).split(self.together):
                rows = [numbers[i] for i in index.tolist()]
                captions = [real.captions[i] for i in rows]
                latents = pipe.generate_latents(
                    real.images(pipe, rows), captions, [seeds[i] for i in index.tolist()], chunks
                )
                parts += [pipe.codec.decode(some) for some in latents.split(16)]
        return torch.cat(parts)


def evaluate_student(
    pipe: Pipeline, real: Real, sizes: Sizes, *, longest: bool = False
) -> tuple[Figures, dict[str, str], Tensor]:
    """Figures by set of videos, reasons of those missing, and the first samples.

    longest: also rollouts of `sizes.longest_frames`.
    """
    sampler = Sampler(pipe, real, sizes.together)
    figures: Figures = {}
    reasons: dict[str, str] = {}

    def judge(name: str, video: Tensor) -> None:
        figures[name], missing = figures_of(video, real, name)
        reasons.update({f"{name}/{metric}": why for metric, why in missing.items()})

    short = sampler.videos(range(len(real.video)), real.frames)
    judge("short", short)
    if "long" in real.sets:
        judge("long", sampler.videos(range(sizes.long_clips), sizes.long_frames))
    else:  # real clips are short: the last quarter of rollouts four times as long
        numbers = range(min(sizes.long_clips, len(real.video)))
        long = sampler.videos(numbers, 4 * (real.frames - 1) + 1)
        figures["last"], _ = figures_of(long[:, -real.frames :], real, "short")
    if longest and "longest" in real.sets:
        judge("longest", sampler.videos(range(sizes.longest_clips), sizes.longest_frames))
    if real.state is not None:
        figures["oracle"] = oracle(short[: sizes.told], real)
        figures["diversity"] = _diversity(sampler, real, real.state, sizes)
    return figures, reasons, short[:SHOWN].cpu()


def oracle(video: Tensor, real: Real) -> dict[str, float | None]:
    """Shares of statements in the prompts that come true (`oracle_figures.obedience`)."""
    prompts = [captions[-1] for captions in real.captions[: len(video)]]
    found = obedience(video, prompts)
    return {name: sum(hits) / len(hits) if hits else None for name, hits in found.items()}


def _diversity(
    sampler: Sampler, real: Real, state: SpritesState, sizes: Sizes
) -> dict[str, float | None]:
    """Deviation of the camera's speed between samples of one prompt, over the true one."""
    pans = [i for i, c in enumerate(real.captions) if "pans" in c[-1]][: sizes.repeated]
    deviation = true_pan_deviation(state)
    if not pans or not deviation > 0:
        return {"camera": None}
    numbers = [i for i in pans for _ in range(sizes.samples)]
    seeds = [10_000 + k for k in range(len(numbers))]
    video = sampler.videos(numbers, real.frames, seeds)
    speed = torch.stack([pan_speed(v) for v in video]).view(len(pans), -1)
    return {"camera": float(speed.std(dim=1).mean() / deviation)}


@torch.no_grad()
def evaluate_teacher(
    pipe: Pipeline, real: Real, sizes: Sizes, how: TrajectoryConfig, geometry: ChunkGeometry
) -> tuple[Figures, dict[str, str], Tensor]:
    """The teacher on the same first frames, sampled as its trajectories are; short videos only."""
    codec: Codec = pipe.codec
    parts = []
    rng = torch.Generator(device=pipe.device).manual_seed(0)
    conditioner = Conditioner(pipe.text, geometry)
    with _autocast(pipe):
        for rows in torch.arange(len(real.video)).split(sizes.together):
            clips = real.video[rows.to(real.video.device)].to(pipe.device)
            latents = codec.encode(clips)
            text = conditioner([real.captions[i] for i in rows.tolist()], latents.shape[2])
            noise = torch.randn(latents.shape, generator=rng, device=pipe.device)
            x0, _ = sample(
                pipe.transformer, noise, text, torch.zeros_like(text), steps=how.steps,
                shift=how.shift, guidance_scale=how.guidance_scale,
                image=real.images(pipe, rows.tolist()) if how.from_image else None,
            )  # fmt: skip
            parts += [codec.decode(some) for some in x0.split(16)]
    video = torch.cat(parts)
    short, missing = figures_of(video, real, "short")
    told = {"short": short}
    if real.state is not None:
        told["oracle"] = oracle(video[: sizes.told], real)
    return told, {f"short/{m}": why for m, why in missing.items()}, video[:SHOWN].cpu()


def floor(real: Real, name: str) -> dict[str, float | None]:
    """What other real clips get of a set of videos."""
    reference, other = real.sets[name]
    metrics = SHORT if name == "short" else LONG
    found = compare(other, reference, None, metrics, resamples=0)
    return {metric: figure.value for metric, figure in found.items()}


def controls(real: Real, sizes: Sizes) -> dict[str, Figures]:
    """What needs no model, by name: other real clips, first frames held still, fading contrast."""
    out: dict[str, Figures] = {"real": {}, "static": {}, "drift-contrast": {}}
    for name, (reference, _) in real.sets.items():
        out["real"][name] = floor(real, name)
        frames = reference.videos.frames
        still = real.video[: len(reference.videos), :1].expand(-1, frames, -1, -1, -1)
        out["static"][name] = figures_of(still, real, name)[0]
        faded = drift_contrast(real.draw(name, "other"))
        out["drift-contrast"][name] = figures_of(faded, real, name, names="other")[0]
    if real.state is not None:
        out["real"]["oracle"] = oracle(real.video[: sizes.told], real)
    return out


@torch.no_grad()
def seconds_per_chunk(pipe: Pipeline, real: Real, chunks: int = 12) -> float:
    """Median time of one chunk of one stream, its cache pass included, decoding not."""
    image, captions = real.images(pipe, [0]), real.captions[:1]
    with _autocast(pipe):
        text = pipe.text([captions[0][-1]]).to(pipe.device)
        shape = (image.shape[1], image.shape[3], image.shape[4])
        noise = seeded_noise([0], pipe.info.geometry, shape, pipe.device)
        times = []
        last = time.perf_counter()
        for _ in pipe.rollout.stream(image, lambda _: text, noise, chunks):
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            times.append(now - last)
            last = now
    return sorted(times[2:])[len(times[2:]) // 2]


def _autocast(pipe: Pipeline) -> torch.autocast:
    """As in training: bfloat16 on CUDA."""
    kind = pipe.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def summary(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """One line for the log."""
    wanted = (("short", "M"), ("short", "FDtd"), ("short", "FDnss_late"), ("long", "M"),
              ("long", "drift_ratio_2s"))  # fmt: skip
    parts = []
    for videos, name in wanted:
        value = figures.get(videos, {}).get(name)
        if value is not None:
            parts.append(f"{name if videos == 'short' else videos + ' ' + name} {value:.3g}")
    return ", ".join(parts)
