"""H.264 video as it comes: one frame at a time, constant memory, named when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.media.frames import check_frames, frame_rate
from aad1.media.images import Pixels

CRF = 17  # a viewer sees no difference from the frames


class Mp4Encoder:
    """Encodes frames to a file, each when it is given; a context manager that finishes the file.

    fps: frames a second. crf: x264's quality, lower is better and larger. Odd sizes get one more
    row or column, as 4:2:0 video halves both sides.
    """

    def __init__(self, path: Path, fps: float | Fraction, crf: int = CRF) -> None:
        import av  # heavy, and absent where only training runs

        self.count = 0
        self._crf = crf
        self._fps = frame_rate(fps)
        self._container: Any = av.open(str(path), "w", options={"movflags": "+faststart"})
        self._stream: Any = None

    def write(self, frames: Pixels) -> None:
        """Frames uint8 [H, W, 3] or [T, H, W, 3], all of one size. UserError for another."""
        check_frames(frames)
        for frame in frames[None] if frames.ndim == 3 else frames:
            self._write(frame)

    def _write(self, frame: Pixels) -> None:
        import av

        odd = frame.shape[0] % 2, frame.shape[1] % 2
        if any(odd):
            frame = np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        if self._stream is None:
            options = {"crf": str(self._crf)}
            stream = self._container.add_stream("libx264", rate=self._fps, options=options)
            stream.height, stream.width = frame.shape[:2]
            stream.pix_fmt = "yuv420p"
            _tag_bt709(stream.codec_context)
            self._stream = stream
        size = (self._stream.height, self._stream.width)
        if frame.shape[:2] != size:
            raise UserError(f"a frame is {frame.shape[:2]}, the first was {size}")
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
        picture.pts, picture.time_base = self.count, 1 / self._fps
        _tag_bt709(picture)
        self._container.mux(self._stream.encode(picture))
        self.count += 1

    def __enter__(self) -> Mp4Encoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()


@contextmanager
def record(path: str | Path, fps: float, crf: int = CRF) -> Iterator[Mp4Encoder]:
    """An encoder to a temporary file, which takes the name `path` when the block ends well.

    If the block raises, `path` stays as it was. UserError if no frame was written.
    """
    with replace_file(path) as temporary:
        with Mp4Encoder(temporary, fps, crf) as encoder:
            yield encoder
        if encoder.count == 0:
            raise UserError(f"there are no frames to write to {path}")


def _tag_bt709(target: Any) -> None:
    """Name the colours, or each player guesses by its own rule. 1: BT.709, and limited range."""
    target.colorspace = target.color_primaries = target.color_trc = target.color_range = 1
