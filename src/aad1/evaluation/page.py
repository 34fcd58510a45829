"""The report as one HTML file: tables, plots as SVG, sheets as JPEG, clips as mp4, nothing outside.

Written for a reader who has not read the code: each figure says what a perfect model gets, what
real videos get at the same number of videos, and what it does not see.
"""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aad1.evaluate.compare import METRICS, Figure
from aad1.evaluation.plots import lines, strips
from aad1.evaluation.result import Picture, Result, Section, label_of, niqe_over_time
from aad1.media.sheet import contact_sheet
from aad1.media.writing import write_video

SHEET_VIDEOS = 8
SHEET_COLUMNS = 8
CLIPS = 12
"""Videos embedded as mp4; each is about 100 kB per 5 seconds at 128x96."""

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{margin-top:2em;font-size:1.2em;border-bottom:1px solid #ccc}
table{border-collapse:collapse;width:100%}
td,th{padding:.25em .6em;text-align:left;vertical-align:top;border-bottom:1px solid #eee}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
.small,.blind{color:#666;font-size:.87em}
.missing{color:#a50;white-space:normal;font-size:.87em}
td:first-child{min-width:15em}
img{max-width:100%}figure{margin:1em 0}
.clips{display:flex;flex-wrap:wrap;gap:10px}.clips div{width:256px}
video{width:256px;image-rendering:pixelated}
"""


def number(value: float | None) -> str:
    """Three significant digits without an exponent where that is short enough."""
    if value is None:
        return ""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def page(result: Result) -> str:
    """The whole report."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(result.title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(result.title)}</h1>",
        _facts(result),
        "".join(f"<p>{html.escape(note)}</p>" for note in result.notes),
    ]
    parts += [_section(section) for section in result.sections]
    parts.append(_looks(result))
    return "\n".join(parts) + "\n</html>\n"


def _facts(result: Result) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in result.facts.items()
    )
    return f"<table>{rows}</table>"


def _section(section: Section) -> str:
    return "\n".join(
        [
            f"<h2>{html.escape(section.title)}</h2>",
            f"<p class=small>{html.escape(section.note)}</p>" if section.note else "",
            figures_table(section.figures),
            _plots(section),
        ]
    )


def figures_table(figures: Mapping[str, Figure]) -> str:
    """One row per figure; M stands in the row of whatever a static video would win."""
    head = (
        "<tr><th>Figure<th>Generated [95%]<th>M<th>Real against real (range)<th>Videos<th>Perfect"
        "<th>Does not see"
    )
    return f"<table>{head}{''.join(_row(name, f) for name, f in figures.items())}</table>"


def _row(name: str, figure: Figure) -> str:
    metric = METRICS.get(name)
    floor = number(figure.floor) or "-"
    if figure.floor_range and figure.floor_range[0] != figure.floor_range[1]:
        low, high = figure.floor_range
        floor += f" <span class=small>({number(low)} to {number(high)})</span>"
    if figure.value is None:
        value = f"<span class=missing>not computed: {html.escape(figure.reason)}</span>"
    else:
        value = f"<b>{number(figure.value)}</b>"
        if figure.interval:
            low, high = figure.interval
            value += f" <span class=small>[{number(low)}, {number(high)}]</span>"
    videos = f"{figure.videos}"
    if figure.floor_videos:
        videos += f" <span class=small>(real {figure.floor_videos})</span>"
    return (
        f"<tr><td>{html.escape(label_of(name))}<td class=n>{value}<td class=n>{number(figure.M)}"
        f"<td class=n>{floor}<td class=n>{videos}<td>{metric.ideal if metric else 'real'}"
        f"<td class=blind>{html.escape(metric.blind) if metric else ''}"
    )


def _plots(section: Section) -> str:
    videos, reference = section.videos, section.reference
    if videos is None or reference is None:
        return ""
    real = reference.videos
    flow = strips(
        {"generated": videos.magnitude.tolist(), "real": real.magnitude.tolist()},
        title="Mean flow of each video, pixels per frame",
    )
    # Of real videos of another length only the beginning is comparable: seconds, not shares.
    curves = {}
    for name, some in (("generated", videos), ("real", real)):
        scores = niqe_over_time(some, reference)
        seconds = torch.linspace(0, (some.frames - 1) / some.fps, scores.shape[1] + 1)[1:]
        curves[name] = (seconds.tolist(), *_band(scores))
    quality = lines(curves, title="Domain-NIQE of frames over time (seconds): median, 10% to 90%")
    return f"<figure>{flow}{quality}</figure>"


def _band(scores: Tensor) -> tuple[list[float], list[float], list[float]]:
    at = torch.tensor([0.5, 0.1, 0.9], dtype=scores.dtype)
    middle, low, high = torch.quantile(scores, at, dim=0)
    return middle.tolist(), low.tolist(), high.tolist()


# ---- what it looks like -------------------------------------------------------------------------


def _looks(result: Result) -> str:
    if not result.pictures:
        return ""
    return (
        "<h2>Videos, in order and not chosen</h2>"
        f"{_sheet(result.pictures)}<div class=clips>{_clips(result)}</div>"
    )


def _sheet(pictures: tuple[Picture, ...]) -> str:
    rows, captions = [], []
    for picture in pictures[:SHEET_VIDEOS]:
        rows.append(picture.generated)
        captions.append(f"generated: {picture.title}")
        if picture.real is not None:
            rows.append(picture.real)
            captions.append("real, from the same first frame")
    scale = max(1, 96 // rows[0].shape[1])
    sheet = contact_sheet(rows, captions, columns=SHEET_COLUMNS, scale=scale)
    data = io.BytesIO()
    sheet.convert("RGB").save(data, "JPEG", quality=88)
    return f'<img alt="sheet of frames" src="{_uri(data.getvalue(), "image/jpeg")}">'


def _clips(result: Result) -> str:
    out = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for picture in result.pictures[:CLIPS]:
            write_video(path, picture.generated, result.fps, scale=1)
            out.append(
                f'<div><video controls loop muted src="{_uri(path.read_bytes(), "video/mp4")}">'
                f"</video><br><span class=small>{html.escape(picture.title)}</span></div>"
            )
    return "".join(out)


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
