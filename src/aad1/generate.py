"""`aad1 generate`: from an image or a prompt to a video file, written as its frames are made."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aad1.errors import UserError
from aad1.flags import check_size, pair_loras, parse_size

if TYPE_CHECKING:
    import torch

    from aad1.model_info import ModelInfo
    from aad1.pipeline import Pipeline
    from aad1.rollout.teacher import Sampling
    from aad1.streaming import Stream


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Turn an image and a prompt, or a prompt alone, into a video, chunk by chunk.

    Example: aad1 generate --image frame.png --prompt "turn left"
    """

    image: Path | None = None
    """Picture to continue (png, jpg, ...); resized and centre-cropped, never distorted. May be
    left out with models that make a video from the prompt alone."""
    prompt: str = ""
    """What should happen; the model's words are listed if it knows some of yours not."""
    model: str = "doom"
    """Packaged name, folder, or hub id; Wan 2.1's own folder (a teacher); or a generator made from
    it, in any format that `aad1 convert` reads."""
    base: str | None = None
    """Wan 2.1's folder, for the parts that a generator by itself lacks."""
    recipe: str | None = None
    """How a generator made elsewhere is rolled out: aad1, self-forcing, causvid, longlive,
    one-forcing, one-forcing-frame; or teacher."""
    weights: str = ""
    """Which weights of a .pt that holds several; the moving average (generator_ema) by default."""
    lora: tuple[Path, ...] = ()
    """LoRA files to merge into the transformer, in this order."""
    lora_scale: tuple[float, ...] = ()
    """One scale per LoRA; 1 by default."""
    out: Path = Path("out.mp4")
    """.mp4, .gif, or .png (a contact sheet)."""
    chunks: int = 5
    """Chunks to make; one is 16 frames (1 second) with a Wan-strided codec, 4 on sprites."""
    seconds: float | None = None
    """Make a video of this length, rounded up to whole chunks, instead of a number of chunks."""
    endless: bool = False
    """Go on until Ctrl-C, which finishes the chunk and the file (mp4 only)."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, such as 1280x720; the model's own if left out."""
    steps: int | None = None
    """Network passes per chunk: 1, 2 or 4. For a teacher: steps in all, any number."""
    seed: int = 0
    """Same seed, same video; the first n chunks do not depend on how many follow."""
    negative_prompt: str | None = None
    """Teachers only: what to be guided away from; Wan's published one if left out."""
    guidance: float | None = None
    """Teachers only: strength of the guidance; 1 is none."""
    shift: float | None = None
    """Teachers only: above 1, more of the steps at high noise."""
    solver: Literal["exact", "euler", "unipc"] | None = None
    """Teachers only: how to step; the model folder's scheduler if left out."""
    text_cache: Path | None = None
    """Folder that keeps encoded prompts, so that Wan's large prompt encoder need not be loaded."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 for Wan's networks on cuda and float32 otherwise."""
    offload: bool = False
    """Keep the transformer in host memory and bring it to the CUDA device block by block: for 14B
    on cards of 24 GB. Slower than a card that holds it all."""
    plain: bool = False
    """Without the fast path, which is on by default on cuda and cpu."""
    fp8: bool = False
    """The blocks' matrices in float8: faster on GPUs that can, and not quite the same video."""
    without: str = ""
    """Parts of the fast path to leave out, such as compile,cudnn; see `aad1 bench --help`."""
    decoder: Path | None = None
    """A tiny decoder's file (TAEHV layout, taew2_1) for models with Wan's latents: sooner and
    softer."""
    scale: int = 0
    """Enlarge the video by this factor; 0 picks one that makes small videos easy to see."""


TEACHER_FLAGS = ("negative_prompt", "guidance", "shift", "solver")


def generate(args: Generate) -> None:
    """Write the video and print the speed. UserError before anything is written."""
    import torch

    from aad1.device import pick_device
    from aad1.media.images import read_image
    from aad1.media.writing import check_video_path
    from aad1.model_info import read_info
    from aad1.model_names import find_model
    from aad1.pipeline import Pipeline
    from aad1.wan_folder import UNIT, WORLD, find_wan, is_wan

    if args.chunks < 1:
        raise UserError(f"--chunks must be at least 1, got {args.chunks}")
    if args.scale < 0:
        raise UserError(f"--scale must be at least 0, got {args.scale}")
    if args.endless and args.seconds is not None:
        raise UserError(f"--endless and --seconds {args.seconds:g} exclude each other")
    check_video_path(args.out)
    if args.endless and args.out.suffix.lower() != ".mp4":
        raise UserError(f"--endless writes .mp4 only, which grows as it comes; got {args.out}")
    size = parse_size(args.size)
    folder = find_model(args.model)
    wan = is_wan(folder)
    # What is wrong is told now, not when 14 billion weights have been read.
    if wan and size is not None:
        check_size(size, (UNIT, UNIT))
    if args.image is not None:
        read_image(args.image, width=UNIT, height=UNIT)
    if wan:
        few = None if args.recipe in (None, "teacher") else args.steps
        base = None if args.base is None else find_model(args.base)
        _, info = find_wan(folder, base=base, recipe=args.recipe, steps=few, weights=args.weights)
    else:
        info = read_info(folder)
    _check(args, info)
    teacher = info.stage == "teacher"
    device = pick_device(args.device)
    dtype = torch.float32
    large = device.type == "cuda" and (wan or info.world == WORLD)
    if args.dtype == "bfloat16" or (args.dtype == "auto" and large):
        dtype = torch.bfloat16
    pipe = Pipeline.from_pretrained(
        folder, device=device, dtype=dtype, base=args.base, recipe=args.recipe,
        steps=None if teacher else args.steps, text_cache=args.text_cache, weights=args.weights,
        loras=pair_loras(args.lora, args.lora_scale), offload=args.offload, fast=False,
        decoder=args.decoder,
    )  # fmt: skip
    _speed_up(pipe, args)
    if teacher:
        return _sample(pipe, args, size)
    _stream(pipe, args, size)


