"""When each frame of a live video is shown, and what is made next: decisions, and nothing else.

A `Session` has no thread, no network and no clock: it is told the time. Whoever drives it (live.py)
asks for a `Job`, has the model do it, delivers the chunk, and takes the frames that are due.

- Pace: frame k is due k / fps after the first. A stall moves all later due times (re-anchoring):
  what is late is shown late, never in a burst.
- Bound: one chunk is on show and at most one is ready or being made, whatever happens.
- Steering: a new prompt drops the chunk that is ready but not begun, if another can be made before
  it is due; the new one continues from the point after the chunk on show. So nothing is shown
  twice, nothing is skipped, and steering by itself never causes a stall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from aad1.errors import UserError
from aad1.serve.model import Pixels, Text

Status = Literal["idle", "running", "paused"]
LATE = 0.25
"""Seconds. Frames taken later than this are a stall; less is caught up, so the mean rate holds."""
MARGIN = 1.3
"""A chunk counts as possible in time if the last ones took this much less than there is left."""
REMEMBERED = 64
"""Past chunks and switches that the figures are made of."""
WINDOW = 3.0
"""Seconds over which frames are counted for the rate, stalls included."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame with where it comes from."""

    pixels: Pixels
    packed: bytes
    """The same as a JPEG or WebP file, if the driver packs frames."""
    number: int
    """Counts from 0 in each generation."""
    chunk: int
    generation: int
    """Counts starts and resets: frames of an earlier one belong to another video."""
    steer: int
    """The switch (as `Session.steer` numbered it) that this frame obeys."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A chunk to be made: the one after `point`."""

    generation: int
    chunk: int
    steer: int
    point: Any
    text: Text
    issued: float


@dataclass(kw_only=True)
class _Steering:
    """What is asked for, and since when."""

    number: int
    prompt: str
    text: Text
    blend: int
    asked: float
    first: int | None = None
    """The first chunk made with it."""
    base: Text = None
    """What the chunk before that was made with."""

    def at(self, chunk: int) -> Text:
        """The text of a chunk: the old one fades out over `blend` chunks."""
        assert self.first is not None
        weight = (chunk - self.first + 1) / self.blend
        if weight >= 1 or self.base is None:
            return self.text
        return self.base + (self.text - self.base) * weight


@dataclass(kw_only=True)
class _Chunk:
    frames: deque[Frame]
    job: Job
    after: Any


