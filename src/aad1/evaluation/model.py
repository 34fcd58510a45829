"""A model in its world: short and long rollouts, steering, and how much samples differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aad1.errors import UserError
from aad1.evaluate.compare import (
    CONSISTENCY,
    DRIFT,
    METRICS,
    MOTION,
    QUALITY,
    Figure,
    Reference,
    beside,
    compare,
    not_computed,
)
from aad1.evaluate.intervals import bootstrap, wilson
from aad1.evaluate.measure import Measured, join, measure_all, stride_for
from aad1.evaluate.motion import grey, motion
from aad1.evaluation.oracle_figures import oracle_section, pan_speed, true_pan_deviation
from aad1.evaluation.result import Picture, Result, Section
from aad1.evaluation.worlds import RealWorld, Start, Videos
from aad1.models.codec import PixelCodec
from aad1.pipeline import Pipeline

STEERING = {"turn left": 1, "strafe left": 1, "turn right": -1, "strafe right": -1}
"""Prompt -> sign of the mean horizontal flow: who turns left sees things move right."""
OVER_FRAMES = ("M", "late_M", "S", "niqe", "sharpness", "smoothness", "flicker")
"""Figures that are means over frames: fit for videos longer than the real ones."""
_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is generated."""

    clips: int
    long_clips: int
    seconds: float
    long_seconds: float
    steered: int
    """First frames per steering prompt."""
    repeated: int
    """First frames of which several samples are made."""
    samples: int
    """Samples of each."""
    seed: int = 0


Tell = Callable[[str], None]


def evaluate_model(pipe: Pipeline, world: RealWorld, plan: Plan, tell: Tell) -> Result:
    """Every section of a model's evaluation; `tell` hears what is being done.

    Raises UserError for a teacher, for a size other than the real videos', or for lengths that the
    model's chunks cannot give.
    """
    real = world.short.reference.videos
    if (pipe.info.height, pipe.info.width) != (real.height, real.width):
        raise UserError(
            f"the model makes {pipe.info.width}x{pipe.info.height} pixels, the real videos have "
            f"{real.width}x{real.height}"
        )
    chunks, long_chunks = chunks_for(pipe, real.frames), _long_chunks(pipe, plan)
    if plan.long_clips and long_chunks < chunks:
        raise UserError(
            f"long videos must be no shorter than short ones: --long-seconds {plan.long_seconds:g} "
            f"is {long_chunks} chunks, short videos have {chunks}"
        )
    starts = world.starts[: plan.clips]
    long_starts = starts[: plan.long_clips]
    seeds = [plan.seed + i for i in range(len(starts))]
    pictures: list[Picture] = []

    # The first chunks of a long rollout are those of a short one with the same seed.
    tell(f"{len(long_starts)} rollouts of {long_chunks} chunks")
    whole, first, last = [], [], []
    psnr: list[float] = []
    drawn = world.state is not None
    kept: list[Tensor] = []
    """Short videos of a drawn world, or the beginnings of long ones, in the order of `starts`."""
    for start, video in zip(
        long_starts, rollouts(pipe, long_starts, seeds, long_chunks), strict=True
    ):
        whole.append(_measure(video, start, world, pipe))
        psnr.append(_psnr(video[0], start.image))
        first.append(_measure(video[: real.frames], start, world, pipe))
        last.append(_measure(video[-real.frames :], start, world, pipe))
        if drawn:
            kept.append(video[: real.frames])
        if len(pictures) < 4:
            seconds = len(video) / world.fps
            pictures.append(Picture(title=f"{start.prompt} ({seconds:.0f} s)", generated=video))
    rest = starts[len(long_starts) :]
    tell(f"{len(rest)} more rollouts of {chunks} chunks")
    shown: list[tuple[Start, Tensor]] = [
        (start, picture.generated[: real.frames])
        for start, picture in zip(long_starts, pictures, strict=False)
    ]
    for start, video in zip(
        rest, rollouts(pipe, rest, seeds[len(long_starts) :], chunks), strict=True
    ):
        first.append(_measure(video, start, world, pipe))
        if len(shown) < 8:
            shown.append((start, video))
        if drawn:
            kept.append(video)
        psnr.append(_psnr(video[0], start.image))
    short_pictures = [
        Picture(
            title=start.prompt, generated=video,
            real=world.clips[i] if i < len(world.clips) else None,
        )
        for i, (start, video) in enumerate(shown)
    ]  # fmt: skip
    sections = [_short(first, world, psnr)]
    if whole:
        sections += [_long(whole, world, real.frames), _last(last, world)]
    generated = [
        (s.name, s.title, s.videos)
        for s in sections
        if s.name in ("short", "last") and s.videos is not None
    ]
    sections += _controls(pipe, starts, world, tell, generated)
    if plan.steered and steerable(world):
        sections.append(_steering(pipe, world, plan, chunks, tell))
    if plan.repeated and plan.samples > 1:
        sections.append(_diversity(pipe, world, plan, chunks, tell))
    if world.state is not None and world.truth is not None:
        sections.append(
            oracle_section(torch.stack(kept), starts, world.truth, world.state, world.short)
        )
    facts = {
        "model": f"stage {pipe.info.stage}, {pipe.info.updates} updates, {pipe.info.sha256[:12]}",
        "world": world.name,
        "videos": f"{len(starts)} of {real.frames} frames, {len(whole)} of "
        f"{pipe.frames(1 + long_chunks * pipe.info.geometry.chunk)}; {world.fps:g} frames a second",
        "real videos": f"{len(real)}, and {len(world.short.other or ())} others for the floors",
        "seeds": f"{seeds[0]} to {seeds[-1]}",
    }
    return Result(
        title=f"Evaluation of a {world.name} model", facts=facts, sections=tuple(sections),
        notes=NOTES, pictures=(*short_pictures, *pictures), fps=world.fps,
    )  # fmt: skip


