"""All that VBench will need, looked for before hours are spent: every gap, and where it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aad1.vbench.environment import Environment, JobFailed
from aad1.vbench.protocol import DIMENSIONS, SIDE, Pair, Places, video_names
from aad1.vbench.videos import check_videos


@dataclass(frozen=True)
class Problem:
    """One thing that is missing or wrong. kind: weight, image, video or environment."""

    kind: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.line}"


def check_all(
    environment: Environment,
    pairs: Sequence[Pair],
    dimensions: Sequence[str],
    videos: Path | None,
    seeds: int,
) -> list[Problem]:
    """Problems of the checkout, its environment, the weights, the images and the videos.

    videos: the folder of the set, or None to leave it out.
    """
    found = check_weights(environment.places, dimensions)
    found += check_images(environment.places, pairs)
    if videos is not None:
        lines, _ = check_videos(
            videos,
            video_names(pairs, seeds),
            least_side=SIDE if "dynamic_degree" in dimensions else 1,
        )
        found += [Problem("video", line) for line in lines]
    return found + check_environment(environment, dimensions)


def check_weights(places: Places, dimensions: Iterable[str]) -> list[Problem]:
    """Weights that are not where VBench looks for them, each with the dimensions that need it."""
    needed: dict[Path, list[str]] = {}
    for dimension in dimensions:
        for path in places.weights(dimension):
            needed.setdefault(path, []).append(dimension)
    return [
        Problem("weight", f"{path}: {fault}, needed for {', '.join(who)}")
        for path, who in needed.items()
        if (fault := _fault(path))
    ]


def check_images(places: Places, pairs: Iterable[Pair]) -> list[Problem]:
    """Images of the prompts that are not in the folder of the ratio."""
    names = sorted({pair.image for pair in pairs})
    return [
        Problem("image", f"{places.images / name}: {fault}")
        for name in names
        if (fault := _fault(places.images / name))
    ]


def _fault(path: Path) -> str:
    if path.is_dir():
        return "" if any(path.iterdir()) else "empty folder"
    if not path.is_file():
        return "missing"
    return "" if path.stat().st_size else "empty file"


def check_environment(environment: Environment, dimensions: Sequence[str]) -> list[Problem]:
    """Modules of VBench that its Python cannot import, and a CUDA device that is not there."""
    modules = ["vbench2_beta_i2v", *(DIMENSIONS[d].module for d in dimensions)]
    try:
        found = environment.run({"do": "imports", "modules": modules}, "imports")
    except JobFailed as error:
        return [Problem("environment", f"{environment.python} failed, {error}")]
    problems = [
        Problem("environment", f"{environment.python} cannot import {name}: {why}")
        for name, why in found["failed"].items()
    ]
    if not found["cuda"] and environment.device.startswith("cuda"):
        problems.append(Problem("environment", f"{environment.python} sees no CUDA device"))
    elif not found["cuda"] and "i2v_background" in dimensions:
        line = "i2v_background needs CUDA, since VBench puts DreamSim there whatever the device"
        problems.append(Problem("environment", line))
    return problems
