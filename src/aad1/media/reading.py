"""Videos in: any file that FFmpeg decodes becomes uint8 RGB of the wanted size and rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from aad1.errors import UserError
from aad1.media.images import Pixels, check_file, fit


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds, from its packets (nothing decoded).

    start: time of the first frame on the file's clock, in seconds. fps: mean rate in frames a
    second. constant_rate: every frame within a tenth of a frame, or one tick, of an even grid.
    """

    width: int
    height: int
    frames: int
    start: float
    fps: float
    constant_rate: bool

    @property
    def duration(self) -> float:
        """In seconds, the last frame's own time included."""
        return self.frames / self.fps

    def frames_at(self, fps: float, start: float = 0.0) -> int:
        """How many frames `read_video` gives at another rate, from `start` seconds on."""
        return max(0, math.floor((self.duration - start) * fps + 1e-3))


def probe_video(path: str | Path) -> VideoInfo:
    """Size, length and rate of a video file.

    Raises:
        UserError: missing, empty, damaged, or without a video track or its timestamps.
    """
    path = Path(path)
    check_file(path, "a video")
    with _video_errors(path), _open_video(path) as (container, stream):
        tick = float(stream.time_base)
        packets = [p for p in container.demux(stream) if p.size]
        if len(packets) < max(1, stream.frames):  # stream.frames: what the header promises, or 0
            promise = f" of {stream.frames}" if stream.frames else ""
            raise UserError(f"{path} is damaged: {len(packets)}{promise} video frames are there")
        packets = [p for p in packets if not p.is_discard]
        if not packets or any(p.pts is None for p in packets):
            raise UserError(f"{path} has no video frames with timestamps")
        times = np.sort(np.array([p.pts for p in packets])) * tick
        count = len(times)
        if count == 1:
            step = 1 / float(stream.average_rate or 1)
        else:
            step = float(times[-1] - times[0]) / (count - 1)
        if step <= 0:
            raise UserError(f"{path} gives all its frames the same time")
        grid = times[0] + step * np.arange(count)
        even = bool(np.abs(times - grid).max() <= max(0.1 * step, tick))
        return VideoInfo(
            width=stream.width,
            height=stream.height,
            frames=count,
            start=float(times[0]),
            fps=1 / step,
            constant_rate=even,
        )


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    info: VideoInfo | None = None,
) -> torch.Tensor:
    """Decode a video file, or part of it: uint8 [T, H, W, 3].

    fps: the rate wanted; each output frame is what a player shows in the middle of its time, so
        files of any rate, variable ones too, will do. None keeps the file's own frames.
    start: seconds to leave out. frames: how many to read; None reads to the end.
    width, height: both or neither; each frame is scaled to cover the size and cropped at the
        centre. Rotation and non-square pixels noted in the file are undone.
    info: what `probe_video` said, to spare a second look at the file.

    Raises:
        UserError: missing, empty or damaged, fewer frames than asked for, a variable rate without
            `fps`, or numbers out of range.
    """
    path = Path(path)
    if (width is None) != (height is None):
        raise UserError(f"width={width} and height={height} must be given together")
    for name, value in (("fps", fps), ("frames", frames), ("width", width), ("height", height)):
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be > 0")
    if not 0 <= start < math.inf:
        raise UserError(f"start={start} must be >= 0 seconds")
    info = info or probe_video(path)
    if fps is None and not info.constant_rate:
        raise UserError(
            f"{path} has a variable frame rate ({info.fps:.3g} on average): name the fps wanted"
        )
    rate = fps or info.fps
    held = info.frames_at(rate, start)
    wanted = held if frames is None else frames
    if wanted > held or wanted < 1:
        raise UserError(
            f"{path} holds {held} frames at {rate:.4g} fps from {start:g} s on, "
            f"{max(wanted, 1)} are needed"
        )
    out: list[Pixels] = []
    with _video_errors(path), _open_video(path) as (container, stream):
        for frame in _frames_at(container, stream, info, start, rate, wanted):
            picture = frame.to_image()
            aspect = float(stream.sample_aspect_ratio or 1)
            turns = round(getattr(frame, "rotation", 0) / 90) % 4
            if turns:
                picture = picture.transpose(Image.Transpose(turns + 1))  # ROTATE_90 is 2
                aspect = 1 / aspect if turns % 2 else aspect
            if width is None or height is None:
                size = (max(1, round(picture.width * aspect)), picture.height)
            else:
                size = (width, height)
            out.append(fit(picture, *size, pixel_aspect=aspect))
    if len(out) < wanted:
        raise UserError(f"{path} is damaged: {len(out)} of {wanted} frames could be decoded")
    return torch.from_numpy(np.stack(out))


def _frames_at(
    container: Any, stream: Any, info: VideoInfo, start: float, rate: float, count: int
) -> Iterator[Any]:
    """The frames on show in the middle of `count` intervals of 1 / rate from `start` on.

    Fewer come if decoding ends before the last frame that the packets promise.
    """
    times = (start + (k + 0.5) / rate for k in range(count))
    wanted = next(times)
    if start > 0:
        container.seek(int((info.start + start) / stream.time_base), stream=stream, backward=True)
    shown, time = None, -math.inf
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        time = float(frame.pts * stream.time_base) - info.start
        while shown is not None and wanted < time:
            yield shown
            if (wanted := next(times, math.inf)) == math.inf:
                return
        shown = frame
    complete = time > (info.frames - 1.5) / info.fps
    while complete and shown is not None and wanted < math.inf:
        yield shown
        wanted = next(times, math.inf)


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError(f"{path} holds no video track")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


@contextmanager
def _video_errors(path: Path) -> Iterator[None]:
    import av

    try:
        yield
    except UserError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is damaged or no video: {reason}") from error
