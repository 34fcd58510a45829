"""Two folders of videos against each other, whoever made them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aad1.errors import UserError
from aad1.evaluate.compare import CONSISTENCY, DRIFT, MOTION, QUALITY, beside, compare
from aad1.evaluate.measure import Measured, measure_all
from aad1.evaluate.networks import Networks
from aad1.evaluation.result import Picture, Result, Section
from aad1.evaluation.worlds import RealVideos
from aad1.media.reading import VideoInfo, probe_video, read_video

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
SHOWN = 8

NOTES = (
    "Read M first: a static video wins or draws every figure beside which M stands. Intervals are "
    "95%, from 2,000 resamples of prompts (Wilson's for shares). Real against real: every second "
    "real video against the rest, so the reference of the floors is half as large.",
    "Consistency and the motion Fréchet distance come from small networks trained on real clips of "
    "one world (--world sprites or doom); they are not comparable to VBench's numbers.",
)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The videos of a folder, looked through but not yet decoded."""

    path: Path
    files: tuple[Path, ...]
    infos: tuple[VideoInfo, ...]

    @property
    def frames(self) -> int:
        """Of the shortest video."""
        return min(info.frames for info in self.infos)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every video."""
        return self.infos[0].width, self.infos[0].height

    @property
    def fps(self) -> float:
        return self.infos[0].fps


def open_folder(path: Path) -> Folder:
    """Looks through a folder; UserError names what is missing, unreadable or of another size."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder of videos")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{path} holds no video (a file that ends in {', '.join(SUFFIXES)})")
    infos = [probe_video(file) for file in files]
    first = infos[0]
    for file, info in zip(files, infos, strict=True):
        if (info.width, info.height) != (first.width, first.height):
            raise UserError(
                f"videos must have one size: {file} is {info.width}x{info.height}, "
                f"{files[0].name} is {first.width}x{first.height}"
            )
        if abs(info.fps - first.fps) > 0.01 * first.fps:
            raise UserError(
                f"videos must have one frame rate: {file} has {info.fps:.4g}, "
                f"{files[0].name} has {first.fps:.4g}"
            )
    return Folder(path=path, files=tuple(files), infos=tuple(infos))


def key_of(file: Path) -> str:
    """What a video continues: its name, without the number of the sample ("a cat-3" -> "a cat")."""
    return re.sub(r"-\d+$", "", file.stem)


def evaluate_folders(
    generated: Path, real: Path, device: torch.device, networks: Networks | None = None
) -> Result:
    """Generated videos against real ones. UserError for folders that cannot be compared.

    networks: those of the videos' world, if it has some.
    """
    made, truth = open_folder(generated), open_folder(real)
    if made.size != truth.size:
        raise UserError(
            f"videos must have the real ones' size {truth.size[0]}x{truth.size[1]}, "
            f"those of {generated} are {made.size[0]}x{made.size[1]}"
        )
    if abs(made.fps - truth.fps) > 0.01 * truth.fps:
        raise UserError(
            f"videos must have the real ones' frame rate {truth.fps:.4g}, those of {generated} "
            f"have {made.fps:.4g}"
        )
    frames = min(made.frames, truth.frames)
    if len(truth.files) < 2:
        raise UserError(f"{real} holds 1 video, at least 2 real ones are needed")
    pictures: list[Picture] = []
    videos = _measured(made, frames, device, pictures, networks)
    reference = RealVideos.of(_measured(truth, frames, device, None, networks), None)
    figures = compare(
        videos, reference.reference, reference.other, [*MOTION, *QUALITY, *CONSISTENCY, *DRIFT],
        floor_reference=reference.floor_reference,
    )  # fmt: skip
    notes = list(NOTES)
    longest = max(info.frames for info in (*made.infos, *truth.infos))
    if longest > frames:
        notes.append(f"Videos of up to {longest} frames were cut to the shortest, {frames}.")
    section = Section(
        name="videos", title="All videos", figures=beside(figures, figures["M"]), videos=videos,
        reference=reference.reference,
    )  # fmt: skip
    facts = {
        "generated": f"{generated}: {len(made.files)} videos",
        "real": f"{real}: {len(truth.files)} videos",
        "compared": f"{frames} frames of {made.size[0]}x{made.size[1]} at {made.fps:.4g} fps",
        "paired by name": all(k in reference.reference.real_of for k in videos.keys),
    }
    return Result(
        title="Evaluation of a folder of videos", facts=facts, sections=(section,),
        notes=tuple(notes), pictures=tuple(pictures), fps=made.fps,
    )  # fmt: skip


def _measured(
    folder: Folder, frames: int, device: torch.device, pictures: list[Picture] | None,
    networks: Networks | None,
) -> Measured:  # fmt: skip
    def videos() -> Iterator[tuple[str, str, Tensor]]:
        for file, info in zip(folder.files, folder.infos, strict=True):
            video = read_video(file, fps=folder.fps, frames=frames, info=info)
            if pictures is not None and len(pictures) < SHOWN:
                pictures.append(Picture(title=file.stem, generated=video))
            yield key_of(file), key_of(file), video

    return measure_all(videos(), fps=folder.fps, device=device, networks=networks)
