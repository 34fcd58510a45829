"""One websocket's side of a session: what waits to be sent, and what a client says."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aad1.errors import UserError
from aad1.serve import protocol
from aad1.serve.live import Live, recorded
from aad1.serve.protocol import ProtocolError
from aad1.serve.session import Frame

MOST_FRAMES = 32
"""Frames that wait for a slow reader; after that the oldest are dropped."""
MOST_EVENTS = 256
"""Other messages; a reader that leaves so many behind is gone."""


class Outbox:
    """A `Listener` that keeps what is shown until it is sent; bounded, whoever reads."""

    def __init__(self) -> None:
        self.dropped = 0
        self.closed = False
        self._frames: deque[Frame] = deque()
        self._events: deque[dict[str, Any]] = deque()
        self._there = asyncio.Event()

    def frame(self, frame: Frame) -> None:
        if len(self._frames) >= MOST_FRAMES:
            self._frames.popleft()
            self.dropped += 1
        self._frames.append(frame)
        self._there.set()

    def event(self, message: dict[str, Any]) -> None:
        if len(self._events) >= MOST_EVENTS:
            self.closed = True
        else:
            self._events.append(message)
        self._there.set()

    async def next(self) -> str | bytes | None:
        """The next message, events first; None after the last of a session that has ended."""
        while True:
            if self._events:
                message = self._events.popleft()
                if message["type"] == "stats":
                    message = message | {"dropped_frames": self.dropped}
                if message["type"] == "ended":
                    self.closed = True
                return json.dumps(message, separators=(",", ":"))
            if self.closed:
                return None
            if self._frames:
                frame = self._frames.popleft()
                header = {
                    "type": "frame", "number": frame.number, "chunk": frame.chunk,
                    "generation": frame.generation, "steer": frame.steer,
                }  # fmt: skip
                return protocol.pack(header, frame.packed)
            self._there.clear()
            await self._there.wait()


Picture = Callable[[protocol.Start], Awaitable[Any]]
"""The picture that a start command names or carries; ProtocolError if there is none."""
NEEDS_VIDEO = (protocol.Prompt, protocol.Pause, protocol.Resume, protocol.Reset)


class Controller:
    """Carries out the commands of the client that owns a session."""

    def __init__(self, live: Live, picture: Picture) -> None:
        self.live, self._picture = live, picture

    async def answer(self, message: str | bytes) -> dict[str, Any]:
        """One message of the client -> the message that answers it."""
        number = None
        try:
            command = protocol.parse(message)
            if not isinstance(command, protocol.Ping):
                self.live.touch()
            number = command.id
            result = await self._run(command)
        except Exception as error:
            return protocol.typed(error).message(number)
        answer = {"type": "ack", "command": command.type, **result}
        return answer if number is None else answer | {"id": number}

    async def _run(self, command: protocol.Command) -> dict[str, Any]:
        live = self.live
        if isinstance(command, NEEDS_VIDEO) and live.core.status == "idle":
            raise ProtocolError("not_started", f"{command.type} needs a video: send start first")
        match command:
            case protocol.Start():
                image = await self._picture(command)
                generation = await live.start(image, command.prompt, command.seed)
                return {"generation": generation, **self._unknown(command.prompt)}
            case protocol.Prompt():
                steer = await live.steer(command.prompt, command.blend)
                return {"steer": steer, **self._unknown(command.prompt)}
            case protocol.Pause():
                live.pause()
            case protocol.Resume():
                live.resume()
            case protocol.Reset():
                return {"generation": await live.reset(command.seed)}
            case protocol.Stop():
                live.stop()
            case protocol.Record(on=True):
                live.record()
            case protocol.Record():
                return await self._finish_recording()
            case protocol.Ping():
                return {"time": time.time()}
        return {}

    async def _finish_recording(self) -> dict[str, Any]:
        try:
            name, frames = await self.live.finish_recording()
        except UserError as error:
            raise ProtocolError("recording_failed", str(error)) from None
        return {k: v for k, v in recorded(name, frames, self.live.core.fps).items() if k != "type"}

    def _unknown(self, prompt: str) -> dict[str, Any]:
        words = self.live.engine.model.unknown_words(prompt)
        return {"unknown_words": words} if words else {}