def _check(args: Generate, info: ModelInfo) -> None:
    """UserError for flags that a model of that kind cannot follow."""
    if args.seconds is not None and not 0 < args.seconds < float("inf"):
        raise UserError(f"seconds must be above 0, got {args.seconds}")
    if info.stage == "teacher":
        if args.endless:
            raise UserError("--endless needs a distilled model; a teacher makes whole clips")
        if args.image is not None:
            info.check_streams()
        _sampling(args, info)
        return
    given = [name for name in TEACHER_FLAGS if getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is for teachers; this model is distilled")
    if args.image is None and not info.text_to_video:
        raise UserError("this model continues an image: give one (--image)")


def _speed_up(pipe: Pipeline, args: Generate) -> None:
    from aad1.fast.config import asked_config

    if args.offload and (args.fp8 or args.without):
        raise UserError("--offload leaves the fast path out; --fp8 and --without are parts of it")
    config = asked_config(
        pipe.device, pipe.transformer.config.width, plain=args.plain, fp8=args.fp8,
        without=args.without,
    )  # fmt: skip
    if config is not None and not args.offload:
        pipe.speed_up(config)


def _stream(pipe: Pipeline, args: Generate, size: tuple[int, int] | None) -> None:
    import torch

    from aad1.media.writing import write_video

    stream = pipe.stream(args.image, args.prompt, seed=args.seed, size=size)
    pipe.release_text()  # the prompt is encoded; its encoder may be larger than all the rest
    stream.chunks = args.chunks
    if args.seconds is not None:
        stream.chunks = stream.chunks_for(args.seconds)
    if args.endless:
        stream.chunks = None
    tally = _Tally()
    with torch.inference_mode(), _interruptible(args.endless) as stopped:
        parts = tally.count(stream, stopped)
        write_video(args.out, parts, pipe.info.fps, scale=args.scale or None)
    busy, model = tally.busy, tally.busy - stream.decode_seconds
    print(
        f"{args.out}: {tally.frames} frames, {tally.chunks} chunks in {tally.total():.1f} s; "
        f"{tally.chunks / busy:.2f} chunks/s, {tally.frames / busy:.1f} frames/s with decode, "
        f"{tally.frames / model:.1f} without"
    )


class _Tally:
    """Counts frames on their way to the file, and the time that making them took."""

    def __init__(self) -> None:
        self.frames = self.chunks = 0
        self.busy = 0.0
        self._began = time.perf_counter()

    def count(self, stream: Stream, stopped: list[bool]) -> Iterator[torch.Tensor]:
        while not stopped:
            start = time.perf_counter()
            part = next(stream, None)
            self.busy += time.perf_counter() - start
            if part is None:
                return
            self.chunks += 1
            self.frames += len(part)
            yield part

    def total(self) -> float:
        return time.perf_counter() - self._began


@contextmanager
def _interruptible(endless: bool) -> Iterator[list[bool]]:
    """A list that is no longer empty once Ctrl-C was pressed; pressed again, it interrupts."""
    stopped: list[bool] = []
    if not endless:
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        stopped.append(True)
        signal.signal(signal.SIGINT, before)
        print("aad1: finishing the file; Ctrl-C again drops it", file=sys.stderr)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _sample(pipe: Pipeline, args: Generate, size: tuple[int, int] | None) -> None:
    """A clip from a teacher: all frames at once, in many steps."""
    import torch

    from aad1.media.writing import write_video

    sampling = _sampling(args, pipe.info)
    frames = None
    if args.seconds is not None:
        frames = pipe.frames(
            1 + max(0, round(args.seconds * pipe.info.fps / pipe.codec.temporal_stride))
        )
    size = pipe.check_size(size)
    pipe.encode_prompt(args.prompt)
    if sampling.guidance != 1:
        pipe.encode_prompt(sampling.negative_prompt)
    pipe.release_text()
    began = time.perf_counter()

    def show(step: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if step == sampling.steps else ""
            print(f"\rstep {step}/{sampling.steps}", end=end, file=sys.stderr, flush=True)

    with torch.inference_mode():
        video = pipe.sample(
            args.prompt, seed=args.seed, size=size, frames=frames, sampling=sampling, on_step=show
        )
    write_video(args.out, video, pipe.info.fps, scale=args.scale or None)
    seconds = time.perf_counter() - began
    print(f"{args.out}: {len(video)} frames, {sampling.steps} steps in {seconds:.1f} s")


def _sampling(args: Generate, info: ModelInfo) -> Sampling:
    """How a teacher is to be sampled. UserError for what cannot be."""
    names = ("steps", *TEACHER_FLAGS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(info.sampling, **given)
