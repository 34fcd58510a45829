"""Learning curves out of a run's log, small enough for its result."""

from __future__ import annotations

import json
import math
from pathlib import Path

TRAINED = ("gap", "critic", "penalty", "fake", "dmd", "loss", "generator_norm", "critic_norm")
"""What is kept of the training log; all of the monitor's is."""


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Name -> [[update, value], ...] from a run's log; the monitor's under their own names."""
    out: dict[str, list[list[float]]] = {}
    path = folder / "log.jsonl"
    if not path.exists():
        return out
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = line["kind"]
        if kind not in ("monitor", "train"):
            continue
        for name, value in line.items():
            if name in ("kind", "update", "seconds") or (kind == "train" and name not in TRAINED):
                continue
            if math.isfinite(value):
                label = name if kind == "monitor" else f"train/{name}"
                out.setdefault(label, []).append([line["update"], float(f"{value:.4g}")])
    return {name: thinned(points) for name, points in out.items()}


def thinned(points: list[list[float]], most: int = 60) -> list[list[float]]:
    """At most so many points, evenly spread, the last one among them."""
    step = math.ceil(len(points) / most)
    return points[::-1][::step][::-1]
