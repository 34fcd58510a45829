"""The vocabulary, and the sentence that says what a clip shows."""

from __future__ import annotations

import math

from torch import Tensor

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.93, 0.16, 0.16),
    "green": (0.13, 0.80, 0.25),
    "blue": (0.18, 0.36, 0.98),
    "yellow": (0.99, 0.87, 0.10),
    "purple": (0.72, 0.22, 0.92),
    "white": (0.98, 0.98, 0.98),
}
"""Colour word -> RGB in [0, 1]."""

# Shape word -> (corners, circumradius / nominal radius, inner radius / circumradius). A regular
# n-gon is a star whose inner vertices lie on the edges; the circle is a 24-gon.
SHAPE_OUTLINES: dict[str, tuple[int, float, float]] = {
    "square": (4, 1.25, math.cos(math.pi / 4)),
    "circle": (24, 1.05, math.cos(math.pi / 24)),
    "triangle": (3, 1.45, math.cos(math.pi / 3)),
    "star": (5, 1.45, 0.5),
}
SHAPES: tuple[str, ...] = tuple(SHAPE_OUTLINES)
DIRECTIONS: dict[str, float] = {
    "right": 0.0,
    "down": math.pi / 2,
    "left": math.pi,
    "up": -math.pi / 2,
}
"""Direction word -> heading in radians; x points right, y points down."""
SPEEDS: tuple[str, ...] = ("slow", "fast")
WORDS: tuple[str, ...] = (
    *COLORS,
    *SHAPES,
    "moves",
    *DIRECTIONS,
    *SPEEDS,
    "camera",
    "pans",
    "stays",
)
"""Every word a caption can hold; commas and semicolons separate phrases and carry no meaning."""
MAX_WORDS = 16
"""No caption has more words than this."""


def write_captions(
    color: Tensor,
    shape: Tensor,
    heading_word: Tensor,
    speed_word: Tensor,
    pans: Tensor,
    pan_word: Tensor,
) -> list[str]:
    """One sentence per clip: "red square moves left fast, green star moves up; camera stays"."""
    color_names, directions = tuple(COLORS), tuple(DIRECTIONS)
    captions = []
    # As lists: to read a tensor number by number takes longer than all the rest.
    words = (x.tolist() for x in (color, shape, heading_word, speed_word, pans, pan_word))
    for *sprites, pan, pan_direction in zip(*words, strict=True):
        phrases = []
        for look, outline, heading, speed in zip(*sprites, strict=True):
            phrase = f"{color_names[look]} {SHAPES[outline]} moves {directions[heading]}"
            phrases.append(f"{phrase} {SPEEDS[speed - 1]}" if speed else phrase)
        camera = f"pans {directions[pan_direction]}" if pan else "stays"
        captions.append(f"{', '.join(phrases)}; camera {camera}")
    return captions
