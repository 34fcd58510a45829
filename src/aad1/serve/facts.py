"""What a client is told about the model: size, rate, sample pictures, keys."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aad1.errors import UserError
from aad1.model_names import PACKAGED
from aad1.models.text import WordEncoder
from aad1.pipeline import Pipeline

KEYS: dict[str, dict[str, str]] = {
    "doom": {
        "up": "walk forward",
        "down": "walk backward",
        "left": "turn left",
        "right": "turn right",
        "up+left": "turn left while walking",
        "up+right": "turn right while walking",
        "strafe-left": "strafe left",
        "strafe-right": "strafe right",
        "still": "stand still",
    }
}
"""By world: what keys, alone or together, ask for."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model as clients see it."""

    name: str
    world: str
    width: int
    height: int
    fps: float
    chunk_frames: int
    """Video frames of one chunk; the first chunk has the picture too."""
    text_to_video: bool = False
    words: tuple[str, ...] = ()
    """All words that prompts may use; empty for free text."""
    keys: dict[str, str] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    """Names of sample pictures, each with a prompt."""
    folder: Path | None = None
    """Where the samples are."""

    def public(self) -> dict[str, Any]:
        """As JSON, without paths of this machine."""
        return {name: value for name, value in vars(self).items() if name != "folder"}

    def sample(self, name: str) -> Path | None:
        """The file of a sample; None for any name that is not listed."""
        if self.folder is None or name not in self.samples:
            return None
        return self.folder / name


def read_facts(name: str, pipeline: Pipeline) -> Facts:
    """What there is to say about a pipeline, with the packaged samples of its world."""
    info, codec, text = pipeline.info, pipeline.codec, pipeline.text
    folder = PACKAGED / f"{info.world}_frames"
    samples: dict[str, str] = {}
    if (folder / "captions.json").is_file():
        samples = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        missing = [file for file in samples if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder} has no {missing[0]}, which captions.json names")
    return Facts(
        name=name, world=info.world, width=info.width, height=info.height, fps=info.fps,
        chunk_frames=info.geometry.chunk * codec.temporal_stride,
        text_to_video=info.text_to_video,
        words=text.config.words if isinstance(text, WordEncoder) else (),
        keys=KEYS.get(info.world, {}), samples=samples, folder=folder if samples else None,
    )  # fmt: skip
