"""What an evaluation hands on: sections of figures, the videos behind them, and the files of both.

evaluation.json  every figure with interval, floor, numbers of videos, or the reason it is missing
videos.csv       one line per generated video
report.html      both for people (`page.py`)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from aad1 import __version__
from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.evaluate.compare import METRICS, Figure, Reference
from aad1.evaluate.drift import drift, pace, signed_drift
from aad1.evaluate.measure import Measured
from aad1.evaluate.motion import STATIC_BELOW
from aad1.evaluate.networks import CONSISTENCY
from aad1.evaluate.niqe import NSS_NAMES

FORMAT = "aad1.evaluation.1"
_PLOT_POINTS = 40

LABELS = {
    "first_frame_psnr": "first frame against the image given, dB (60 at most)",
    "diversity_flow": "within-prompt SD of flow, pixels per frame",
    "diversity_camera": "within-prompt SD of camera speed, ratio to the true one",
    "diversity_frames": "within-prompt SD of the last frames, grey levels",
    "switch": "left, then right: both signs right",
    "camera_direction": "camera pans as the prompt says",
    "camera_stays": "camera stays as the prompt says",
    "colors": "named colours still there in the last quarter",
    "directions": "shapes set out as the prompt says",
}
"""Figures that are not of `aad1.evaluate.compare`; steering adds "steer: PROMPT"."""


def label_of(name: str) -> str:
    """What a figure is called in tables."""
    if name in METRICS:
        return METRICS[name].label
    return LABELS.get(name, name.replace("steer: ", "mean flow has the right sign: "))


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures of one set of generated videos."""

    name: str
    title: str
    figures: Mapping[str, Figure]
    note: str = ""
    videos: Measured | None = None
    """What the figures were computed from."""
    reference: Reference | None = None
    rows: Mapping[str, list[float | None]] = field(default_factory=dict)
    """Further columns of videos.csv, one number per video."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A video to look at: generated, and the real one beside it if there is one."""

    title: str
    generated: Tensor
    """uint8 [T, H, W, 3]."""
    real: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that is written."""

    title: str
    facts: Mapping[str, Any]
    """What was evaluated, with which settings."""
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    """What the reader must know."""
    pictures: tuple[Picture, ...] = ()
    fps: float = 16.0

    def section(self, name: str) -> Section:
        """The section of that name; KeyError if there is none."""
        return {section.name: section for section in self.sections}[name]

    def as_json(self) -> dict[str, Any]:
        """All figures, without the videos."""
        return {
            "format": FORMAT,
            "version": __version__,
            "title": self.title,
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "sections": {
                s.name: {
                    "title": s.title,
                    "note": s.note,
                    "figures": {
                        name: {"label": label_of(name), **asdict(figure)}
                        for name, figure in s.figures.items()
                    },
                }
                for s in self.sections
            },
        }

    def write(self, folder: Path) -> list[Path]:
        """Writes the three files to the folder, each whole or not at all."""
        from aad1.evaluation.page import page

        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None
        html = page(self)
        paths = [folder / name for name in ("evaluation.json", "videos.csv", "report.html")]
        with replace_file(paths[0]) as temporary:
            temporary.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        with replace_file(paths[1]) as temporary:
            _write_csv(self, temporary)
        with replace_file(paths[2]) as temporary:
            temporary.write_text(html, encoding="utf-8")
        return paths


def _write_csv(result: Result, path: Path) -> None:
    tables = [row for section in result.sections for row in video_rows(section)]
    names = list(dict.fromkeys(name for row in tables for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(tables)


def video_rows(section: Section) -> list[dict[str, str | float | None]]:
    """One row per video of a section."""
    videos, reference = section.videos, section.reference
    if videos is None or reference is None:
        return []
    scores = reference.frames.distance(videos.nss)
    columns: dict[str, Any] = {
        "key": videos.keys,
        "prompt": videos.prompts,
        "flow": videos.magnitude.tolist(),
        "flow_late": videos.late.tolist(),
        "flow_x": videos.direction[:, 0].tolist(),
        "flow_y": videos.direction[:, 1].tolist(),
        "static": (
            videos.magnitude < STATIC_BELOW * reference.videos.magnitude.median()
        ).int().tolist(),
        "smoothness": videos.smoothness.tolist(),
        "flicker": videos.flicker.tolist(),
        "color_shift": videos.color_shift.tolist(),
        "niqe": scores[:, 1:].mean(dim=1).tolist(),
        **{
            f"consistency_{name}": column.tolist()
            for name, column in zip(CONSISTENCY, videos.consistency.T, strict=False)
        },
        "log_sharpness": videos.nss[:, 1:, NSS_NAMES.index("sharpness")].mean(dim=1).tolist(),
    }  # fmt: skip
    for seconds in (2.0, 1.0, 5.0):
        try:
            columns[f"drift_{seconds:g}s"] = drift(scores, seconds, videos.fps).tolist()
            if seconds == 2.0:
                columns["signed_drift"] = signed_drift(scores, seconds, videos.fps).tolist()
        except UserError:
            pass  # the figure of the section says why; the column stays empty
    columns |= dict(section.rows)
    return [
        {"section": section.name, **{name: values[i] for name, values in columns.items()}}
        for i in range(len(videos))
    ]


def niqe_over_time(videos: Measured, reference: Reference) -> Tensor:
    """float64 [N, K]: domain-NIQE over up to 40 stretches of each video."""
    return pace(reference.frames.distance(videos.nss), _PLOT_POINTS)
