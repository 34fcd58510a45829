"""A model whose frames say where they come from, and a driver with a clock of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from aad1.serve.model import Made, Pixels
from aad1.serve.session import Frame, Job, Session

CHUNK = 16
FPS = 16.0


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait for it; whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()


class FakeModel:
    """Frame k of chunk i under text t is filled with [k, i, t]; a point is the texts so far."""

    def __init__(self, wait: Callable[[], None] = lambda: None, fps: float = FPS) -> None:
        self.wait, self.fps = wait, fps
        self.made: list[tuple[Any, ...]] = []
        self.settled: list[tuple[Any, ...]] = []

    def encode(self, prompt: str) -> Any:
        return float(len(prompt))

    def unknown_words(self, prompt: str) -> list[str]:
        return [word for word in prompt.split() if word == "unknown"]

    def begin(self, image: Any, seed: int) -> Any:
        return (f"seed {seed}",)

    def generate(self, point: Any, text: Any) -> Made:
        self.wait()
        chunk = len(point) - 1
        frames: Pixels = np.zeros((CHUNK, 16, 16, 3), np.uint8)
        frames[..., 0] = np.arange(CHUNK)[:, None, None] * 8
        frames[..., 1] = chunk % 256
        frames[..., 2] = int(text)
        self.made.append((*point, text))
        return Made(frames, (*point, text), {"dit": 0.01, "decode": 0.02})

    def settle(self, point: Any) -> None:
        self.settled.append(point)


class Drive:
    """A session with a clock that jumps from event to event.

    A chunk takes `seconds`, and the cache pass after one that is kept takes `settle`; the model
    does one thing at a time.
    """

    def __init__(self, seconds: float = 0.2, prompt: str = "a", settle: float = 0.0) -> None:
        self.model, self.seconds, self.settle = FakeModel(), seconds, settle
        self.session = Session(FPS)
        self.now = 100.0
        self.shown: list[tuple[float, Frame]] = []
        self.most_queued = 0
        self._out: tuple[float, Job] | None = None
        self._settling: tuple[float, Job] | None = None
        self.session.start(self.model.begin(None, 0), prompt, self.model.encode(prompt), self.now)

    def until(self, time: float) -> None:
        """Play to 100 + time seconds."""
        end = 100.0 + time
        while True:
            for frame in self.session.take(self.now):
                self.shown.append((self.now - 100, frame))
            job = self.session.next_job(self.now)
            if job is not None:
                begin = self.now if self._settling is None else self._settling[0]
                self._out = (begin + self.seconds, job)
            self.most_queued = max(self.most_queued, self.stats()["queued_frames"])
            due = self.session.next_due()
            work = [x[0] for x in (self._out, self._settling) if x is not None]
            events = [*work, *([] if due is None else [due])]
            if not events or min(events) > end:
                break
            self.now = max(self.now, min(events))
            if self._settling is not None and self._settling[0] <= self.now:
                self.session.settled(self._settling[1], self.settle, self.now)
                self._settling = None
            if self._out is not None and self._out[0] <= self.now:
                job, self._out = self._out[1], None
                made = self.model.generate(job.point, job.text)
                if self.session.deliver(job, made.frames, [], made.after, made.seconds, self.now):
                    self._settling = (self.now + self.settle, job)
        self.now = max(self.now, end)

    def steer(self, prompt: str, blend: int = 1) -> int:
        return self.session.steer(prompt, self.model.encode(prompt), self.now, blend)

    def stats(self) -> dict[str, Any]:
        return self.session.stats(self.now)

    def latency(self, number: int, asked: float) -> float:
        """Seconds from a switch to its first frame."""
        return next(t for t, frame in self.shown if frame.steer >= number) - asked

    def texts(self) -> list[int]:
        """The text of each chunk that was shown, by what its frames hold."""
        return [int(f.pixels[0, 0, 2]) for _, f in self.shown if f.number % CHUNK == 0]
