"""The world of a user's own clips: a folder of video files with a caption each.

A caption is `name.txt` beside `name.mp4`, or a row of `captions.csv` (columns file, caption), or a
line of `captions.jsonl` ({"file": "name.mp4", "caption": "..."}), or an entry of `captions.json`
({"name.mp4": "caption"}); of several, the first in this order counts. Folders within are looked
through too; the tables lie in the outermost one and name such a file by its path there
(`walks/a.mp4`), or by its name alone if no other has it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aad1.data.batch import Clips
from aad1.errors import UserError
from aad1.media.reading import VideoInfo, probe_video, read_video

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")


@dataclass(frozen=True, kw_only=True)
class FolderClip:
    """One stretch of one video: from `start` seconds on, with the video's caption."""

    path: Path
    start: float
    caption: str
    info: VideoInfo


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that gives no clip, and why."""

    path: Path
    reason: str


class FolderWorld:
    """The clips in a folder. Files are looked through at once; a clip is decoded when asked for.

    width, height: of the frames in pixels; videos are scaled and cropped at the centre.
    frames: per clip. fps: frames a second; videos of another rate are resampled by their clock.
    frames_per_chunk: video frames that share one caption; the first frame is a chunk of its own.
    hop: frames from the start of one clip of a video to the next; None is `frames`, no overlap.

    clips: what was found, by file name and time. skipped: the files that give none.

    Raises:
        UserError: no folder, captions that cannot be parsed, no usable video in it (with the
            reasons), or a number out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        width: int,
        height: int,
        frames: int = 81,
        fps: float = 16.0,
        frames_per_chunk: int = 16,
        hop: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.width, self.height = width, height
        self.frames, self.fps = frames, fps
        self.frames_per_chunk = frames_per_chunk
        self.hop = frames if hop is None else hop
        for name in ("width", "height", "frames", "fps", "frames_per_chunk", "hop"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be > 0")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder")
        clips: list[FolderClip] = []
        skipped: list[Skipped] = []
        captions = _read_captions(self.folder)
        videos = [p for p in sorted(self.folder.rglob("*")) if p.suffix.lower() in SUFFIXES]
        videos = [p for p in videos if not any(s[0] == "." for s in p.relative_to(folder).parts)]
        count = Counter(name for path in videos for name in {path.name, path.stem})
        for path in videos:
            try:
                clips += self._clips_of(path, _caption_of(path, self.folder, captions, count))
            except UserError as error:
                skipped.append(Skipped(path=path, reason=str(error).removeprefix(f"{path} ")))
        names = {name for path in videos for name in _names(path, self.folder)}
        for name in sorted(captions.keys() - names):
            skipped.append(Skipped(path=self.folder / name, reason="has a caption but no video"))
        self.clips: tuple[FolderClip, ...] = tuple(clips)
        self.skipped: tuple[Skipped, ...] = tuple(skipped)
        if not clips:
            why = "; ".join(f"{self.name(item.path)} {item.reason}" for item in skipped[:3])
            more = f"; {len(skipped) - 3} more" if len(skipped) > 3 else ""
            none = f"it holds no file that ends in {', '.join(SUFFIXES)}"
            raise UserError(f"{self.folder} gives no clip: {why + more or none}")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.clips)

    @property
    def num_chunks(self) -> int:
        """Captions per clip: the image's and one per chunk begun."""
        return 1 + math.ceil((self.frames - 1) / self.frames_per_chunk)

    def name(self, path: Path) -> str:
        """A file of this folder as people call it: by its path from here."""
        return path.relative_to(self.folder).as_posix()

    def report(self) -> str:
        """What was found and what was left out, one line per file left out."""
        videos = len({clip.path for clip in self.clips})
        head = f"{len(self.clips)} clips of {self.frames} frames from {videos} videos"
        if not self.skipped:
            return head
        lines = [f"  {self.name(item.path)}: {item.reason}" for item in self.skipped]
        return "\n".join([f"{head}; {len(lines)} skipped:", *lines])

    def batch(self, indices: Sequence[int]) -> Clips:
        """Decode the clips of these numbers: video uint8 [B, frames, height, width, 3].

        Raises:
            UserError: no indices, or a file that has gone or is damaged beyond its first frame.
        """
        if len(indices) == 0:
            raise UserError("a batch needs at least one clip")
        clips = [self.clips[index] for index in indices]
        videos = [
            read_video(
                clip.path,
                fps=self.fps,
                start=clip.start,
                frames=self.frames,
                width=self.width,
                height=self.height,
                info=clip.info,
            )
            for clip in clips
        ]
        captions = [[clip.caption] * self.num_chunks for clip in clips]
        return Clips(video=torch.stack(videos), captions=captions)

    def __iter__(self) -> Iterator[Clips]:
        """Every clip once, in order, one at a time; a damaged one is left out with a warning."""
        return self._read_each(range(len(self)))

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Clips]:
        """Endless batches, shuffled anew each time through the folder; damaged clips are left out.

        Raises:
            UserError: batch_size < 1, or a whole round in which no clip could be read.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be >= 1")
        waiting: list[Clips] = []
        epoch = 0
        while True:
            order = list(range(len(self)))
            random.Random(f"{seed}-{epoch}").shuffle(order)
            some = False
            for clip in self._read_each(order):
                some = True
                waiting.append(clip)
                if len(waiting) == batch_size:
                    yield _join(waiting)
                    waiting = []
            if not some:
                raise UserError(f"none of the {len(self)} clips of {self.folder} can be read")
            epoch += 1

    def _read_each(self, order: Sequence[int]) -> Iterator[Clips]:
        for index in order:
            try:
                clip = self.batch([index])
            except UserError as error:
                warnings.warn(f"clip left out: {error}", stacklevel=2)
                continue
            yield clip

    def _clips_of(self, path: Path, caption: str) -> list[FolderClip]:
        info = probe_video(path)
        held = info.frames_at(self.fps)
        if held < self.frames:
            raise UserError(
                f"too short: {info.duration:.2f} s are {held} frames at {self.fps:g} fps, "
                f"{self.frames} are needed"
            )
        # Decoding one frame tells a damaged file now rather than in the middle of a training.
        read_video(path, fps=self.fps, frames=1, width=16, height=16, info=info)
        starts = range(0, held - self.frames + 1, self.hop)
        return [
            FolderClip(path=path, start=start / self.fps, caption=caption, info=info)
            for start in starts
        ]


def _join(clips: Sequence[Clips]) -> Clips:
    return Clips(
        video=torch.cat([clip.video for clip in clips]),
        captions=[caption for clip in clips for caption in clip.captions],
    )


def _names(path: Path, folder: Path) -> tuple[str, ...]:
    """What a table may call a file of `folder`: by path, by name, each with its suffix or not."""
    inside = path.relative_to(folder)
    return inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem


def _caption_of(path: Path, folder: Path, captions: dict[str, str], count: Counter[str]) -> str:
    """count: how many videos have a name (or a name without its suffix)."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        caption = " ".join(_read_text(beside).split())
        if not caption:
            raise UserError(f"no caption: {beside.name} is empty")
        return caption
    for name in _names(path, folder):
        if not captions.get(name):
            continue
        if path.parent != folder and "/" not in name and count[name] > 1:
            raise UserError(
                f"no caption: {count[name]} videos are called {name}; name them by their paths"
            )
        return captions[name]
    raise UserError(f"no caption: neither {beside.name} nor captions.csv, .jsonl or .json has one")


