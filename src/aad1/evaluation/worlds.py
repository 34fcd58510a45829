"""Where real videos come from: recorded shards, the drawn world, or what the package carries.

Reference clips give the first frames, the prompts and what the figures are set against; other
clips give the floors. Neither may have been used in training or in choosing weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aad1.data.batch import Clips
from aad1.data.shards import ClipShards
from aad1.errors import UserError
from aad1.evaluate.compare import Reference
from aad1.evaluate.frechet import LEAST_VIDEOS
from aad1.evaluate.measure import Measured, join, measure_all
from aad1.evaluate.networks import Networks, for_world
from aad1.media.images import read_image
from aad1.media.reading import read_video
from aad1.media.writing import write_video
from aad1.model_names import PACKAGED
from aad1.worlds.sprites import SpritesConfig, SpritesState, draw

REFERENCE_CLIPS = 128
DRAWN_SEED = 0x5EED_E7A1
"""Of drawn clips; training and its monitor draw from other seeds."""

Videos = Callable[[], Iterator[tuple[str, str, Tensor]]]
"""Key, prompt and uint8 [T, H, W, 3] of each video, from the first on at every call."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a generated video begins with."""

    key: str
    captions: list[str]
    """One per chunk, the last one holds for all after it; the first is the image's."""
    image: Tensor
    """uint8 [H, W, 3]."""

    @property
    def prompt(self) -> str:
        """The captions in one line."""
        return prompt_of(self.captions)


def prompt_of(captions: Sequence[str]) -> str:
    """Captions of the chunks after the image, those that repeat said once."""
    return ", then ".join(dict.fromkeys(captions[1:] or captions))


@dataclass(frozen=True, kw_only=True)
class RealVideos:
    """Real videos of one length: the reference, and others for its floors."""

    reference: Reference
    other: Measured | None
    floor_reference: Reference | None = None

    @staticmethod
    def of(
        reference: Measured, other: Measured | None, like: Reference | None = None
    ) -> RealVideos:
        """Without others, the floors are those of every second video against the rest.

        like: takes its statistics of frames instead of fitting new ones.
        """
        frames = None if like is None else like.frames
        fitted = Reference.of(reference, frames)
        if other is not None or len(reference) < 4:
            return RealVideos(reference=fitted, other=other)
        return RealVideos(
            reference=fitted,
            other=reference.select(range(1, len(reference), 2)),
            floor_reference=Reference.of(reference.select(range(0, len(reference), 2)), frames),
        )


@dataclass(frozen=True, kw_only=True)
class RealWorld:
    """Everything real that the evaluation of a model needs."""

    name: str
    fps: float
    short: RealVideos
    long: RealVideos | None
    starts: list[Start]
    clips: list[Tensor]
    """Real continuations of the first starts, to look at; perhaps fewer."""
    state: SpritesState | None = None
    """What truly happens in the other drawn clips."""
    truth: Tensor | None = None
    """These clips, uint8 [N, T, H, W, 3]."""
    originals: tuple[Videos, Videos] | None = None
    """The reference clips and the others again, as videos; packaged statistics have none."""
    networks: Networks | None = None
    """The world's metric networks, if the package has them."""


