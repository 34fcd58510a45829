"""A live session from Python: connect, start, steer, and iterate over frames."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import numpy as np
from PIL import Image

from aad1.errors import UserError
from aad1.media.images import ImageLike, check_file
from aad1.serve import protocol
from aad1.serve.model import Pixels

KEPT = 512
"""Frames and events that are kept until they are asked for; the oldest go first."""


class ServerError(UserError):
    """An error that the server answered with; `code` is one of `protocol.CODES`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class ReceivedFrame:
    """A frame as it arrived; numbers as in `session.Frame`."""

    pixels: Pixels
    number: int
    chunk: int
    generation: int
    steer: int
    received: float
    """time.perf_counter() when it arrived."""


class LiveClient:
    """A connection to `aad1 serve`; a context manager.

    url: of the page, http://host:port. session: watch that session instead of opening one.
    timeout: seconds that any answer may take.

    Raises:
        UserError: there is no server, it is another kind of server, or the token is wrong.
        ServerError: the server refuses: all sessions are taken, or the model is not warm yet.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        session: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"url must be http://host:port or https://host:port, got {url!r}")
        self.url, self.token, self.timeout = url.rstrip("/"), token, timeout
        query = urlencode({k: v for k, v in (("token", token), ("session", session)) if v})
        scheme = {"http": "ws", "https": "wss"}[parts.scheme]
        address = urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/ws", query, ""))
        self.stats: dict[str, Any] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._frames: deque[ReceivedFrame] = deque(maxlen=KEPT)
        self._answers: dict[int, dict[str, Any]] = {}
        self._ids = itertools.count(1)
        self._ended = False
        self._stack = ExitStack()
        try:
            connection = connect(
                address, open_timeout=timeout, close_timeout=1, max_size=2**26, compression=None,
                proxy=None,
            )  # fmt: skip
            self._socket = self._stack.enter_context(connection)
        except (OSError, WebSocketException) as error:
            raise UserError(f"no live server at {url}: {error}") from None
        self.hello = self._hello()

    def __enter__(self) -> LiveClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye; frames that were not read are dropped."""
        from websockets.exceptions import ConnectionClosed

        with suppress(TimeoutError, ConnectionClosed):
            while True:  # the answer to the goodbye comes after what waits here
                self._socket.recv(0)
        self._stack.close()

    # -- commands -------------------------------------------------------------------------

    def start(
        self, prompt: str, *, image: ImageLike | None = None, sample: str | None = None,
        seed: int = 0,
    ) -> int:  # fmt: skip
        """Begin a video with an image or a sample's name; returns the generation of its frames."""
        command: dict[str, Any] = {"type": "start", "prompt": prompt, "seed": seed}
        if sample is not None:
            command["sample"] = sample
        answer = self.command(command, b"" if image is None else _picture(image))
        return int(answer["generation"])

    def steer(self, prompt: str, blend: int = 1) -> int:
        """A new prompt; frames that obey it carry the number returned, or a later one."""
        return int(self.command({"type": "prompt", "prompt": prompt, "blend": blend})["steer"])

    def pause(self) -> None:
        self.command({"type": "pause"})

    def resume(self) -> None:
        self.command({"type": "resume"})

    def reset(self, seed: int | None = None) -> int:
        """Back to the picture; returns the new generation."""
        command = {"type": "reset"} if seed is None else {"type": "reset", "seed": seed}
        return int(self.command(command)["generation"])

    def stop(self) -> None:
        self.command({"type": "stop"})

    def record(self) -> None:
        """Begin a recording of what is shown."""
        self.command({"type": "record", "on": True})

    def save_recording(self, path: str | Path) -> int:
        """Finish the recording and write it to `path`; returns its number of frames."""
        import httpx

        from aad1.atomic import replace_file

        answer = self.command({"type": "record", "on": False})
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        reply = httpx.get(
            f"{self.url}/{answer['url']}", headers=headers, timeout=self.timeout, trust_env=False
        )
        if reply.status_code != 200:
            raise UserError(f"the recording could not be fetched: HTTP {reply.status_code}")
        with replace_file(path) as temporary:
            temporary.write_bytes(reply.content)
        return int(answer["frames"])

    def command(self, command: dict[str, Any], payload: bytes = b"") -> dict[str, Any]:
        """Send any command and wait for its answer. ServerError if it is refused."""
        from websockets.exceptions import ConnectionClosed

        number = next(self._ids)
        command = {**command, "id": number}
        try:
            self._socket.send(protocol.pack(command, payload) if payload else json.dumps(command))
        except ConnectionClosed as error:
            raise UserError(f"the connection has ended: {error}") from None
        deadline = time.perf_counter() + self.timeout
        while number not in self._answers:
            self._receive(deadline)
        answer = self._answers.pop(number)
        if answer["type"] == "error":
            raise ServerError(answer["code"], answer["message"])
        return answer

    # -- frames ---------------------------------------------------------------------------

    def frames(self) -> Iterator[ReceivedFrame]:
        """Frames as they come, until the session ends or none came for `timeout` seconds."""
        while True:
            deadline = time.perf_counter() + self.timeout
            while not self._frames:
                if self._ended:
                    return
                self._receive(deadline)
            yield self._frames.popleft()

    def _receive(self, deadline: float) -> None:
        """One message into its place. UserError when the connection ends or the time is up."""
        from websockets.exceptions import ConnectionClosed

        try:
            message = self._socket.recv(max(0.0, deadline - time.perf_counter()))
        except TimeoutError:
            raise UserError(f"the server did not answer within {self.timeout:g} s") from None
        except ConnectionClosed as error:
            self._ended = True
            raise UserError(f"the connection has ended: {error}") from None
        if isinstance(message, bytes):
            header, payload = protocol.unpack(message)
            pixels = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
            del header["type"]
            self._frames.append(
                ReceivedFrame(pixels=pixels, received=time.perf_counter(), **header)
            )
            return
        event = json.loads(message)
        if event["type"] in ("ack", "error") and "id" in event:
            self._answers[event["id"]] = event
        elif event["type"] == "stats":
            self.stats = event
        else:
            self._ended = self._ended or event["type"] == "ended"
            self.events.append(event)

    def _hello(self) -> dict[str, Any]:
        deadline = time.perf_counter() + self.timeout
        while not self.events:
            self._receive(deadline)
        event = self.events.popleft()
        if event["type"] == "error":
            self._stack.close()
            raise ServerError(event["code"], event["message"])
        return event


def _picture(image: ImageLike) -> bytes:
    """The bytes to send: a file as it is, anything else as PNG."""
    if isinstance(image, Image.Image):
        picture = image
    elif hasattr(image, "shape"):
        picture = Image.fromarray(np.asarray(image))
    else:
        check_file(Path(image), "an image")
        return Path(image).read_bytes()
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
