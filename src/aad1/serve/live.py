"""A session that runs: asyncio drives it, one thread has the model, another packs pictures.

All sessions share the model's thread. Each has at most one chunk waiting there (one that a reset
made useless is taken back), and waiting jobs are served in the order they came, so sessions that
together ask too much become slower evenly.
Everything else happens in the event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from pathlib import Path
from typing import Any, Protocol

from aad1.errors import UserError
from aad1.media.images import ImageLike
from aad1.serve.engine import Engine
from aad1.serve.guard import Limits
from aad1.serve.recorder import Recorder
from aad1.serve.session import Frame, Job, Session


class Listener(Protocol):
    """Whoever is shown a session. Both calls must return at once."""

    def frame(self, frame: Frame) -> None: ...

    def event(self, message: dict[str, Any]) -> None: ...


class Live:
    """One live video with its listeners and its recording."""

    def __init__(self, engine: Engine, recordings: Path, limits: Limits) -> None:
        """recordings: a folder for mp4 files."""
        self.id = secrets.token_urlsafe(9)
        self.engine = engine
        self.core = Session(engine.model.fps)
        self.listeners: set[Listener] = set()
        self.last: Frame | None = None
        """What is on show, for who comes later."""
        self.finished: list[Path] = []
        """Recordings, oldest first."""
        self._recordings, self._limits = recordings, limits
        self._recorder: Recorder | None = None
        self._idle_since = self._now()
        self._image: ImageLike | None = None
        self._seed = 0
        self._making: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._show())
        self._spawn(self._report())

    # -- commands -------------------------------------------------------------------------

    async def start(self, image: ImageLike | None, prompt: str, seed: int) -> int:
        """Begin a video; returns the generation that its frames carry."""
        text = await self.engine.on_side(self.engine.model.encode, prompt)
        point = await self.engine.on_worker(self.engine.model.begin, image, seed)
        self._image, self._seed = image, seed
        generation = self.core.start(point, prompt, text, self._now())
        self._drop_job()
        return generation

    async def steer(self, prompt: str, blend: int = 1) -> int:
        """A new prompt; returns the number that frames made with it carry."""
        asked = self._now()
        text = await self.engine.on_side(self.engine.model.encode, prompt)
        number = self.core.steer(prompt, text, self._now(), blend, asked)
        self._wake()
        return number

    async def reset(self, seed: int | None = None) -> int:
        """Back to the picture, with another seed if one is given; returns the generation."""
        point = None
        if seed is not None and seed != self._seed and self.core.status != "idle":
            point = await self.engine.on_worker(self.engine.model.begin, self._image, seed)
            self._seed = seed
        generation = self.core.reset(self._now(), point)
        self._drop_job()
        return generation

    def pause(self) -> None:
        self.core.pause(self._now())
        self._wake()

    def resume(self) -> None:
        self.core.resume(self._now())
        self._wake()

    def stop(self) -> None:
        self.core.stop()
        self._drop_job()

    def record(self) -> None:
        """Begin a recording. UserError if one is running."""
        if self._recorder is not None:
            raise UserError("a recording is running already")
        path = self._recordings / f"{secrets.token_urlsafe(12)}.mp4"
        most = round(self._limits.recording_seconds * self.core.fps)
        self._recorder = Recorder(path, self.core.fps, most)

    async def finish_recording(self) -> tuple[str, int]:
        """Finish the recording: the file's name and its frames. UserError if there is none."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            raise UserError("no recording is running")
        return recorder.path.name, await self._finish(recorder)

    async def _finish(self, recorder: Recorder) -> int:
        frames = await asyncio.to_thread(recorder.finish)
        self.finished.append(recorder.path)
        keep_newest(self.finished, self._limits.recordings)
        return frames

    async def close(self) -> None:
        """End the session: tasks, recording, listeners."""
        self.core.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._recorder is not None:
            with contextlib.suppress(UserError):
                await asyncio.to_thread(self._recorder.finish)
            self._recorder.path.unlink(missing_ok=True)  # nobody is left to be told its name
        self._tell({"type": "ended"})
        self.listeners.clear()

    # -- running --------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _wake(self) -> None:
        self._changed.set()

    def _drop_job(self) -> None:
        """The chunk in the making is of a video that is over: the model need not begin it."""
        if self._making is not None:
            self._making.cancel()
        self._wake()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def touch(self) -> None:
        """The owner is there: the time until an idle session ends begins anew."""
        self._idle_since = self._now()

    async def _show(self) -> None:
        """Hand out frames when they are due, and have the next chunk made."""
        told = self.status()
        while True:
            self._changed.clear()
            frames = self.core.take(self._now())
            for frame in frames:
                self._show_one(frame)
            job = self.core.next_job(self._now())
            if job is not None:
                self._making = self._spawn(self._make(job))
            if self.status() != told:
                told = self.status()
                self._tell({"type": "status", **told})
            due = self.core.next_due()
            timeout = None if due is None else max(0.0, due - self._now())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)

    def status(self) -> dict[str, str]:
        return {"status": self.core.status, "prompt": self.core.prompt}

    def _show_one(self, frame: Frame) -> None:
        self.last = frame
        for listener in self.listeners:
            listener.frame(frame)
        if self._recorder is not None and not self._recorder.add(frame.pixels):
            ended, self._recorder = self._recorder, None
            reason = "it is as long as allowed" if ended.full else "the encoder could not keep up"
            self._spawn(self._end_recording(ended, reason))

    async def _end_recording(self, ended: Recorder, reason: str) -> None:
        """One that nobody asked to end."""
        try:
            frames = await self._finish(ended)
        except UserError as error:
            self._tell({"type": "error", "code": "recording_failed", "message": str(error)})
        else:
            done = recorded(ended.path.name, frames, self.core.fps)
            self._tell({**done, "reason": reason})

    async def _make(self, job: Job) -> None:
        try:
            frames, packed, after, seconds = await self.engine.make(job.point, job.text)
        except Exception as error:  # the model's fault ends this video, not the server
            print(f"aad1: a chunk failed: {type(error).__name__}: {error}", file=sys.stderr)
            self.core.fail(job)
            message = f"the chunk could not be made ({type(error).__name__})"
            self._tell({"type": "error", "code": "internal", "message": message})
            self._wake()
            return
        kept = self.core.deliver(job, frames, packed, after, seconds, self._now())
        self._wake()
        if kept:  # what is thrown away is never continued
            with contextlib.suppress(Exception):  # it comes again when the point is used
                self.core.settled(job, await self.engine.settle(after), self._now())

    async def _report(self) -> None:
        """Figures once a second: they also show listeners that the server is alive."""
        while True:
            self._tell(
                {"type": "stats", **self.core.stats(self._now()), "viewers": len(self.listeners)}
            )
            if self.core.status == "running":
                self.touch()
            if self._now() - self._idle_since > self._limits.idle_seconds:
                await self._end_idle()
            await asyncio.sleep(1)

    async def _end_idle(self) -> None:
        reason = f"no video ran for {self._limits.idle_seconds / 60:g} minutes"
        if self._recorder is not None:
            ended, self._recorder = self._recorder, None
            await self._end_recording(ended, reason)
        self._tell({"type": "ended", "reason": reason})  # the owner's connection ends with that

    def _tell(self, message: dict[str, Any]) -> None:
        for listener in self.listeners:
            listener.event(message)


def keep_newest(files: list[Path], most: int) -> None:
    """Delete the first ones of a list, on the disk too, until `most` are left."""
    while len(files) > most:
        files.pop(0).unlink(missing_ok=True)


def recorded(name: str, frames: int, fps: float) -> dict[str, Any]:
    """The message that a recording can be fetched."""
    return {
        "type": "recorded", "url": f"api/recordings/{name}", "frames": frames,
        "seconds": round(frames / fps, 3),
    }  # fmt: skip
