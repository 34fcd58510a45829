"""Draws overview.png and architecture.png: `python docs/images/draw.py`, from an aad1 environment.

The matrices are not drawn by hand: they are the plans that `aad1.core.chunks` returns.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from aad1.atomic import replace_file
from aad1.core import chunks as plans
from aad1.core.chunks import ChunkGeometry, Plan

HERE = Path(__file__).parent
SCALE = 2
WIDTH = 1180
INK, SOFT, LINE = "#1b2430", "#5b6776", "#8a96a5"
IMAGE, CHUNK, CACHE, DATA, NETWORK = "#f4c15d", "#8cbfe8", "#cfd6de", "#eef1f4", "#d8ebd2"


class Canvas:
    """A picture in logical pixels, drawn SCALE times larger."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, words: str, size: int = 13, fill: str = INK, at: str = "la"
    ) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), words, fill=fill, font=font, anchor=at)

    def box(self, x: float, y: float, w: float, h: float, fill: str, radius: int = 6) -> None:
        corners = (x * SCALE, y * SCALE, (x + w) * SCALE, (y + h) * SCALE)
        self.draw.rounded_rectangle(corners, radius * SCALE, fill, LINE, SCALE)

    def labelled(self, x: float, y: float, w: float, h: float, fill: str, *lines: str) -> None:
        """A box with a title and smaller lines below it, centred."""
        self.box(x, y, w, h, fill)
        top = y + h / 2 - (8 * (len(lines) - 1))
        for i, line in enumerate(lines):
            size, colour = (14, INK) if i == 0 else (11, SOFT)
            self.text(x + w / 2, top + 16 * i, line, size, colour, "mm")

    def arrow(self, *points: tuple[float, float]) -> None:
        """A path of straight lines with a head at its end."""
        path = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(path, SOFT, SCALE * 3 // 2)
        (x0, y0), (x, y) = points[-2:]
        ux, uy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        base = (x - 7 * ux, y - 7 * uy)
        head = [(x, y), (base[0] - 4 * uy, base[1] - 4 * ux), (base[0] + 4 * uy, base[1] + 4 * ux)]
        self.draw.polygon([(a * SCALE, b * SCALE) for a, b in head], SOFT)


def generate(c: Canvas, top: float) -> None:
    """Image and prompt to frames, chunk by chunk."""
    c.text(20, top, "Generate: one pass per chunk, as long as you like", 17)
    y = top + 92
    c.labelled(20, y, 88, 50, IMAGE, "image")
    c.arrow((108, y + 25), (134, y + 25))
    c.labelled(134, y, 104, 50, NETWORK, "codec", "encode")
    c.arrow((238, y + 25), (268, y + 25))

    c.text(268, y - 46, "what chunk 3 sees: the sink, the last 4 frames, itself", 12, SOFT)
    c.text(268, y - 30, "(13 latent frames so far; those in white have left the cache)", 11, SOFT)
    cell = 25
    for frame in range(13):
        if frame == 0:
            fill = IMAGE
        elif frame < 5:
            fill = "white"
        else:
            fill = CACHE if frame < 9 else CHUNK
        x = 268 + frame * (cell + 1) + 7 * ((frame + 3) // 4)
        c.box(x, y, cell, 50, fill, 3)
        c.text(x + cell / 2, y + 25, str(frame), 12, INK, "mm")
    right = 268 + 13 * 26 + 7 * 3
    names = ((268, 1, "image"), (301, 4, "chunk 1"), (412, 4, "chunk 2"), (523, 4, "chunk 3"))
    for x, count, name in names:
        c.text(x + count * 13, y + 62, name, 11, SOFT, "mm")

    c.labelled(right + 42, y - 6, 186, 62, NETWORK, "DiT, sigma 1", "noise -> clean chunk x0")
    c.arrow((right + 2, y + 25), (right + 42, y + 25))
    c.text(right + 135, y - 40, "prompt of this chunk", 12, INK, "mm")
    c.arrow((right + 135, y - 30), (right + 135, y - 6))
    c.arrow((right + 228, y + 25), (right + 262, y + 25))
    c.labelled(right + 262, y - 6, 120, 62, NETWORK, "codec", "streaming decode")
    c.text(right + 262 + 60, y + 90, "16 frames (4 on sprites)", 12, INK, "mm")
    c.arrow((right + 322, y + 56), (right + 322, y + 80))
    c.labelled(right + 42, y + 86, 186, 44, NETWORK, "DiT, sigma 0", "K and V of x0")
    c.arrow((right + 135, y + 56), (right + 135, y + 86))
    c.arrow((right + 42, y + 108), (575, y + 108), (575, y + 74))
    c.text(560, y + 100, "the cache pass: what the next chunk sees", 12, SOFT, "ra")


def train(c: Canvas, top: float) -> None:
    """The four stages, left to right."""
    c.text(20, top, "Train: each stage starts from the one before it", 17)
    y, w, gap = top + 34, 258, 36
    stages = (
        ("0  teacher", "bidirectional, many steps", "flow matching on clips", "skipped with Wan"),
        ("I  ODE initialisation", "causal student, one step", "regresses end points of the",
         "teacher's trajectories"),
        ("II  DMD warm-up", "student on its own rollouts", "frozen real score, trained fake",
         "score, both bidirectional; stops early"),
        ("III  adversarial", "student on its own rollouts", "bidirectional discriminator, one",
         "logit per noised clip; R1 + R2"),
    )  # fmt: skip
    for i, lines in enumerate(stages):
        x = 20 + i * (w + gap)
        c.labelled(x, y, w, 84, DATA if i == 0 else NETWORK, *lines)
        if i:
            c.arrow((x - gap, y + 42), (x, y + 42))
    c.text(
        20, y + 100,
        "Every network above is one class, WanTransformer, starting from the teacher's weights; "
        "what leaves is the moving average of the student.",
        12, SOFT,
    )  # fmt: skip


def matrix(
    c: Canvas, x: float, top: float, plan: Plan, rows: list[str], columns: list[str],
    past: int, title: str, *notes: str,
) -> None:  # fmt: skip
    """A plan: queries down, keys across, in each cell the RoPE position of the key."""
    cell = 16
    c.text(x, top, title, 13)
    for i, note in enumerate(notes):
        c.text(x, top + 18 + 15 * i, note, 11, SOFT)
    y = top + 86
    for i, name in enumerate(columns):
        c.text(x + cell * i + cell / 2, y - 9, name, 9, SOFT, "mm")
    for i, name in enumerate(rows):
        c.text(x - 9, y + cell * i + cell / 2, name, 9, SOFT, "mm")
    for i in range(len(rows)):
        for j in range(len(columns)):
            c.box(x + cell * j, y + cell * i, cell, cell, "white", 0)
    for group in plan:
        own = {rows[query] for query in group.queries}
        for query in group.queries:
            for key, position in zip(group.keys, group.key_positions, strict=True):
                fill = CHUNK if key >= past and columns[key] in own else CACHE
                fill = IMAGE if columns[key] == "0" else fill
                c.box(x + cell * key, y + cell * query, cell, cell, fill, 0)
                place = (x + cell * key + cell / 2, y + cell * query + cell / 2)
                c.text(*place, str(position), 9, INK, "mm")


def attention(c: Canvas, top: float) -> None:
    """Four plans over 13 latent frames: the image and three chunks of 4."""
    geometry = ChunkGeometry()
    c.text(20, top, "One network, four attention plans", 17)
    c.text(
        20, top + 26,
        "Rows: frames that ask. Columns: frames that answer. Number: the position at which RoPE "
        "rotates the key in that pass. Yellow: the image (sink); grey: earlier chunks; blue: own.",
        12, SOFT,
    )  # fmt: skip
    y = top + 58
    names = [str(f) for f in range(13)]
    matrix(c, 36, y, plans.bidirectional(13), names, names, 0, "bidirectional",
           "teacher, real and fake score,", "discriminator")  # fmt: skip
    matrix(c, 290, y, plans.block_causal(geometry, 13), names, names, 0, "block_causal",
           "stage I; the discriminator's", "causal ablation")  # fmt: skip
    held = (0, 5, 6, 7, 8)
    columns = [str(f) for f in held] + names[9:]
    matrix(c, 544, y, plans.cached(geometry, held, 9, 4), names[9:], columns, 5, "cached",
           "generation, and phase", "one of the training step")  # fmt: skip
    columns = names[:9] + names[1:]
    matrix(c, 736, y, plans.parallel_chunks(geometry, 9, 13, 1), names[1:], columns, 9,
           "parallel_chunks",
           "phase two of the training step: all chunks at once, with gradient,",
           "over clean K and V recorded in phase one (left of the blue blocks)")  # fmt: skip


def main() -> None:
    """Write both pictures beside this file."""
    overview = Canvas(450)
    generate(overview, 16)
    train(overview, 284)
    whole = Canvas(830)
    generate(whole, 16)
    train(whole, 284)
    attention(whole, 454)
    for canvas, name in ((overview, "overview.png"), (whole, "architecture.png")):
        with replace_file(HERE / name) as temporary:
            canvas.image.quantize(64).save(temporary, optimize=True)


if __name__ == "__main__":
    main()
