"""Which metric sees which corruption: real clips of sprites, spoilt in eleven ways.

A metric fires where its figure lies further from what real clips get than groups of other real
clips of the same number ever do, by a factor that leaves room for chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.evaluate.compare import METRICS, Figure, Metric, Reference, compare
from aad1.evaluate.corruptions import CORRUPTIONS
from aad1.evaluate.frechet import LEAST_VIDEOS
from aad1.evaluate.measure import Measured, measure
from aad1.evaluate.networks import for_world
from aad1.worlds.sprites import SpritesConfig, draw

COLUMNS = (
    "M", "late_M", "S", "W1_flow", "smoothness", "flicker", "niqe", "sharpness",
    "drift_2s", "drift_1s", "drift_5s", "signed_drift", "color_shift",
    "FDtd", "FD_motion", "FDnss_early", "FDnss_late",
    "consistency_subject", "consistency_background", "consistency_first_frame",
    "consistency_last_frame",
)  # fmt: skip
FPS = 4.0
MULTIPLE = 4.0
"""A distance fires above this many times its floor."""
DEVIATIONS = 4.0
"""A mean fires this many standard errors away from real clips; `Row.deviation`."""
_SEED = 0x7A11D


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one metric says of one corruption."""

    value: float | None
    deviation: float
    """Distances: multiples of the floor. Others: standard errors from the mean of real clips."""
    fires: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """Corruption -> metric -> cell, the first row "real" being other real clips."""

    rows: Mapping[str, Mapping[str, Cell]]
    clips: int
    frames: int
    size: int


def corruption_table(clips: int, config: SpritesConfig, *, seed: int = 0,
                     device: torch.device | str = "cpu") -> Table:  # fmt: skip
    """Measures the corruptions of `clips` real clips against as many others.

    Raises UserError for fewer clips than a Fréchet distance needs.
    """
    if clips < LEAST_VIDEOS:
        raise UserError(f"--clips must be at least {LEAST_VIDEOS} to validate, got {clips}")

    def real(number: int) -> Tensor:
        return draw(config, clips, seed=_SEED + 16 * seed + number, device=device)[0].video

    networks = for_world("sprites", device)

    def measured(videos: Tensor, name: str) -> Measured:
        keys = [f"{name} {i}" for i in range(clips)]
        return measure(videos, fps=FPS, keys=keys, networks=networks)

    reference = Reference.of(measured(real(0), "reference"))
    other = measured(real(1), "other")
    source = real(2)
    videos = {"real": source}
    for name, spoil in CORRUPTIONS.items():
        videos[name] = spoil(source)
    metrics = [METRICS[name] for name in COLUMNS]
    rows: dict[str, dict[str, Cell]] = {}
    for name, video in videos.items():
        spoilt = measured(video, "clip")
        figures = compare(spoilt, reference, other, metrics, resamples=0)
        rows[name] = {
            metric.name: _cell(metric, figures[metric.name], spoilt, other, reference)
            for metric in metrics
        }
    return Table(rows=rows, clips=clips, frames=config.frames, size=config.size)


def _cell(
    metric: Metric, figure: Figure, videos: Measured, other: Measured, reference: Reference
) -> Cell:
    if figure.value is None or figure.floor is None:
        return Cell(value=None, deviation=math.nan, fires=False)
    if metric.distance:
        multiple = figure.value / figure.floor
        return Cell(value=figure.value, deviation=multiple, fires=multiple > MULTIPLE)
    # Two means of as many videos: each errs by the real videos' deviation over sqrt(N).
    rows = metric.extract(other, reference)
    spread = rows[:, 0] if rows.dim() > 1 else rows
    made = metric.extract(videos, reference)
    made = made[:, 0] if made.dim() > 1 else made
    error = float(spread.std()) * math.sqrt(2 / len(spread))
    if metric.share:  # few real videos are static: the error of a share of 1 / N at least
        error = max(error, math.sqrt(2) / len(spread))
    deviation = float(made.mean() - spread.mean()) / max(error, 1e-12)
    return Cell(value=figure.value, deviation=deviation, fires=abs(deviation) > DEVIATIONS)


def validate(folder: Path, *, clips: int, seed: int, device: torch.device) -> str:
    """Writes metric-validation.md and .json to a folder and returns the table as text."""
    table = corruption_table(clips, SpritesConfig(size=64, frames=81), seed=seed, device=device)
    text = as_markdown(table)
    with replace_file(folder / "metric-validation.json") as temporary:
        temporary.write_text(json.dumps(as_json(table), indent=1) + "\n", encoding="utf-8")
    with replace_file(folder / "metric-validation.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def as_json(table: Table) -> dict[str, object]:
    """The table with every number."""
    return {
        "clips": table.clips, "frames": table.frames, "size": table.size, "fps": FPS,
        "fires_above": {"multiple of the floor": MULTIPLE, "standard errors": DEVIATIONS},
        "rows": {
            name: {
                metric: {
                    "value": cell.value,
                    "deviation": cell.deviation if math.isfinite(cell.deviation) else None,
                    "fires": cell.fires,
                }
                for metric, cell in row.items()
            }
            for name, row in table.rows.items()
        },
    }  # fmt: skip


def as_markdown(table: Table) -> str:
    """The table for docs/."""
    names = list(table.rows)
    lines = [
        "# Which metric sees which corruption",
        "",
        f"{table.clips} real clips of sprites ({table.frames} frames of {table.size}x{table.size}, "
        f"{FPS:g} a second), spoilt in eleven ways, against {table.clips} other real clips, and "
        f"{table.clips} more for the floors. Written by `aad1 evaluate --validate`; "
        "[evaluation.md](evaluation.md) explains the figures.",
        "",
        "Fréchet distances and W1 are multiples of their real-against-real floor and fire above "
        f"{MULTIPLE:g}. The ratios M and late M, sharpness and flicker are given as such, S as a "
        "share, the others as means; they fire (bold) where the mean over clips lies more than "
        f"{DEVIATIONS:g} standard errors from that of real clips.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for metric in COLUMNS:
        cells = []
        for name in names:
            cell = table.rows[name][metric]
            shown = cell.deviation if METRICS[metric].distance else cell.value
            text = "-" if shown is None or not math.isfinite(shown) else f"{shown:.3g}"
            cells.append(f"**{text}**" if cell.fires else text)
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
