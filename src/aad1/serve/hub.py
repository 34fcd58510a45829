"""What a server holds: the model, the sessions, and the recordings of one process."""

from __future__ import annotations

import asyncio
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aad1.media import mp4
from aad1.serve import protocol
from aad1.serve.engine import Engine
from aad1.serve.facts import Facts
from aad1.serve.guard import Bucket, Limits, open_picture
from aad1.serve.live import Live, keep_newest
from aad1.serve.model import LiveModel, Pixels
from aad1.serve.protocol import ProtocolError

MOST_VIEWERS = 16
"""Of one session, its owner included."""


class Hub:
    """Sessions come and go; the model stays."""

    def __init__(
        self, model: LiveModel, facts: Facts, limits: Limits, pack: Callable[[Pixels], bytes]
    ) -> None:
        self.facts, self.limits = facts, limits
        self.engine = Engine(model, pack)
        self.sessions: dict[str, Live] = {}
        self.ready = self.failed = False
        self.on_fatal: Callable[[], None] = lambda: None
        self._folder = tempfile.TemporaryDirectory(prefix="aad1-recordings-")
        self._images = Bucket(limits.images_per_minute / 60, limits.images_per_minute / 6)
        self._making = False
        self._left: list[Path] = []  # recordings of sessions that have ended, oldest first

    @property
    def recordings(self) -> Path:
        return Path(self._folder.name)

    async def warm(self) -> None:
        """Ready once a few chunks were made; a model that cannot ends the server."""
        names = list(self.facts.samples)
        try:
            image = await self._sample(names[0]) if names else None
            if image is None and not self.facts.text_to_video:
                image = np.full((self.facts.height, self.facts.width, 3), 128, np.uint8)
            prompt = self.facts.samples[names[0]] if names else ""
            await self.engine.warm(image, prompt)
        except Exception as error:
            print(f"aad1: the model could not warm up: {error}", file=sys.stderr)
            self.failed = True
            self.on_fatal()
        else:
            self.ready = True

    async def close(self) -> None:
        """End all sessions and delete all recordings."""
        await asyncio.gather(*(self.leave(live) for live in list(self.sessions.values())))
        await self.engine.close()
        self._folder.cleanup()

    # -- sessions -------------------------------------------------------------------------

    def open(self) -> Live:
        """A new session. ProtocolError if there are as many as allowed, or none yet."""
        if not self.ready:
            raise ProtocolError("not_ready", "the model is still warming up; try again soon")
        if len(self.sessions) >= self.limits.sessions:
            raise ProtocolError(
                "busy", f"all {self.limits.sessions} sessions are taken; try again later"
            )
        live = Live(self.engine, self.recordings, self.limits)
        self.sessions[live.id] = live
        return live

    def find(self, session: str) -> Live:
        """A session to watch. ProtocolError if there is none, or too many watch it."""
        live = self.sessions.get(session)
        if live is None:
            raise ProtocolError("no_session", "there is no such session, or it has ended")
        if len(live.listeners) >= MOST_VIEWERS:
            raise ProtocolError("busy", f"this session has {MOST_VIEWERS} viewers already")
        return live

    async def leave(self, live: Live) -> None:
        """The owner has gone: the session ends for all."""
        self.sessions.pop(live.id, None)
        await live.close()
        self._left += live.finished
        keep_newest(self._left, self.limits.recordings)

    def recording(self, name: str) -> Path | None:
        """The file of a finished recording; None for any other name."""
        return {file.name: file for file in self.recordings.glob("*.mp4")}.get(name)

    # -- pictures -------------------------------------------------------------------------

    async def picture(self, start: protocol.Start) -> Pixels | None:
        """The picture a start command asks for. ProtocolError if it cannot be had."""
        if start.sample is not None:
            return await self._sample(start.sample)
        if start.image:
            return await self.upload(start.image)
        if not self.facts.text_to_video:
            raise ProtocolError("bad_image", "this model continues a picture: send one")
        return None

    async def _sample(self, name: str) -> Pixels:
        path = self.facts.sample(name)
        if path is None:
            raise ProtocolError("bad_value", f"there is no sample {name[:40]!r}")
        return await self.upload(path.read_bytes(), limited=False)

    async def upload(self, data: bytes, *, limited: bool = True) -> Pixels:
        """A picture's bytes -> pixels of the model's size."""
        if limited and not self._images.take():
            raise ProtocolError("rate_limited", "too many pictures in a short time; wait a little")
        facts = self.facts
        return await self.engine.on_side(open_picture, data, facts.width, facts.height, self.limits)

    # -- one shot -------------------------------------------------------------------------

    async def one_shot(
        self, image: Pixels | None, prompt: str, seed: int, chunks: int,
        gone: Callable[[], Any],
    ) -> Path:  # fmt: skip
        """A video of some chunks as an mp4 file, made between the chunks of live sessions.

        gone: awaited between chunks; True ends the work. ProtocolError while another is made.
        """
        if not self.ready:
            raise ProtocolError("not_ready", "the model is still warming up; try again soon")
        if self._making:
            raise ProtocolError("busy", "another video is being made; try again later")
        self._making = True
        engine = self.engine
        path = self.recordings / "one-shot" / f"{secrets.token_urlsafe(12)}.mp4"
        try:
            text = await engine.on_side(engine.model.encode, prompt)
            point = await engine.on_worker(engine.model.begin, image, seed)
            with mp4.record(path, engine.model.fps) as encoder:
                for _ in range(chunks):
                    if await gone():
                        raise ProtocolError("bad_value", "the client has gone")
                    frames, _, point, _ = await engine.make(point, text, packed=False)
                    await asyncio.to_thread(encoder.write, frames)
            return path
        finally:
            self._making = False
