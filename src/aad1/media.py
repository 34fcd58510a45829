"""Images and videos in and out: whatever a user hands over becomes uint8 RGB of the wanted size.

Shape letters: T frames, H height, W width in pixels; the last axis is RGB.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.mp4 import Mp4Encoder

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor
Frames: TypeAlias = torch.Tensor | Pixels

VIDEO_SUFFIXES = (".mp4", ".gif", ".png")
MAX_IMAGE_PIXELS = 100_000_000
SHORT_SIDE = 240  # write_video enlarges smaller videos, which players show as a stamp or a blur
SHEET_COLUMNS = 8
SHEET_FRAMES = 24


# ---- images -------------------------------------------------------------------------------------


def read_image(image: ImageLike, *, width: int, height: int) -> torch.Tensor:
    """Any image as uint8 [height, width, 3], scaled to cover that size and cropped at the centre.

    An image that has the size already is returned unchanged, bit for bit.

    image: a file, a PIL image, or an array or tensor [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of
        uint8, uint16 or floats in [0, 1].

    EXIF rotation is applied, transparency is laid over black, grey and palettes become RGB, 16 bits
    become 8, of an animation the first frame counts.

    Raises:
        UserError: the file is missing, empty, truncated or no image, it has more than
            `MAX_IMAGE_PIXELS` pixels, or the array has another shape, dtype or range.
    """
    if width < 1 or height < 1:
        raise UserError(f"an image size of {width}x{height} must be at least 1x1")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        picture = _array_to_rgb(image)
    elif isinstance(image, Image.Image):
        picture = _picture_to_rgb(image, "the image")
    else:
        picture = _open_rgb(Path(image))
    return torch.from_numpy(_fit(picture, width, height))


def _open_rgb(path: Path) -> Image.Image:
    check_file(path, "an image")
    with _image_errors(str(path)), Image.open(path) as picture:
        return _picture_to_rgb(picture, str(path))


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Pillow's decoders fail with almost any exception; each means that the file is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from error


def _picture_to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        raise UserError(
            f"{name} is {picture.width}x{picture.height}, more than {MAX_IMAGE_PIXELS:,} pixels"
        )
    if not picture.width or not picture.height:
        raise UserError(f"{name} is {picture.width}x{picture.height}, it has no pixels")
    with _image_errors(name):
        picture.seek(0)
        picture.load()  # here a truncated file fails
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip rather than scale
            grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
            return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
        if picture.mode == "F":
            raise UserError(f"{name} holds floating point numbers, expected 8 or 16 bits")
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        with_alpha = picture.convert("RGBA")
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, with_alpha).convert("RGB")


def _array_to_rgb(array: npt.NDArray[Any]) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in shape or (array.ndim == 3 and shape[-1] not in (3, 4)):
        raise UserError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], got {shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UserError("an image array of floats must lie in [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UserError(
            f"an image array must be uint8, uint16 or floats in [0, 1], got {array.dtype}"
        )
    return _picture_to_rgb(Image.fromarray(np.ascontiguousarray(array)), "the image")


def _fit(picture: Image.Image, width: int, height: int, pixel_aspect: float = 1.0) -> Pixels:
    """Cut out the largest centred box of the target's aspect and scale it: no distortion.

    pixel_aspect: width of a source pixel over its height, 1 unless a video says otherwise.
    """
    shown_width = picture.width * pixel_aspect
    scale = min(shown_width / width, picture.height / height)
    box_width, box_height = width * scale / pixel_aspect, height * scale
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    box = (max(left, 0.0), max(top, 0.0), left + box_width, top + box_height)
    box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
    if picture.size != (width, height) or box != (0, 0, width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.array(picture, dtype=np.uint8)


def check_file(path: Path, kind: str) -> None:
    """UserError unless `path` is a file with something in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file with {kind}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")


# ---- videos out ---------------------------------------------------------------------------------


def check_video_path(path: str | Path) -> Path:
    """The path, if `write_video` can write there; worth a call before minutes of generation.

    Raises:
        UserError: another suffix than those of `VIDEO_SUFFIXES`, a folder, or a parent that is a
            file or may not be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        allowed = ", ".join(VIDEO_SUFFIXES)
        raise UserError(f"{path} must end in one of {allowed}, not in {path.suffix!r}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a name for a video file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {parent} is not a folder one may write to")
    return path


def write_video(
    path: str | Path,
    frames: Frames | Iterable[Frames],
    fps: float,
    *,
    scale: int | None = None,
    resample: Literal["lanczos", "nearest"] = "lanczos",
) -> int:
    """Write frames as .mp4 (H.264), .gif or .png (a sheet of frames) and return their number.

    Memory stays constant for .mp4 however long `frames` runs. The file appears under its name
    when it is complete.

    frames: uint8 [T, H, W, 3], or an iterable of such pieces and of single frames [H, W, 3].
    fps: frames a second, in (0, 1000].
    scale: whole factor of enlargement; None takes the least that brings the shorter side to
        `SHORT_SIDE` pixels, 1 for larger videos. An odd size gets one more row or column in .mp4.

    Raises:
        UserError: a path that `check_video_path` refuses, no frames, frames of another dtype or
            of changing size, fps or scale out of range.
    """
    path = check_video_path(path)
    if not 0 < fps <= 1000:
        raise UserError(f"fps={fps} must be in (0, 1000]")
    if scale is not None and not 1 <= scale <= 64:
        raise UserError(f"scale={scale} must be in 1..64")
    pictures = _enlarged(_single_frames(frames), scale, resample)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_sheet}[path.suffix.lower()]
    with replace_file(path) as temporary:
        count = write(temporary, pictures, Fraction(fps).limit_denominator(1001))
        if count == 0:
            raise UserError(f"there are no frames to write to {path}")
    return count


def _single_frames(frames: Frames | Iterable[Frames]) -> Iterator[Pixels]:
    size: tuple[int, ...] | None = None
    for piece in frames:
        array = piece.detach().cpu().numpy() if isinstance(piece, torch.Tensor) else piece
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
            raise UserError(
                f"frames must be uint8 [T, H, W, 3], got {array.dtype} {list(array.shape)}"
            )
        for frame in array[None] if array.ndim == 3 else array:
            size = size or frame.shape
            if frame.shape != size or 0 in size:
                raise UserError(f"a frame has shape {list(frame.shape)}, the first {list(size)}")
            yield frame


def _enlarged(frames: Iterable[Pixels], scale: int | None, resample: str) -> Iterator[Image.Image]:
    kernel = Image.Resampling[resample.upper()]
    for frame in frames:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        factor = scale or math.ceil(SHORT_SIDE / min(picture.size))
        if factor > 1:
            picture = picture.resize((picture.width * factor, picture.height * factor), kernel)
        yield picture


def _write_mp4(path: Path, pictures: Iterator[Image.Image], fps: Fraction) -> int:
    with Mp4Encoder(path, fps) as encoder:
        for picture in pictures:
            encoder.write(np.asarray(picture))
    return encoder.count


def _write_gif(path: Path, pictures: Iterator[Image.Image], fps: Fraction) -> int:
    palettes = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    if palettes:
        # A GIF counts hundredths of a second: 16 fps is 6.25 of them, so durations alternate.
        ticks = [round(100 * k / fps) for k in range(len(palettes) + 1)]
        durations = [10 * max(1, b - a) for a, b in pairwise(ticks)]
        first, *rest = palettes
        first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)
    return len(palettes)


def _write_sheet(path: Path, pictures: Iterator[Image.Image], fps: Fraction) -> int:
    frames = [np.asarray(picture) for picture in pictures]
    if frames:
        picked = [frames[k] for k in _spread(len(frames), SHEET_FRAMES)]
        rows = [picked[k : k + SHEET_COLUMNS] for k in range(0, len(picked), SHEET_COLUMNS)]
        contact_sheet([np.stack(row) for row in rows]).save(path)
    return len(frames)


def contact_sheet(
    videos: Sequence[Frames],
    captions: Sequence[str] | None = None,
    *,
    columns: int = SHEET_COLUMNS,
    scale: int = 1,
) -> Image.Image:
    """One row a video: at most `columns` of its frames, evenly spread, the first and last included.

    videos: each uint8 [T, H, W, 3]; T may differ, H and W may not.
    captions: one line above each row, cut off where the row ends.

    Raises:
        UserError: no videos, or not as many captions as videos.
    """
    if len(videos) == 0 or any(len(video) == 0 for video in videos):
        raise UserError("a contact sheet needs at least one video, and each at least one frame")
    if captions is not None and len(captions) != len(videos):
        raise UserError(f"{len(captions)} captions for {len(videos)} videos")
    rows = [
        list(
            _enlarged(
                _single_frames([video[k] for k in _spread(len(video), columns)]), scale, "nearest"
            )
        )
        for video in videos
    ]
    width, height = rows[0][0].size
    gap, line = 2, 16 if captions is not None else 0
    font = ImageFont.load_default(size=12)
    length = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (length * (width + gap) - gap, len(rows) * (line + height + gap) - gap)
    )
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = number * (line + height + gap)
        if captions is not None:
            draw.text((2, top + 1), captions[number].replace("\n", " "), "white", font)
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + gap), top + line))
    return sheet


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of range(count), evenly spread, the first and the last included."""
    if count <= most or most < 2:
        return list(range(min(count, most)))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


# ---- videos in ----------------------------------------------------------------------------------


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
            out.append(_fit(picture, *size, pixel_aspect=aspect))
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
