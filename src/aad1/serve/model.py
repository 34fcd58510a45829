"""A pipeline as live video needs it: chunk by chunk, from any point that was reached before."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from aad1.media import ImageLike
from aad1.models.codec import DecoderStream
from aad1.models.text import WordEncoder, split_words
from aad1.pipeline import Pipeline
from aad1.rollout.stream import Noise, Rollout, State

Pixels = npt.NDArray[np.uint8]
Text = Any
"""An encoded prompt. Texts can be blended: a + (b - a) * weight is a text too."""


@dataclass(frozen=True)
class Made:
    """One chunk: its frames, the point after it, and the seconds that its parts took."""

    frames: Pixels
    """uint8 [T, H, W, 3]; a video's first chunk begins with the image."""
    after: Any
    seconds: dict[str, float]
    """"dit" (the generator's passes) and "decode"; they do not include waiting for a turn."""


class LiveModel(Protocol):
    """What a session asks of a model. Points are opaque, and one may be continued repeatedly."""

    fps: float

    def encode(self, prompt: str) -> Text:
        """A prompt, ready for `generate`."""
        ...

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that have no effect."""
        ...

    def begin(self, image: ImageLike | None, seed: int) -> Any:
        """The point before the first chunk."""
        ...

    def generate(self, point: Any, text: Text) -> Made:
        """The chunk after `point`."""
        ...

    def settle(self, point: Any) -> None:
        """Do what `generate` would first do there; once, however often the point is used."""
        ...


class Point:
    """Where a video stands between two chunks.

    A value as far as users can see: states and decoders are never written to. Only the cache pass
    of the chunk before it is put off until someone asks, so that frames can be handed over first.
    """

    def __init__(
        self,
        rollout: Rollout,
        noise: Noise,
        before: State,
        x0: torch.Tensor | None,
        text: torch.Tensor | None,
        decoder: DecoderStream,
    ) -> None:
        """x0: the chunk (or image) that `before` lacks; text: its prompt, None for an image,
        which is written to the cache with the prompt of the first chunk."""
        self.rollout, self.noise, self.decoder = rollout, noise, decoder
        self.before, self.x0, self.text = before, x0, text
        self._state: State | None = before if x0 is None else None
        self._lock = threading.Lock()

    @property
    def is_image(self) -> bool:
        return self.x0 is not None and self.text is None

    def state(self, text: torch.Tensor) -> State:
        """The rollout's state here, for a next chunk with the prompt `text`."""
        if self.is_image:
            assert self.x0 is not None
            return self.rollout.commit(self.before, self.x0, text)
        with self._lock:
            if self._state is None:
                assert self.x0 is not None and self.text is not None
                self._state = self.rollout.commit(self.before, self.x0, self.text)
                self.before, self.x0, self.text = self._state, None, None  # no longer needed
            return self._state


class PipelineModel:
    """A `LiveModel` of a pipeline.

    The frames of equal prompts equal those of `Pipeline.stream` (on the fast path to rounding).
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """UserError for a teacher, which cannot stream."""
        pipeline.rollout  # noqa: B018 - refuses a teacher
        self.pipeline = pipeline
        self.fps = pipeline.info.fps

    @torch.inference_mode()
    def encode(self, prompt: str) -> torch.Tensor:
        return self.pipeline.encode_prompt(prompt)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that a model with a small vocabulary does not know."""
        text = self.pipeline.text
        if not isinstance(text, WordEncoder):
            return []
        return [w for w in dict.fromkeys(split_words(prompt)) if w not in text.config.words]

    @torch.inference_mode()
    def begin(self, image: ImageLike | None, seed: int) -> Point:
        """UserError for a bad image, or none where the model needs one."""
        stream = self.pipeline.stream(image, "", seed=seed)
        decoder = self.pipeline.decoder_stream()
        return Point(stream.rollout, stream.noise(), State(), stream.image, None, decoder)

    @torch.inference_mode()
    def generate(self, point: Point, text: torch.Tensor) -> Made:
        began = time.perf_counter()
        image = point.x0 if point.is_image else None
        state = point.state(text)
        x0 = point.rollout.generate(state, text, point.noise).x0
        if x0.is_cuda:
            torch.cuda.synchronize(x0.device)  # or the decoder would be charged for the passes
        generated = time.perf_counter()
        decoder = point.decoder.fork()
        latents = x0 if image is None else torch.cat([image, x0], 2)
        frames = decoder.decode(latents)[0].cpu().numpy()
        seconds = {"dit": generated - began, "decode": time.perf_counter() - generated}
        after = Point(point.rollout, point.noise, state, x0, text, decoder)
        return Made(frames, after, seconds)

    @torch.inference_mode()
    def settle(self, point: Point) -> None:
        if not point.is_image and point.text is not None:
            point.state(point.text)