NOTES = (
    "Read M first: a static video wins or draws every figure beside which M stands. Intervals are "
    "95%, from 2,000 resamples of prompts (Wilson's for shares), within this one model; they say "
    "nothing about training again. Real against real is what other real videos get at the same "
    "number of videos: a perfect model would get about that.",
    "Consistency and the motion Fréchet distance come from small networks trained on real clips of "
    "this world; they are proxies, not comparable to VBench's numbers.",
)


def chunks_for(pipe: Pipeline, frames: int) -> int:
    """The chunks that give exactly that many frames; UserError if none do."""
    each = pipe.info.geometry.chunk * pipe.codec.temporal_stride
    if frames < 1 + each or (frames - 1) % each:
        raise UserError(
            f"the real videos have {frames} frames, but this model makes 1 + {each} per chunk"
        )
    return (frames - 1) // each


def _long_chunks(pipe: Pipeline, plan: Plan) -> int:
    each = pipe.info.geometry.chunk * pipe.codec.temporal_stride
    return max(1, round(plan.long_seconds * pipe.info.fps / each))


@torch.no_grad()
def rollouts(
    pipe: Pipeline, starts: Sequence[Start], seeds: Sequence[int], chunks: int,
    prompts: Sequence[list[str]] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Videos uint8 [T, H, W, 3] from the starts, in order, a few made at a time.

    prompts: captions per chunk instead of the starts' own.
    """
    for begin in range(0, len(starts), _TOGETHER):
        index = range(begin, min(begin + _TOGETHER, len(starts)))
        images = torch.stack([starts[i].image for i in index])[:, None].to(pipe.device)
        captions = [starts[i].captions if prompts is None else prompts[i] for i in index]
        latents = pipe.generate_latents(
            pipe.codec.encode(images), captions, [seeds[i] for i in index], chunks
        )
        for some in latents.split(1):
            yield pipe.codec.decode(some)[0].cpu()


def _measure(video: Tensor, start: Start, world: RealWorld, pipe: Pipeline) -> Measured:
    return measure_all(
        [(start.key, start.prompt, video)], fps=world.fps, device=pipe.device,
        networks=world.networks,
    )  # fmt: skip


def _psnr(frame: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, at most 60 (equal pictures have none)."""
    error = float((frame.float() - image.float()).square().mean())
    return 10 * math.log10(255**2 / max(error, 255**2 * 1e-6))


def _short(parts: list[Measured], world: RealWorld, psnr: list[float]) -> Section:
    videos, real = join(parts), world.short
    figures = compare(
        videos, real.reference, real.other, [*MOTION, *QUALITY, *CONSISTENCY, *DRIFT],
        floor_reference=real.floor_reference,
    )  # fmt: skip
    figures["first_frame_psnr"] = _mean(torch.tensor(psnr, dtype=torch.float64))
    seconds = (videos.frames - 1) / world.fps
    return Section(
        name="short", title=f"Videos of {seconds:.3g} s", figures=beside(figures, figures["M"]),
        videos=videos, reference=real.reference,
    )  # fmt: skip


def _long(parts: list[Measured], world: RealWorld, frames: int) -> Section:
    videos = join(parts)
    over_frames = [METRICS[name] for name in OVER_FRAMES]
    # Flow against the short real clips, whose first frames these are.
    figures = compare(videos, world.short.reference, None, over_frames, any_length=True)
    seconds = (videos.frames - 1) / world.fps
    note = "Motion and quality are set beside the short real clips, drift beside long ones."
    if world.long is not None and world.long.reference.videos.frames == videos.frames:
        reference = world.long.reference
        real = compare(
            videos, reference, world.long.other, [*over_frames, *CONSISTENCY, *DRIFT],
            floor_reference=world.long.floor_reference,
        )  # fmt: skip
        for name, figure in figures.items():  # the floors of the same length
            real[name] = replace(
                figure, floor=real[name].floor, floor_range=real[name].floor_range,
                floor_videos=real[name].floor_videos,
            )  # fmt: skip
        figures = real
    else:
        reference = world.short.reference
        alone = compare(videos, reference, None, DRIFT, any_length=True)
        missing = f"no real videos of {videos.frames} frames to set them beside (--long-data)"
        figures |= {
            name: not_computed(missing, len(videos)) if METRICS[name].ideal == "1" else figure
            for name, figure in alone.items()
        }
    return Section(
        name="long", title=f"Rollouts of {seconds:.3g} s", note=note,
        figures=beside(figures, figures["M"]), videos=videos, reference=reference,
    )  # fmt: skip


def _last(parts: list[Measured], world: RealWorld) -> Section:
    videos, real = join(parts), world.short
    figures = compare(
        videos, real.reference, real.other, [*MOTION, *QUALITY],
        floor_reference=real.floor_reference,
    )  # fmt: skip
    seconds = (videos.frames - 1) / world.fps
    return Section(
        name="last", title=f"The last {seconds:.3g} s of the long rollouts",
        note="Set beside the short real clips, of equal length.",
        figures=beside(figures, figures["M"]), videos=videos, reference=real.reference,
    )  # fmt: skip


def _controls(
    pipe: Pipeline,
    starts: Sequence[Start],
    world: RealWorld,
    tell: Tell,
    generated: Sequence[tuple[str, str, Measured]],
) -> list[Section]:
    """First frames held still, real clips through the codec, and `generated` beside those.

    generated: name, title and videos of sections whose videos are as long as the real ones.
    """
    real = world.short
    frames = real.reference.videos.frames
    frozen = measure_all(
        ((s.key, s.prompt, s.image.expand(frames, -1, -1, -1)) for s in starts),
        fps=world.fps, device=pipe.device, networks=world.networks,
    )  # fmt: skip
    metrics = [*MOTION, *QUALITY, *CONSISTENCY, *DRIFT]
    figures = compare(frozen, real.reference, None, metrics, resamples=0)
    sections = [
        Section(
            name="frozen", title="Control: the first frames held still",
            figures=beside(figures, figures["M"]),
            note="What a collapsed model gets. A figure that calls this good says nothing alone.",
        )
    ]  # fmt: skip
    if world.originals is None or isinstance(pipe.codec, PixelCodec):
        return sections

    def decoded(videos: Videos) -> Measured:
        return measure_all(
            (
                (key, prompt, pipe.codec.decode(pipe.codec.encode(video[None].to(pipe.device)))[0])
                for key, prompt, video in videos()
            ),
            fps=world.fps, device=pipe.device, networks=world.networks,
        )  # fmt: skip

    tell("real clips through the codec")
    one, two = (decoded(videos) for videos in world.originals)
    chosen = [METRICS[name] for name in ("M", "niqe", "sharpness", "FDtd", "FD_motion",
                                         "FDnss_early", "FDnss_late")]  # fmt: skip
    some = two.select(range(min(len(starts), len(two))))
    against_real = compare(some, real.reference, real.other, chosen, resamples=0)
    sections.append(
        Section(
            name="codec", title="Control: other real clips through the codec",
            figures=beside(against_real, against_real["M"]),
            note="No model with this codec can be expected to do better.",
        )
    )  # fmt: skip
    codec_reference = Reference.of(one, real.reference.frames)
    for name, title, videos in generated:
        figures = compare(videos, codec_reference, two, chosen)
        sections.append(
            Section(
                name=f"{name}_codec", title=f"{title}, real clips through the codec beside them",
                figures=beside(figures, figures["M"]),
                note="What the codec loses is on both sides, so this is of the generator alone; "
                "real against real: two sets of real clips, both through the codec.",
            )
        )  # fmt: skip
    return sections


# ---- does it do what the prompt says? -----------------------------------------------------------


def steerable(world: RealWorld) -> bool:
    """Whether the real prompts include some whose direction of flow is known."""
    return bool(set(world.short.reference.videos.prompts) & set(STEERING))


def share(hits: Tensor, real: Tensor | None = None) -> Figure:
    """A share with Wilson's interval, and that of real videos beside it; bool [N]."""
    count = int(hits.sum())
    some = real is not None and len(real) > 0
    return Figure(
        value=count / len(hits), interval=wilson(count, len(hits)),
        floor=float(real.double().mean()) if some and real is not None else None,
        floor_range=wilson(int(real.sum()), len(real)) if some and real is not None else None,
        videos=len(hits), floor_videos=len(real) if real is not None else 0,
    )  # fmt: skip


def _steering(pipe: Pipeline, world: RealWorld, plan: Plan, chunks: int, tell: Tell) -> Section:
    starts = world.starts[: plan.steered]
    seeds = [plan.seed + i for i in range(len(starts))]
    tables = [world.short.reference.videos, *([world.short.other] if world.short.other else [])]
    figures: dict[str, Figure] = {}

    def across(videos: Sequence[Tensor]) -> Tensor:
        stride = 1 + 2 * stride_for(len(videos[0]))  # a sign needs fewer pairs than M
        return torch.stack(
            [motion(v[None].to(pipe.device), stride=stride).direction[0, 0] for v in videos]
        )

    for prompt, sign in STEERING.items():
        real = torch.cat(
            [t.direction[[i for i, p in enumerate(t.prompts) if p == prompt], 0] for t in tables]
        )
        if len(real) == 0:
            continue
        tell(f'{len(starts)} rollouts with "{prompt}"')
        made = list(rollouts(pipe, starts, seeds, chunks, [[prompt]] * len(starts)))
        figures[f"steer: {prompt}"] = share(across(made) * sign > 0, real * sign > 0)
    if {"steer: turn left", "steer: turn right"} <= figures.keys():
        tell(f"{len(starts)} rollouts that turn left, then right")
        half = max(2, chunks // 2)
        captions = [["turn left"] * (1 + half) + ["turn right"] * half] * len(starts)
        made = list(rollouts(pipe, starts, seeds, 2 * half, captions))
        middle = 1 + half * pipe.info.geometry.chunk * pipe.codec.temporal_stride
        before = across([video[1:middle] for video in made])
        after = across([video[middle:] for video in made])
        figures["switch"] = share((before > 0) & (after < 0))
    return Section(
        name="steering", title="Steering", figures=figures,
        note="The same first frames with each prompt. Share of videos whose mean horizontal flow "
        "has the sign that the prompt asks for; beside it that of real clips with this prompt.",
    )  # fmt: skip


def _diversity(pipe: Pipeline, world: RealWorld, plan: Plan, chunks: int, tell: Tell) -> Section:
    starts = world.starts[: plan.repeated]
    again = [start for start in starts for _ in range(plan.samples)]
    seeds = [plan.seed + 10_000 + i for i in range(len(again))]
    tell(f"{plan.samples} samples of each of {len(starts)} first frames")
    speeds, ends, flows = [], [], []
    for video in rollouts(pipe, again, seeds, chunks):
        stride = 1 + 2 * stride_for(len(video))
        flows.append(motion(video[None].to(pipe.device), stride=stride).magnitude[0])
        ends.append(grey(video[-1]))
        speeds.append(pan_speed(video) if world.state is not None else torch.zeros(()))
    within = torch.stack(flows).view(len(starts), -1).std(dim=1)
    frames = torch.stack(ends).unflatten(0, (len(starts), -1)).std(dim=1).mean(dim=(1, 2)).double()
    no_truth = "one real video per first frame: how much real futures differ is not known"
    figures = {"diversity_flow": _mean(within), "diversity_frames": _mean(frames)}
    if world.state is not None:
        pans = [i for i, s in enumerate(starts) if "pans" in s.prompt]
        decoded = torch.stack(speeds).view(len(starts), -1).std(dim=1).double()
        if pans:
            ratio = decoded[pans] / true_pan_deviation(world.state)
            figures["diversity_camera"] = _mean(ratio)
        else:
            figures["diversity_camera"] = not_computed("no prompt says that the camera pans")
    return Section(
        name="diversity", title="Samples of one prompt",
        note=f"{plan.samples} samples of each first frame and prompt. For flow and frames: "
        f"{no_truth}; 0 is a model that ignores its noise.",
        figures=figures,
    )  # fmt: skip


def _mean(values: Tensor) -> Figure:
    return Figure(
        value=float(values.mean()),
        interval=bootstrap(lambda i: float(values[i].mean()), [str(k) for k in range(len(values))]),
        floor=None, floor_range=None, videos=len(values), floor_videos=0,
    )  # fmt: skip