class Session:
    """One live video. All times are seconds on the driver's clock, which must not run backwards."""

    def __init__(self, fps: float) -> None:
        if fps <= 0:
            raise UserError(f"fps must be above 0, got {fps}")
        self.fps = fps
        self.status: Status = "idle"
        self.generation = 0
        self.dropped_chunks = 0
        self.stalls = 0
        self.stalled_seconds = 0.0
        self._switches = 0
        self._begin_point: Any = None
        self._steering: _Steering | None = None
        self._estimate: float | None = None
        self._settle = 0.0  # seconds that the cache pass after a chunk takes
        self._settled = -1.0e9  # when the last one was done
        self._seconds: deque[dict[str, float]] = deque(maxlen=REMEMBERED)
        self._latencies: deque[float] = deque(maxlen=REMEMBERED)
        self._taken: deque[float] = deque()  # when, in the last WINDOW
        self._counted_from: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._job: Job | None = None
        self._showing: deque[Frame] = deque()
        self._ahead: _Chunk | None = None
        self._settling: Job | None = None  # the chunk whose cache pass is being done
        self._tip: Any = self._begin_point  # the point after the chunk on show
        self._tip_chunk = -1
        self._tip_text: Text = None
        self._number = 0
        self._due: float | None = None  # of the next frame; None before the first
        self._paused_at: float | None = None
        self._waiting = False  # whether the switch now in force has not been seen yet
        self._restart_count()

    # -- commands -------------------------------------------------------------------------

    @property
    def prompt(self) -> str:
        return "" if self._steering is None else self._steering.prompt

    def start(self, point: Any, prompt: str, text: Text, now: float) -> int:
        """Begin a new video before its first chunk; what was there ends. Returns its generation."""
        self._begin_point = point
        self._switches += 1
        self._steering = _Steering(
            number=self._switches, prompt=prompt, text=text, blend=1, asked=now
        )
        return self.reset(now)

    def reset(self, now: float, point: Any = None) -> int:
        """Back to the first frame (or another point), with the prompt in force now."""
        if self._steering is None:
            raise UserError("nothing to reset: start with an image and a prompt first")
        self._begin_point = point if point is not None else self._begin_point
        old = self._steering
        self._steering = _Steering(
            number=old.number, prompt=old.prompt, text=old.text, blend=1, asked=now
        )
        self.generation += 1
        self._clear()
        self.status = "running"
        return self.generation

    def steer(
        self, prompt: str, text: Text, now: float, blend: int = 1, asked: float | None = None
    ) -> int:
        """A new prompt, as soon as possible. Returns the number that its frames will carry.

        blend: over how many chunks the old prompt fades out; 1 switches at once.
        asked: when the user asked, if that was before `now`; the latency counts from there.
        """
        if self._steering is None:
            raise UserError("nothing to steer: start with an image and a prompt first")
        if not 1 <= blend <= 64:
            raise UserError(f"blend must be in 1..64 chunks, got {blend}")
        self._switches += 1
        self._steering = _Steering(
            number=self._switches, prompt=prompt, text=text, blend=blend,
            asked=now if asked is None else asked,
        )  # fmt: skip
        self._waiting = True
        if self._ahead is not None and self._in_time(now):
            self._ahead = None
            self.dropped_chunks += 1
        return self._switches

    def pause(self, now: float) -> None:
        """Hold the frame on show. The chunk after it is still made."""
        if self.status != "running":
            raise UserError(f"cannot pause: the session is {self.status}")
        self.status, self._paused_at = "paused", now

    def resume(self, now: float) -> None:
        if self.status != "paused" or self._paused_at is None:
            raise UserError(f"cannot resume: the session is {self.status}")
        if self._due is not None:
            self._due += now - self._paused_at
        self.status, self._paused_at = "running", None
        self._restart_count()

    def stop(self) -> None:
        """End the video. A chunk still in the making is thrown away when it comes."""
        self.generation += 1
        self._begin_point = self._steering = None
        self._clear()
        self.status = "idle"

    # -- the driver's side ----------------------------------------------------------------

    def next_job(self, now: float) -> Job | None:
        """What to make now, or None: a job is out already, or one chunk waits to be shown."""
        if self.status == "idle" or self._steering is None:
            return None
        if self._job is not None or self._ahead is not None:
            return None
        steering, chunk = self._steering, self._tip_chunk + 1
        if steering.first is None:
            steering.first, steering.base = chunk, self._tip_text
        self._job = Job(
            generation=self.generation, chunk=chunk, steer=steering.number, point=self._tip,
            text=steering.at(chunk), issued=now,
        )  # fmt: skip
        return self._job

    def deliver(
        self,
        job: Job,
        frames: Pixels,
        packed: Sequence[bytes],
        after: Any,
        seconds: dict[str, float],
        now: float,
    ) -> bool:
        """A chunk is made. False if it is thrown away: of an earlier video, or steered past.

        packed: one entry per frame, or none at all. After True, a driver may have the chunk's cache
        pass done ahead of its use, and then calls `settled`.
        """
        if job is not self._job or self._steering is None:
            return False
        self._job = None
        total = now - job.issued
        # A job that came while the cache pass before it was being done has waited for that.
        waited = min(self._settle, max(0.0, self._settled - job.issued))
        alone = total - waited
        self._seconds.append(
            {**seconds, "chunk": total, "busy": alone + self._settle,
             "length": len(frames) / self.fps}
        )  # fmt: skip
        self._estimate = (
            alone if self._estimate is None else self._estimate + 0.25 * (alone - self._estimate)
        )
        if job.steer != self._steering.number and self._in_time(now):
            self.dropped_chunks += 1
            return False
        first = self._number + len(self._showing)
        made = deque(
            Frame(
                pixels=pixels, packed=packed[k] if packed else b"", number=first + k,
                chunk=job.chunk, generation=job.generation, steer=job.steer,
            )
            for k, pixels in enumerate(frames)
        )  # fmt: skip
        self._ahead = _Chunk(frames=made, job=job, after=after)
        self._settling = job
        if not self._showing and self.status == "running":
            self._reanchor(now)
            self._due = now if self._due is None else self._due
        return True

    def settled(self, job: Job, seconds: float, now: float) -> None:
        """The cache pass of a delivered chunk is done, and took that long."""
        self._settle = self._settle + 0.25 * (seconds - self._settle) if self._settle else seconds
        self._settled = now
        if job is self._settling:
            self._settling = None

    def fail(self, job: Job) -> None:
        """A job could not be done; the session stops if it was for the video on show."""
        if job is self._job:
            self.stop()

    def take(self, now: float) -> list[Frame]:
        """The frames that are due, oldest first; they count as shown from now on."""
        if self.status != "running":
            return []
        frames: list[Frame] = []
        there = bool(self._showing) or self._ahead is not None
        if there and self._due is not None and now - self._due > LATE:
            self._reanchor(now)
        while self._showing or self._ahead is not None:
            if self._due is None:
                self._due = now
            if self._due > now:
                break
            if not self._showing:
                self._show_ahead()
            frames.append(self._showing.popleft())
            self._number += 1
            self._due += 1 / self.fps
            self._taken.append(now)
        if frames:
            if self._counted_from is None:
                self._counted_from = now
            while self._taken[0] <= now - WINDOW:
                self._taken.popleft()
            self._note_latency(frames[-1], now)
        return frames

    def next_due(self) -> float | None:
        """When `take` will have something; None if only a command or a chunk can change that."""
        if self.status != "running" or not (self._showing or self._ahead is not None):
            return None
        return self._due

    # -- inside ---------------------------------------------------------------------------

    def _show_ahead(self) -> None:
        assert self._ahead is not None
        chunk, self._ahead = self._ahead, None
        self._showing, self._tip = chunk.frames, chunk.after
        self._tip_chunk, self._tip_text = chunk.job.chunk, chunk.job.text

    def _reanchor(self, now: float) -> None:
        """Frames were not there, or not taken, when due: go on from now."""
        if self._due is None or now <= self._due:
            return
        if now - self._due > LATE:
            self.stalls += 1
        self.stalled_seconds += now - self._due
        self._due = now

    def _in_time(self, now: float) -> bool:
        """Whether a chunk begun now would be there when the next one is due."""
        if self.status == "paused":
            return True
        if self._due is None or self._estimate is None:
            return False
        due = self._due + len(self._showing) / self.fps
        first = self._settle if self._settling is not None else 0.0  # the model is busy with it
        return now + MARGIN * (first + self._estimate) <= due

    def _note_latency(self, frame: Frame, now: float) -> None:
        if self._waiting and self._steering is not None and frame.steer == self._steering.number:
            self._waiting = False
            self._latencies.append(now - self._steering.asked)

    # -- figures --------------------------------------------------------------------------

    def _restart_count(self) -> None:
        self._taken.clear()
        self._counted_from = None

    def _rate(self, now: float) -> float | None:
        """Frames a second in the last WINDOW, or since the first one if that is less."""
        if self._counted_from is None or now <= self._counted_from:
            return None
        span = min(WINDOW, now - self._counted_from)
        # the first frame opens the time that is counted, so it is not in it
        return sum(max(now - WINDOW, self._counted_from) < t for t in self._taken) / span

    def stats(self, now: float) -> dict[str, Any]:
        """Figures of the last chunks and switches, for people and for tests.

        speed: seconds of video made per second of making, waiting for a turn and the cache pass
        after each chunk included; below 1 the stream is slower than real time. fps: frames
        shown a second, stalls included. Times in milliseconds; None where nothing was measured.
        """

        def middle(name: str) -> float | None:
            values = [s[name] for s in self._seconds if name in s]
            return round(1000 * median(values), 1) if values else None

        recent = list(self._seconds)[-8:]
        busy = sum(s["busy"] for s in recent)
        rate = self._rate(now)
        return {
            "status": self.status,
            "generation": self.generation,
            "frame": self._number,
            "fps": None if rate is None else round(rate, 2),
            "native_fps": self.fps,
            "speed": round(sum(s["length"] for s in recent) / busy, 3) if busy > 0 else None,
            "chunk_ms": middle("chunk"),
            "dit_ms": middle("dit"),
            "decode_ms": middle("decode"),
            "pack_ms": middle("pack"),
            "queued_frames": len(self._showing) + (len(self._ahead.frames) if self._ahead else 0),
            "stalls": self.stalls,
            "stalled_ms": round(1000 * self.stalled_seconds),
            "dropped_chunks": self.dropped_chunks,
            "latency_ms": round(1000 * median(self._latencies)) if self._latencies else None,
            "latency_worst_ms": round(1000 * max(self._latencies)) if self._latencies else None,
        }
