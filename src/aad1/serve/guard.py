"""What is let in: hosts, origins, tokens, sizes, rates, and pictures from strangers."""

from __future__ import annotations

import hmac
import io
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from aad1.errors import UserError
from aad1.media.images import read_image
from aad1.serve.model import Pixels
from aad1.serve.protocol import ProtocolError, typed

LOOPBACK = ("localhost", "127.0.0.1", "::1")
FORMATS = ("PNG", "JPEG", "WEBP")
"""Pictures that are taken: each by a decoder that browsers use too."""

Scope = Any
Receive = Any
Send = Any


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for."""

    sessions: int = 4
    image_bytes: int = 8_000_000
    image_pixels: int = 16_000_000
    messages_per_second: float = 40.0
    """Per connection, with bursts of twice as many."""
    images_per_minute: float = 60.0
    """Of all clients together, with bursts of a sixth as many."""
    recording_seconds: float = 600.0
    recordings: int = 16
    """Finished recordings that are kept of each session, and of all that have ended; the oldest go
    first."""
    idle_seconds: float = 900.0
    """Without a running video and without a command, after which a session ends."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise UserError(f"{name} must be a finite number above 0, got {value}")


class Bucket:
    """A rate limit: `rate` a second on average, `burst` at once."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, max(1.0, burst), clock
        self._level, self._seen = self._burst, clock()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._seen) * self._rate)
        self._seen = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


def open_picture(data: bytes, width: int, height: int, limits: Limits) -> Pixels:
    """A picture from a stranger -> uint8 [height, width, 3], covering the size, cropped.

    Its size is read before anything is decoded. ProtocolError says what is wrong with it.
    """
    if len(data) > limits.image_bytes:
        raise ProtocolError(
            "too_large", f"the picture has {len(data):,} bytes, at most {limits.image_bytes:,}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ProtocolError(
            "too_large", f"the picture has more than {limits.image_pixels:,} pixels"
        ) from None
    except Exception:  # Pillow's readers fail with almost any exception
        raise ProtocolError(
            "bad_image", f"not a picture in a format that is taken ({', '.join(FORMATS)})"
        ) from None
    with picture:
        if picture.width * picture.height > limits.image_pixels:
            raise ProtocolError(
                "too_large",
                f"the picture is {picture.width}x{picture.height}, at most "
                f"{limits.image_pixels:,} pixels",
            )
        try:
            return read_image(picture, width=width, height=height).numpy()
        except UserError as error:
            raise ProtocolError("bad_image", str(error)) from None


class Guard:
    """ASGI middleware: who may ask, and how much a request may hold.

    Without a token only this machine may connect, by a loopback name in Host (a web page whose name
    was pointed here is refused). With one, everything but the page itself needs the token, as
    "Authorization: Bearer ...", or "?token=..." where a browser cannot set headers. A request with
    an Origin must come from the page of the host that it is sent to.
    """

    OPEN = ("/", "/health", "/ready", "/app.js", "/style.css", "/icon.svg")

    def __init__(self, app: Any, *, token: str | None, most_bytes: int) -> None:
        self.app, self.token, self.most_bytes = app, token, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
            return
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bodies that do not say their length are counted, and whatever fails gets an answer."""
        left, started = self.most_bytes, False

        async def counted() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLarge
            return message

        async def watched(message: Any) -> None:
            nonlocal started
            if left >= 0 or started:  # or else the parser has made some other error of it
                started = True
                await send(message)

        try:
            await self.app(scope, counted, watched)
        except _TooLarge:
            pass
        except Exception as error:
            problem = typed(error)
            if not started:
                await _refuse(scope, receive, send, 500, str(problem))
            return
        if left < 0 and not started:
            message = f"the request is too large: at most {self.most_bytes:,} bytes"
            await _refuse(scope, receive, send, 413, message)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        host = headers.get("host", "")
        if self.token is None and _hostname(host) not in LOOPBACK:
            return 403, "this server answers to localhost only"
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            return 403, "requests from other sites are refused"
        if self.token is not None and scope["path"] not in self.OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not given:
                query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
                given = query.get("token", [""])[0]
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return 401, "the token is missing or wrong"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.most_bytes:
            return 413, f"the request is too large: at most {self.most_bytes:,} bytes"
        return None


class _TooLarge(Exception):
    pass


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await receive()  # the connect message; closing before accepting answers with HTTP 403
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    from starlette.responses import JSONResponse

    codes = {401: "unauthorized", 403: "forbidden", 413: "too_large", 500: "internal"}
    code = codes[status]
    response = JSONResponse({"code": code, "message": message}, status)
    await response(scope, receive, send)
