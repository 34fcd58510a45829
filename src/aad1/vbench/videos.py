"""The video set: VBench's names, one flat folder, made in any number of goes, checked for gaps.

out/videos/{prompt}-{0..4}.mp4    and nothing else in that folder, which VBench lists
out/videos.json                   how they were made: settings, and the seed of each
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.media.mp4 import record
from aad1.media.reading import VideoInfo, probe_video
from aad1.vbench.protocol import SEEDS, Pair, video_name

CRF = 10  # what VBench's instructions encode with

Make: TypeAlias = Callable[[Path, str, int], Iterator[torch.Tensor]]
"""(image, prompt, seed) -> parts of a video, uint8 [T, H, W, 3] each."""


@dataclass(frozen=True)
class Wanted:
    """One video of the set."""

    name: str
    prompt: str
    image: Path
    seed: int


def wanted_videos(
    pairs: Sequence[Pair], images: Path, *, seeds: int = SEEDS, seed: int = 0
) -> list[Wanted]:
    """All videos of a set; the k-th has the seed `seed` + k, so that no two share their noise."""
    if not 1 <= seeds <= SEEDS:
        raise UserError(f"seeds must be in 1..{SEEDS}, which is what VBench looks at, got {seeds}")
    return [
        Wanted(video_name(pair.prompt, i), pair.prompt, images / pair.image, seed + p * seeds + i)
        for p, pair in enumerate(pairs)
        for i in range(seeds)
    ]


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` pairs, evenly spread over the list; for the drift set, as the paper names none."""
    if not 1 <= count <= len(pairs):
        raise UserError(f"the number of drift videos must be in 1..{len(pairs)}, got {count}")
    return [pairs[k * len(pairs) // count] for k in range(count)]


def make_videos(
    folder: Path,
    wanted: Sequence[Wanted],
    make: Make,
    *,
    fps: float,
    settings: Mapping[str, Any],
    part: tuple[int, int] = (0, 1),
    on_video: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Make those videos of `folder` that are not there yet; returns how many were made.

    settings: written to {folder}.json with the seeds; a folder that was begun with others is
        refused, since a mixed set measures no model.
    part: (i, n) makes each n-th video from the i-th on, so that n processes share a set.
    on_video: called with (number there now, number of the part) after each.

    UserError before the first video if an image is missing, or the settings differ.
    """
    index, parts = part
    if not 0 <= index < parts:
        raise UserError(f"--part must be i/n with 0 <= i < n, got {index}/{parts}")
    missing = sorted({str(w.image) for w in wanted if not w.image.is_file()})
    if missing:
        raise UserError(
            f"{len(missing)} of {len({w.image for w in wanted})} images are missing, for example "
            f"{missing[0]} (docs/vbench.md says how to get and crop them)"
        )
    _keep_settings(folder, {**settings, "fps": fps, "crf": CRF}, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    mine = wanted[index::parts]
    made = 0
    for done, video in enumerate(mine, start=1):
        if not (folder / video.name).is_file():
            _write(folder, video, make, fps)
            made += 1
        on_video(done, len(mine))
    return made


def _write(folder: Path, video: Wanted, make: Make, fps: float) -> None:
    """Encode beside the folder and move the finished file in: VBench lists all that is in it."""
    unfinished = folder.with_name(f".{folder.name}.unfinished") / video.name
    with record(unfinished, fps, CRF) as encoder:
        for frames in make(video.image, video.prompt, video.seed):
            encoder.write(np.asarray(frames))
    os.replace(unfinished, folder / video.name)


def _keep_settings(folder: Path, settings: Mapping[str, Any], wanted: Iterable[Wanted]) -> None:
    path = settings_path(folder)
    seeds = {video.name: video.seed for video in wanted}
    plain = json.loads(json.dumps(settings))
    before = read_settings(folder)
    if before is None:
        with replace_file(path) as temporary:
            record_ = {"settings": plain, "seeds": seeds}
            temporary.write_text(json.dumps(record_, indent=1), encoding="utf-8")
        return
    for name in {**before["settings"], **plain}:
        old, new = before["settings"].get(name), plain.get(name)
        if old != new:
            raise UserError(
                f"{folder} was begun with {name} {old!r}, not {new!r}; use another --out"
            )
    if before["seeds"] != seeds:
        raise UserError(f"{folder} was begun with other prompts or seeds; use another --out")


def settings_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What `make_videos` noted for the folder; None for videos that were made elsewhere."""
    path = settings_path(folder)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(found["settings"]), "seeds": dict(found["seeds"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it and the folder {folder}") from None


def check_videos(
    folder: Path, names: Collection[str], *, least_side: int = 1, least_frames: int = 2
) -> tuple[list[str], VideoInfo | None]:
    """What is wrong with a set, one line a file; and the shape that its videos have.

    Every name must be there, be a video, and have the same size, length and rate as the others;
    the folder must hold nothing else.
    """
    problems: list[str] = []
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    problems += [f"{folder / name}: missing" for name in names if name not in present]
    problems += [
        f"{folder / name}: not one of the set (VBench lists the folder)"
        for name in sorted(present - set(names))
    ]
    first: VideoInfo | None = None
    for name in names:
        if name not in present:
            continue
        try:
            info = probe_video(folder / name)
        except UserError as error:
            problems.append(str(error))
            continue
        first = first or info
        shape, other = _shape(info), _shape(first)
        if shape != other:
            problems.append(f"{folder / name}: {_words(shape)}, others {_words(other)}")
    if first is not None and min(first.width, first.height) < least_side:
        problems.append(
            f"{folder}: videos of {first.width}x{first.height} are too small, the shorter side "
            f"must be at least {least_side} (below, RAFT's flow is NaN): enlarge them first"
        )
    if first is not None and first.frames < least_frames:
        problems.append(f"{folder}: {first.frames} frames a video, at least {least_frames} needed")
    return problems, first


def _shape(info: VideoInfo) -> tuple[int, int, int, float]:
    return info.width, info.height, info.frames, round(info.fps, 2)


def _words(shape: tuple[int, int, int, float]) -> str:
    width, height, frames, fps = shape
    return f"{width}x{height}, {frames} frames at {fps:g} fps"