def _read_captions(folder: Path) -> dict[str, str]:
    """{file name: caption} of captions.json, .jsonl and .csv, the later ones first in rank."""
    found: dict[str, str] = {}
    path = folder / "captions.json"
    if path.is_file():
        try:
            data = json.loads(_read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
            raise UserError(f'{path} must be {{"name.mp4": "caption", ...}}')
        found |= data
    path = folder / "captions.jsonl"
    if path.is_file():
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, caption = row["file"], row["caption"]
            except (json.JSONDecodeError, TypeError, KeyError):
                name = caption = None
            if not isinstance(name, str) or not isinstance(caption, str):
                raise UserError(
                    f'{path} line {number} must be {{"file": "name.mp4", "caption": "..."}}'
                )
            found[name] = caption
    path = folder / "captions.csv"
    if path.is_file():
        rows = csv.DictReader(io.StringIO(_read_text(path), newline=""), skipinitialspace=True)
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise UserError(f"{path} must begin with a line that names the columns file, caption")
        for row in rows:
            if None in row or row["caption"] is None:
                raise UserError(
                    f"{path} line {rows.line_num} has more or fewer columns than the first line; "
                    f"a caption with a comma needs double quotes"
                )
            found[row["file"]] = row["caption"]
    return {name: " ".join(caption.split()) for name, caption in found.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable UTF-8 text: {error}") from None
