"""A pipeline as live video needs it: chunk by chunk, from any point that was reached before."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from aad1.fast.rollout import FastRollout
from aad1.fast.timeline import Place, Timeline
from aad1.media.images import ImageLike
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


class Video(Protocol):
    """One video's generator. Places between its chunks are opaque; each may be continued again."""

    def begin(self, image: torch.Tensor | None, text: torch.Tensor) -> Any:
        """The place before the first chunk; the image is written to the cache with its prompt."""
        ...

    def generate(self, place: Any, text: torch.Tensor) -> torch.Tensor:
        """Clean latents of the chunk after a place."""
        ...

    def commit(self, place: Any, x0: torch.Tensor, text: torch.Tensor) -> Any:
        """The place after the chunk `x0` that was generated at `place` with the prompt `text`."""
        ...


class PlainVideo:
    """On the plain path: places are immutable states."""

    def __init__(self, rollout: Rollout, noise: Noise) -> None:
        self._rollout, self._noise = rollout, noise

    def begin(self, image: torch.Tensor | None, text: torch.Tensor) -> State:
        return State() if image is None else self._rollout.prefill(image, text)

    def generate(self, place: State, text: torch.Tensor) -> torch.Tensor:
        return self._rollout.generate(place, text, self._noise).x0

    def commit(self, place: State, x0: torch.Tensor, text: torch.Tensor) -> State:
        return self._rollout.commit(place, x0, text)


FastPlace = tuple[Timeline, Place]


class FastVideo:
    """On the fast path: the same chunks to rounding. Each beginning has a cache of its own."""

    def __init__(self, rollout: FastRollout, noise: Noise, shape: tuple[int, int, int]) -> None:
        self._rollout, self._noise, self._size = rollout, noise, shape[1:]

    def begin(self, image: torch.Tensor | None, text: torch.Tensor) -> FastPlace:
        timeline = Timeline(self._rollout, 1, *self._size)
        return timeline, timeline.begin(image, text)

    def generate(self, place: FastPlace, text: torch.Tensor) -> torch.Tensor:
        timeline, at = place
        return timeline.generate(at, text, self._noise)

    def commit(self, place: FastPlace, x0: torch.Tensor, text: torch.Tensor) -> FastPlace:
        timeline, at = place
        return timeline, timeline.commit(at, x0, text)


class Point:
    """Where a video stands between two chunks.

    A value as far as users can see: what was reached is never written to. Only the cache pass of
    the chunk before it is put off until someone asks, so that frames can be handed over first.
    """

    def __init__(
        self,
        video: Video,
        decoder: DecoderStream,
        image: torch.Tensor | None = None,
        last: tuple[Any, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """image: latents that the video begins with, if it does and this is the beginning.
        last: the arguments of `Video.commit` for the chunk before; None at the beginning."""
        self.video, self.decoder, self.image = video, decoder, image
        self.is_start = last is None
        self._last, self._place = last, None
        self._lock = threading.Lock()

    def place(self, text: torch.Tensor) -> Any:
        """For a next chunk with the prompt `text`."""
        if self.is_start:
            return self.video.begin(self.image, text)
        self.settle()
        return self._place

    def settle(self) -> None:
        """The cache pass, unless it is done or this is the beginning."""
        with self._lock:
            if self._last is not None:
                self._place = self.video.commit(*self._last)
                self._last = None  # no longer needed


class PipelineModel:
    """A `LiveModel` of a pipeline, on the fast path where the pipeline is.

    The frames of equal prompts equal those of `Pipeline.stream`.
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
        fast = self.pipeline.fast_rollout(stream.rollout)
        video: Video = PlainVideo(stream.rollout, stream.noise())
        if fast is not None:
            video = FastVideo(fast, stream.noise(), stream.shape)
        return Point(video, decoder, image=stream.image)

    @torch.inference_mode()
    def generate(self, point: Point, text: torch.Tensor) -> Made:
        began = time.perf_counter()
        place = point.place(text)
        x0 = point.video.generate(place, text)
        if x0.is_cuda:
            torch.cuda.synchronize(x0.device)  # or the decoder would be charged for the passes
        generated = time.perf_counter()
        decoder = point.decoder.fork()
        latents = x0 if point.image is None else torch.cat([point.image, x0], 2)
        frames = decoder.decode(latents)[0].cpu().numpy()
        seconds = {"dit": generated - began, "decode": time.perf_counter() - generated}
        after = Point(point.video, decoder, last=(place, x0, text))
        return Made(frames, after, seconds)

    @torch.inference_mode()
    def settle(self, point: Point) -> None:
        point.settle()
