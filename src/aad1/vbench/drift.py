"""The drift score: how much a long video's imaging quality varies from segment to segment.

d_v = population standard deviation, over the segments of a video, of the segment's mean imaging
quality (0..100); the score is the mean over videos. The paper leaves the segment length open: ours
is 2 s, with 1 and 5 s beside it.

Imaging quality is a mean over frames, so each video is cut once into pieces of 1 s, VBench scores
the pieces, and longer segments are means of pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aad1.errors import UserError

SEGMENTS = (1, 2, 5)  # seconds
MAIN = 2  # the length of VBench-Long's clips


def piece_name(stem: str, piece: int) -> str:
    """File name of a video's piece, in VBench's pattern NAME-NUMBER.mp4."""
    return f"{stem}-{piece}.mp4"


def cut_pieces(video: Path, folder: Path, stem: str, frames: int) -> int:
    """Cut a video into pieces of `frames` frames, without loss; returns how many.

    The pieces decode to the video's own YCbCr values, bit for bit. Frames beyond the last whole
    piece are left out. UserError for a video shorter than one piece.
    """
    import av

    if frames < 1:
        raise UserError(f"a piece must have at least 1 frame, got {frames}")
    folder.mkdir(parents=True, exist_ok=True)
    buffer: list[Any] = []
    count = 0
    with av.open(str(video)) as source:
        stream = source.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in source.decode(stream):
            buffer.append(frame)
            if len(buffer) == frames:
                _write_piece(folder / piece_name(stem, count), buffer, stream)
                buffer, count = [], count + 1
    if count == 0:
        raise UserError(f"{video} has {len(buffer)} frames, fewer than one piece of {frames}")
    return count


def _write_piece(path: Path, frames: Sequence[Any], source: Any) -> None:
    import av

    with av.open(str(path), "w") as container:
        # qp 0 is x264's lossless mode.
        stream: Any = container.add_stream(
            "libx264", rate=source.average_rate, options={"qp": "0", "preset": "veryfast"}
        )
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
            setattr(stream.codec_context, name, getattr(source.codec_context, name))
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, 1 / source.average_rate
            frame.pict_type = 0  # the source's kinds of frames are no wish for the new file
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def drift(pieces: Sequence[float], seconds: int) -> float:
    """d_v of one video from its pieces of 1 s: population standard deviation over whole segments.

    UserError if there are fewer than two segments.
    """
    segments = len(pieces) // seconds
    if segments < 2:
        raise UserError(
            f"drift needs at least 2 segments of {seconds} s, a video of {len(pieces)} s has "
            f"{segments}"
        )
    means = np.asarray(pieces[: segments * seconds], float).reshape(segments, seconds).mean(1)
    return float(means.std())


def drift_scores(videos: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float] | str]:
    """Per segment length: mean, standard error and number of videos; or why it was not computed.

    videos: imaging quality (0..100) of the pieces of 1 s of each video.
    """
    found: dict[str, dict[str, float] | str] = {}
    for seconds in SEGMENTS:
        try:
            values = np.array([drift(pieces, seconds) for pieces in videos.values()])
        except UserError as error:
            found[f"{seconds}s"] = f"not computed: {error}"
            continue
        error_of_mean = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        found[f"{seconds}s"] = {
            "mean": float(values.mean()),
            **({"standard_error": float(error_of_mean)} if len(values) > 1 else {}),
            "videos": len(values),
        }
    return found
