"""A pipeline's video in the making: an iterator of frames, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from aad1.errors import UserError
from aad1.fast.handover import Handover
from aad1.fast.rollout import FastRollout
from aad1.models.codec import DecoderStream
from aad1.rollout.stream import Noise, seeded_noise

if TYPE_CHECKING:
    from aad1.pipeline import Pipeline


class Stream:
    """An iterator of uint8 frames [n, height, width, 3]; the first item has the image too.

    prompt: assign a new one at any time, it holds from the next chunk on.
    chunks: how many to make; None means endless. A chunk's cache pass runs only when the next
    chunk is asked for.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        image: torch.Tensor | None,
        prompt: str,
        seed: int,
        *,
        size: tuple[int, int] | None = None,
    ) -> None:
        """image: latents [1, C, 1, h, w], or None for text to video at `size`."""
        self.pipeline, self.image, self.seed = pipeline, image, seed
        rollout = pipeline.rollout  # refuses a teacher now, not at the first chunk
        if image is None:
            self.shape = pipeline.latent_shape(size)
        else:
            # A model trained to make its first chunk takes an image in its place.
            rollout = replace(rollout, geometry=replace(rollout.geometry, first=1))
            self.shape = (image.shape[1], image.shape[3], image.shape[4])
        self.rollout = rollout
        """As it is for this video: one that begins with an image has a first chunk of one frame."""
        self.chunks: int | None = None
        self.decode_seconds = 0.0
        self.prompt = prompt
        self._frames = self._run()

    @property
    def prompt(self) -> str:
        return self._prompt

    @prompt.setter
    def prompt(self, value: str) -> None:
        # Encoded now: unknown words are reported at once, and no chunk waits for it.
        self._rows = self.pipeline.encode_prompt(value)
        self._prompt = value

    def frames(self, chunks: int) -> int:
        """Video frames of the first `chunks` chunks, the image included."""
        made = chunks if self.image is None else 1 + chunks
        return self.pipeline.frames(self.rollout.geometry.frames(made))

    def chunks_for(self, seconds: float) -> int:
        """The fewest chunks that last `seconds`; UserError unless it is above 0 and finite."""
        if not 0 < seconds < float("inf"):
            raise UserError(f"seconds must be above 0, got {seconds}")
        wanted = round(seconds * self.pipeline.info.fps)
        each = self.rollout.geometry.chunk * self.pipeline.codec.temporal_stride
        return 1 + max(0, -(-(wanted - self.frames(1)) // each))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._frames)

    def noise(self) -> Noise:
        """The noise of this stream's seed, for any chunk."""
        device = self.pipeline.device
        return seeded_noise([self.seed], self.rollout.geometry, self.shape, device)

    def latents(self) -> Iterator[torch.Tensor]:
        """Clean latents chunk by chunk, without the image, not decoded."""
        return self.rollout.stream(self.image, lambda i: self._rows, self.noise(), self.chunks)

    def _run(self) -> Iterator[torch.Tensor]:
        fast = self.pipeline.fast_rollout(self.rollout)
        return self._run_plain() if fast is None else self._run_fast(fast)

    @torch.no_grad()
    def _run_fast(self, fast: FastRollout) -> Iterator[torch.Tensor]:
        """The device has its next work, the cache pass, before the host waits for the frames."""
        pipe = self.pipeline
        decoder = pipe.decoder_stream()
        _, height, width = self.shape
        session = fast.session(1, height, width)
        noise = seeded_noise([self.seed], fast.geometry, self.shape, pipe.device)
        sent = Handover(pipe.device)
        before = []
        try:
            if self.image is not None:
                session.prefill(self.image, self._rows)
                before = [self.image]
            made = 0
            while self.chunks is None or made < self.chunks:
                rows = self._rows
                x0 = session.generate(rows, noise)
                made += 1
                sent.begin()
                sent.send(decoder.decode(torch.cat([*before, x0], 2))[0])
                before = []
                if fast.config.early and (self.chunks is None or made < self.chunks):
                    session.commit(x0, rows)
                frames = sent.wait()
                self.decode_seconds = sent.decode_seconds
                yield frames
                if not fast.config.early and (self.chunks is None or made < self.chunks):
                    session.commit(x0, rows)
        finally:
            fast.release(session)

    def _run_plain(self) -> Iterator[torch.Tensor]:
        decoder: DecoderStream = self.pipeline.decoder_stream()
        before = [] if self.image is None else [self.image]
        for x0 in self.latents():
            yield self._decode(decoder, torch.cat([*before, x0], 2))
            before = []

    def _decode(self, decoder: DecoderStream, latents: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        frames = decoder.decode(latents)[0].cpu()
        self.decode_seconds += time.perf_counter() - begin
        return frames
