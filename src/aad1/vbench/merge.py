"""All results of a folder in one report, beside the paper's table.

out/report.json    scores, drift, settings, git SHAs, versions
out/report.md      the same as a table
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aad1 import __version__
from aad1.atomic import replace_file
from aad1.vbench.drift import MAIN, drift_scores
from aad1.vbench.driver import DRIFT, drift_pieces
from aad1.vbench.protocol import DIMENSIONS
from aad1.vbench.results import load_result

PAPER = Path(__file__).with_name("paper.json")
STATIC = (
    "A static video scores best on consistency, I2V, smoothness and drift: read them only beside "
    "the dynamic degree."
)


def paper_table() -> dict[str, Any]:
    """The paper's figures, from the one file that holds them."""
    return dict(json.loads(PAPER.read_text(encoding="utf-8")))


def merge(
    out: Path,
    *,
    model: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report on the results in `out`; written there as JSON and as a table.

    model: how the videos were made. notes: departures from the published protocol.
    failed: why a dimension has no result; one that has neither is "not run".
    """
    failed = failed or {}
    scores: dict[str, Any] = {}
    made_with, versions = {}, {}
    for name in (*DIMENSIONS, DRIFT):
        result = load_result(out / "results" / f"{name}.json")
        if result is None:
            scores[name] = {"not_computed": failed.get(name, "not run")}
            continue
        made_with[name], versions[name] = dict(result.made_with), dict(result.versions)
        if name == DRIFT:
            pieces = drift_pieces(result)
            scores[name] = {"scale": "0-100, population std", **drift_scores(pieces)}
        else:
            scores[name] = {"percent": 100 * result.score, "videos": len(result.videos)}
    notes = [*notes, *_mixed(made_with, versions)]
    report = {
        "format": "aad1.vbench.1",
        "aad1": __version__,
        "model": model,
        "scores": scores,
        "notes": notes,
        "made_with": made_with,
        "versions": versions,
        "paper": paper_table(),
    }
    with replace_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    with replace_file(out / "report.md") as temporary:
        temporary.write_text(table(report) + "\n", encoding="utf-8")
    return report


def _mixed(made_with: Mapping[str, Any], versions: Mapping[str, Any]) -> list[str]:
    """A note for each thing that is not the same for all dimensions."""
    notes = []
    of_set = {name: facts for name, facts in made_with.items() if name != DRIFT}
    for what, facts in (("videos, code or images", of_set), ("package versions", versions)):
        if len({json.dumps(f, sort_keys=True) for f in facts.values()}) > 1:
            notes.append(f"results were made with different {what}: run again")
    return notes


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown: this model's row below the paper's, then drift, then notes."""
    paper, scores = report["paper"], report["scores"]
    titles = [DIMENSIONS[name].title for name in paper["dimensions"]]
    own = [scores[name] for name in paper["dimensions"]]
    passes = str((report["model"] or {}).get("passes_per_chunk", ""))
    rows = [[row["name"], str(row["nfe"]), *map(_number, row["scores"])] for row in paper["rows"]]
    rows.append(["**this model**", passes, *[_number(s.get("percent")) for s in own]])
    rows.append(["videos scored", "", *[str(s.get("videos", 0)) for s in own]])
    lines = [paper["source"], "", *_markdown(["", "NFE", *titles], rows), ""]

    lines += [paper["drift_source"], ""]
    drift = scores[DRIFT]
    dynamic = scores["dynamic_degree"].get("percent")
    rows = [
        [row["name"], _number(row["drift"]), "", "", _number(row["dynamic_degree"])]
        for row in paper["drift_rows"]
    ]
    means = {
        key: _number(value["mean"])
        for key in ("1s", "2s", "5s")
        if isinstance(value := drift.get(key), Mapping)
    }
    others = [means.get(key, "-") for key in ("1s", "5s")]
    rows.append(["**this model**", means.get(f"{MAIN}s", "-"), *others, _number(dynamic)])
    heads = ["", f"drift ({MAIN} s; paper: not given)", "1 s", "5 s", "dynamic degree"]
    lines += [*_markdown(heads, rows), ""]

    reasons = {name: s["not_computed"] for name, s in scores.items() if "not_computed" in s}
    reasons |= {f"{DRIFT}, {k}": v for k, v in drift.items() if str(v).startswith("not computed")}
    lines += [f"- {name}: {reason.removeprefix('not computed: ')}" for name, reason in
              reasons.items()]  # fmt: skip
    lines += [f"- {note}" for note in report["notes"]]
    lines.append(f"- {STATIC}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    cells = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, ["-" * width for width in widths], *rows)
    ]
    return cells
