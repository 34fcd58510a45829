"""Two kinds of plots as SVG text: lines with bands, and strips of points."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 34, 26
_COLORS = ("#c33", "#36c", "#383", "#a60", "#858", "#555")

Curve = tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
"""x, middle, low, high."""


def lines(curves: Mapping[str, Curve], *, title: str) -> str:
    """A line with a band for each name; values that are not finite are refused by the caller."""
    xs = [x for curve in curves.values() for x in curve[0]]
    ys = [y for curve in curves.values() for values in curve[1:] for y in values]
    plane = _Plane((min(xs), max(xs)), (min(0.0, min(ys)), max(ys)))
    parts = [plane.frame(title)]
    for color, (name, (x, middle, low, high)) in zip(_COLORS, curves.items(), strict=False):
        outline = [*zip(x, low, strict=True), *reversed(list(zip(x, high, strict=True)))]
        parts.append(f'<polygon points="{plane.points(outline)}" fill="{color}" opacity=".15"/>')
        parts.append(
            f'<polyline points="{plane.points(list(zip(x, middle, strict=True)))}" fill="none" '
            f'stroke="{color}" stroke-width="2"/>'
        )
        parts.append(_legend(list(curves).index(name), name, color))
    return _svg(parts)


def strips(samples: Mapping[str, Sequence[float]], *, title: str) -> str:
    """One row of points for each name, spread a little so that they can be told apart."""
    values = [v for sample in samples.values() for v in sample]
    plane = _Plane((min(0.0, min(values)), max(values)), (0.0, float(len(samples))))
    parts = [plane.frame(title, y_ticks=False)]
    for row, (color, (name, sample)) in enumerate(zip(_COLORS, samples.items(), strict=False)):
        for number, value in enumerate(sample):
            spread = 0.25 + 0.5 * (number * 0.618034 % 1)
            x, y = plane.place(value, len(samples) - 1 - row + spread)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}" opacity=".5"/>')
        parts.append(_legend(row, name, color))
    return _svg(parts)


class _Plane:
    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = _widen(x), _widen(y)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    def points(self, values: Sequence[tuple[float, float]]) -> str:
        placed = [self.place(x, y) for x, y in values]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)

    def frame(self, title: str, *, y_ticks: bool = True) -> str:
        parts = [f'<text x="4" y="14" font-weight="bold">{html.escape(title)}</text>']
        for x in _ticks(*self.x):
            left, bottom = self.place(x, self.y[0])
            parts.append(
                f'<text x="{left:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{x:g}</text>'
            )
        for y in _ticks(*self.y) if y_ticks else ():
            left, top = self.place(self.x[0], y)
            parts.append(
                f'<line x1="{left}" x2="{WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}" '
                f'stroke="#ddd"/><text x="{left - 5}" y="{top + 4:.1f}" text-anchor="end">{y:g}'
                "</text>"
            )
        return "".join(parts)


def _widen(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers within the span."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _legend(row: int, name: str, color: str) -> str:
    return f'<text x="{_LEFT + 100 * row}" y="{_TOP - 6}" fill="{color}">{html.escape(name)}</text>'


def _svg(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )
