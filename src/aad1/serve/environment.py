"""A world model as an environment: reset to a picture, step with actions, get frames."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from aad1.errors import UserError
from aad1.media.images import ImageLike
from aad1.pipeline import Pipeline
from aad1.serve.facts import KEYS
from aad1.serve.model import PipelineModel, Pixels


class Environment:
    """`reset(image, prompt, seed)` -> the first frame; `step(action)` -> the frames of one chunk.

    An action is a prompt, or the name of a key of the model's world ("left", "up+right"; see
    `actions`). The same reset and actions give the same frames, and a step never looks back at
    more than the rollout's window, so an episode may be endless. There is no reward and no end: a
    harness adds its own.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """UserError for a model that cannot stream from an image."""
        self._model = PipelineModel(pipeline)
        self.fps = pipeline.info.fps
        self.actions: Mapping[str, str] = MappingProxyType(KEYS.get(pipeline.info.world, {}))
        self.prompt = ""
        self._point: Any = None
        self._first = True

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Environment:
        """Of a packaged name, folder or hub id; options as of `Pipeline.from_pretrained`."""
        return cls(Pipeline.from_pretrained(name, **options))

    def reset(self, image: ImageLike, prompt: str = "", seed: int = 0) -> Pixels:
        """Begin an episode: uint8 [1, H, W, 3], the picture as the model sees it.

        prompt: the action of a `step` without one. UserError for a bad image.
        """
        from aad1.media.images import read_image

        info = self._model.pipeline.info
        self._point = self._model.begin(image, seed)
        self.prompt, self._first = prompt, True
        return read_image(image, width=info.width, height=info.height).numpy()[None]

    def step(self, action: str | None = None) -> Pixels:
        """The next chunk under an action: uint8 [T, H, W, 3], T the same at every step.

        None repeats the last action. UserError before the first reset.
        """
        if self._point is None:
            raise UserError("call reset(image) before step")
        if action is not None:
            self.prompt = self.actions.get(action, action)
        made = self._model.generate(self._point, self._model.encode(self.prompt))
        self._point = made.after
        frames, self._first = made.frames[1 if self._first else 0 :], False
        return frames