def recorded(
    folder: Path, *, clips: int, skip: int, fps: float, long: Path | None,
    device: torch.device | str = "cpu",
) -> RealWorld:  # fmt: skip
    """Clips of shards (`aad1 data`): half of them the reference, from clip `skip` on.

    long: shards of longer clips, for what drift and flow of real videos are at that length.
    Raises UserError for shards that hold no videos or too few of them.
    """
    shards = _video_shards(folder)
    count = min(len(shards) // 2, max(clips, REFERENCE_CLIPS))
    if count < LEAST_VIDEOS:
        raise UserError(
            f"{folder} holds {len(shards)} clips, at least {2 * LEAST_VIDEOS} are needed: half "
            "for the reference, half for the real-against-real floor"
        )
    if clips > count:
        raise UserError(
            f"--clips {clips} needs {2 * clips} real clips, {folder} holds {len(shards)}"
        )
    numbers = [(skip + k) % len(shards) for k in range(2 * count)]
    networks = for_world(shards.manifest["world"], device)
    originals = (
        partial(_read, shards, numbers[:count]), partial(_read, shards, numbers[count:])
    )  # fmt: skip
    one, two = (
        measure_all(videos(), fps=fps, device=device, networks=networks) for videos in originals
    )
    short = RealVideos.of(one, two)
    longer = None
    if long is not None:
        many = _video_shards(long)
        longer = RealVideos.of(
            measure_all(
                _read(many, range(len(many)), "long clip"),
                fps=fps,
                device=device,
                networks=networks,
            ),
            None,
            short.reference,
        )
    # Neighbouring clips come from the same few maps, so the first frames are spread out.
    chosen = [numbers[k * count // clips] for k in range(clips)]
    videos = [shards.tensors([n])[0] for n in chosen[:8]]
    starts = [
        Start(key=f"clip {n}", captions=shards.captions[n], image=shards.tensors([n])[0, 0])
        for n in chosen
    ]
    return RealWorld(
        name=shards.manifest["world"],
        fps=fps,
        short=short,
        long=longer,
        starts=starts,
        clips=videos,
        originals=originals,
        networks=networks,
    )


def _video_shards(folder: Path) -> ClipShards:
    shards = ClipShards(folder)
    if shards.tensor != "video":
        raise UserError(f"{folder} holds {shards.tensor}, but real videos are needed")
    return shards


def _read(
    shards: ClipShards, numbers: Sequence[int], name: str = "clip"
) -> Iterator[tuple[str, str, Tensor]]:
    for n in numbers:
        yield f"{name} {n}", prompt_of(shards.captions[n]), shards.tensors([n])[0]


def drawn(
    config: SpritesConfig, *, clips: int, long_frames: int, fps: float,
    device: torch.device | str = "cpu", reference_clips: int = REFERENCE_CLIPS,
) -> RealWorld:  # fmt: skip
    """The drawn world, from seeds that training and its monitor do not use."""
    count = max(clips, reference_clips)
    networks = for_world("sprites", device)
    one, _ = draw(config, count, seed=DRAWN_SEED, device=device)
    two, state = draw(config, count, seed=DRAWN_SEED + 1, device=device)
    longer = replace(config, frames=long_frames)
    many, _ = draw(longer, max(32, count // 4), seed=DRAWN_SEED + 2, device=device)

    def rows(clips: Clips, name: str) -> Iterator[tuple[str, str, Tensor]]:
        for i, video in enumerate(clips.video):
            yield f"{name} {i}", prompt_of(clips.captions[i]), video

    def measured(clips: Clips, name: str) -> Measured:
        return measure_all(rows(clips, name), fps=fps, device=device, networks=networks)

    short = RealVideos.of(measured(one, "clip"), measured(two, "other clip"))
    long = RealVideos.of(measured(many, "long clip"), None, short.reference)
    starts = [
        Start(key=f"clip {i}", captions=one.captions[i], image=one.video[i, 0].cpu())
        for i in range(clips)
    ]
    return RealWorld(
        name="sprites", fps=fps, short=short, long=long, starts=starts,
        clips=list(one.video[: min(8, clips)].cpu()), state=state, truth=two.video.cpu(),
        originals=(partial(rows, one, "clip"), partial(rows, two, "other clip")),
        networks=networks,
    )  # fmt: skip


# ---- what the package carries -------------------------------------------------------------------


def packaged_folder(world: str) -> Path:
    """Where the statistics of a world's real clips lie; UserError if there are none."""
    folder = PACKAGED / f"{world}_evaluate"
    if not (folder / "starts.json").is_file():
        raise UserError(
            f"no statistics of real clips are packaged for the world {world!r}: leave out --quick "
            "and give --world sprites or a folder of video shards"
        )
    return folder


def packaged(folder: Path, *, clips: int, device: torch.device | str = "cpu") -> RealWorld:
    """What `runs/pack_evaluation.py` wrote: statistics, first frames, a few real clips."""
    facts = json.loads((folder / "starts.json").read_text(encoding="utf-8"))
    listed = facts["starts"]
    if clips > len(listed):
        raise UserError(f"--clips {clips} is more than the {len(listed)} packaged first frames")
    both = Measured.load(folder / "real.safetensors")
    half = len(both) // 2
    short = RealVideos.of(both.select(range(half)), both.select(range(half, 2 * half)))
    long = RealVideos.of(Measured.load(folder / "long.safetensors"), None, short.reference)
    starts = [
        Start(
            key=start["key"], captions=start["captions"],
            image=read_image(folder / start["image"], width=both.width, height=both.height),
        )
        for start in listed[:clips]
    ]  # fmt: skip
    videos = [read_video(folder / start["video"]) for start in listed[:clips] if "video" in start]
    return RealWorld(
        name=facts["world"], fps=both.fps, short=short, long=long, starts=starts, clips=videos,
        networks=for_world(facts["world"], device),
    )  # fmt: skip


def pack(world: RealWorld, folder: Path, *, starts: int, videos: int) -> None:
    """Writes what `packaged` reads, statistics last."""
    from PIL import Image

    if world.short.other is None or world.long is None:
        raise UserError("packing needs other real clips for the floors, and long ones")
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, Any]] = []
    for i, start in enumerate(world.starts[:starts]):
        entry: dict[str, Any] = {"key": start.key, "captions": start.captions}
        entry["image"] = f"{i:02}.png"
        Image.fromarray(start.image.numpy()).save(folder / f"{i:02}.png", optimize=True)
        if i < min(videos, len(world.clips)):
            entry["video"] = f"{i:02}.mp4"
            write_video(folder / f"{i:02}.mp4", world.clips[i], world.fps, scale=1)
        listed.append(entry)
    join([world.short.reference.videos, world.short.other]).save(folder / "real.safetensors")
    world.long.reference.videos.save(folder / "long.safetensors")
    content = json.dumps({"world": world.name, "starts": listed}, indent=1) + "\n"
    (folder / "starts.json").write_text(content, encoding="utf-8")
