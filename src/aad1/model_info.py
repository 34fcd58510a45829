"""What a pipeline folder says about its weights: `model_index.json`, and the model card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_file
from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.weights import read_json, write_json
from aad1.rollout.teacher import Sampling

INDEX = "model_index.json"
CARD = "README.md"
FORMAT = "aad1.pipeline.1"
STAGES = ("teacher", "ode", "dmd", "aad", "joint", "distilled")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the weights are for and where they come from."""

    world: str
    width: int
    height: int
    fps: float
    stage: str
    """"teacher" (bidirectional, does not stream), "ode", "dmd", "aad", "joint" (stages II and III
    at once), or "distilled" (elsewhere, by a method of its own)."""
    updates: int = 0
    sha256: str = ""
    """Hash of the generator's weights; empty for weights that were not made here."""
    parent: Mapping[str, Any] | None = None
    """The same facts of the model that training started from."""
    geometry: ChunkGeometry = ChunkGeometry()
    sigmas: tuple[float, ...] = (1.0,)
    frames: int = 21
    """Latent frames of a training clip."""
    text_to_video: bool = False
    """Whether chunk 0 may be made from the prompt alone; otherwise a video begins with an image."""
    sampling: Sampling = Sampling()
    """How a teacher is sampled unless one says otherwise."""
    extra: Mapping[str, Any] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fps <= 0:
            raise UserError(f"fps must be above 0, got {self.fps}")
        if self.stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")

    def check_streams(self) -> None:
        """UserError for a teacher."""
        if self.stage == "teacher":
            raise UserError(
                "this model is a bidirectional teacher and cannot stream; "
                "distil it first (stages I to III)"
            )

    def check_samples(self) -> None:
        """UserError unless it is a teacher."""
        if self.stage != "teacher":
            raise UserError(
                f"this model is distilled to {len(self.sigmas)} step(s) and streams; "
                "only a teacher is sampled in many"
            )


def current_fields(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a geometry as a model folder or a run's record holds them, less one of former days.

    Until generators of a single pass per chunk were given up, `single_pass` was written into each;
    what has it off is a geometry of now. where: what it is called in the UserError if it is on.
    """
    fields = {**stored}
    given = fields.pop("single_pass", False)
    if given is not False:
        raise UserError(
            f"{where}.single_pass must be false, got {given!r}: generators of a single pass per "
            "chunk are no longer supported"
        )
    return fields


def read_info(folder: Path) -> ModelInfo:
    """model_index.json as a `ModelInfo`; UserError if it is missing or of another format."""
    if not (folder / INDEX).exists():
        hint = ""
        if (folder / "final" / INDEX).exists():
            hint = f"; it is a run, whose model is {folder / 'final'}"
        raise UserError(f"{folder} is not a model: it has no {INDEX}{hint}")
    raw = read_json(folder / INDEX)
    if raw.pop("format", None) != FORMAT:
        raise UserError(f"{folder / INDEX} is not of format {FORMAT}")
    try:
        raw["geometry"] = ChunkGeometry(**current_fields(raw["geometry"], "geometry"))
        raw["sigmas"] = tuple(float(sigma) for sigma in raw["sigmas"])
        raw["sampling"] = Sampling(**raw.get("sampling", {}))
        return ModelInfo(**raw)
    except KeyError as error:
        raise UserError(f"{folder / INDEX} has no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / INDEX}: {error}") from None


def write_info(folder: Path, info: ModelInfo) -> None:
    """Write model_index.json: last of all files, since a folder without one is not a model."""
    write_json(folder / INDEX, {"format": FORMAT, **asdict(info)})


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 over names and float32 values of all weights, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


CREDITS = {
    "doom": "\nTrained on clips recorded with [ViZDoom](https://vizdoom.farama.org) (MIT License)\n"
    "from the maps of [Freedoom](https://freedoom.github.io) (BSD 3-Clause License, Copyright\n"
    "2001-2024 Contributors to the Freedoom project); whoever passes these weights on passes on\n"
    "Freedoom's notice too.\n",
}
"""What a world's makers ask to be said wherever weights made from it go."""


def write_card(folder: Path, info: ModelInfo, parameters: int) -> None:
    """Write README.md of a pipeline folder: what it is, how to use it, where it comes from."""
    with replace_file(folder / CARD) as temporary:
        temporary.write_text(model_card(info, parameters), encoding="utf-8")


def model_card(info: ModelInfo, parameters: int) -> str:
    """The text of README.md."""
    begins = '"a prompt"' if info.text_to_video else '"frame.png", "a prompt"'
    if info.stage == "teacher":
        kind = "a bidirectional video diffusion model (a teacher: it samples, it does not stream)"
        call = 'frames = pipe.sample("a prompt")'
    else:
        steps = len(info.sigmas)
        kind = f"a streaming video generator, {steps} network pass{'es' * (steps > 1)} per chunk"
        call = f"frames = pipe({'None, ' * info.text_to_video}{begins})"
    facts = {
        "world": info.world,
        "size": f"{info.width}x{info.height} at {info.fps:g} frames a second",
        "parameters": f"{parameters:,}",
        "stage": f"{info.stage}, {info.updates} updates",
        "noise levels": ", ".join(f"{s:.4g}" for s in info.sigmas),
        "chunk, sink, window": f"{info.geometry.chunk}, {info.geometry.sink}, "
        f"{info.geometry.window} latent frames",
        "weights (sha256)": info.sha256 or "not hashed",
    }
    lineage, parent = [], info.parent
    while parent:
        lineage.append(f"{parent.get('stage')} ({parent.get('updates')} updates)")
        parent = parent.get("parent")
    facts["trained from"] = ", from ".join(lineage) or "not recorded"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: aad1\ntags: [video-generation, {info.world}]\n---\n\n"
        f"# {info.world}: {kind}\n\n| | |\n|---|---|\n{rows}\n\n"
        "```python\nimport aad1\n\n"
        f'pipe = aad1.Pipeline.from_pretrained("path/to/this/folder")\n{call}\n```\n\n'
        "All weights are safetensors files; `model_index.json` holds the facts above.\n"
        + CREDITS.get(info.world, "")
    )
