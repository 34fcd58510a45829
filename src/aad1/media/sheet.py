"""Frames of videos side by side, in one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from aad1.errors import UserError
from aad1.media.frames import Frames, enlarged, single_frames

SHEET_COLUMNS = 8


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
    rows = []
    for video in videos:
        frames = single_frames([video[k] for k in spread(len(video), columns)])
        rows.append(list(enlarged(frames, scale, Image.Resampling.NEAREST)))
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


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices of range(count), evenly spread, the first and the last included."""
    if count <= most or most < 2:
        return list(range(min(count, most)))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]
