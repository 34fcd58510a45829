"""The web server: a page, a websocket per session, and a few plain addresses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import (
    FastAPI,
    File,
    Form,
    Request,
    Response,
    UploadFile,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from aad1 import __version__
from aad1.serve import protocol
from aad1.serve.engine import packer
from aad1.serve.facts import Facts
from aad1.serve.guard import Bucket, Guard, Limits
from aad1.serve.hub import Hub
from aad1.serve.live import Live
from aad1.serve.model import LiveModel, Pixels
from aad1.serve.protocol import ProtocolError
from aad1.serve.run import CLOSE_SECONDS
from aad1.serve.viewer import Controller, Outbox

STATIC = Path(__file__).parent / "static"
MOST_CHUNKS = 30
"""Of a one-shot video."""
SEND_SECONDS = 20.0
"""A client that takes no message for so long is gone."""
GONE = (RuntimeError, WebSocketDisconnect, TimeoutError)
"""How a client's end shows while something is sent to it."""
HTTP = {
    "bad_message": 422, "bad_value": 422, "bad_image": 422, "too_large": 413, "rate_limited": 429,
    "busy": 429, "not_ready": 503, "internal": 500,
}  # fmt: skip
CLOSE = {"busy": 1013, "not_ready": 1013, "no_session": 1008}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Problem(BaseModel):
    """An error, as JSON."""

    code: str
    message: str


def create_app(
    model: LiveModel,
    facts: Facts,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    pack: Callable[[Pixels], bytes] | None = None,
) -> FastAPI:
    """The application, with its `Hub` as `app.state.hub`; warm-up begins when it is started."""
    limits = limits or Limits()
    hub = Hub(model, facts, limits, pack or packer("jpeg", 85))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(hub.warm())
        yield
        warming.cancel()
        await hub.close()

    app = FastAPI(
        title="aad1", version=__version__, lifespan=lifespan,
        docs_url=None, redoc_url=None,  # their pages load code from elsewhere
    )  # fmt: skip
    app.state.hub = hub
    app.add_middleware(Guard, token=token, most_bytes=limits.image_bytes + 2**16)
    _pages(app)
    _api(app, hub)
    _websocket(app, hub)
    return app


def _problem(error: ProtocolError) -> JSONResponse:
    return JSONResponse({"code": error.code, "message": str(error)}, HTTP.get(error.code, 400))


def _pages(app: FastAPI) -> None:
    """The page's files, with a policy that lets it load nothing from elsewhere."""

    def page(name: str, kind: str) -> Callable[[], Response]:
        def get() -> Response:
            headers = {
                "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
            }  # fmt: skip
            return FileResponse(STATIC / name, media_type=kind, headers=headers)

        return get

    for path, name, kind in (
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/app.js", "app.js", "text/javascript; charset=utf-8"),
        ("/style.css", "style.css", "text/css; charset=utf-8"),
        ("/icon.svg", "icon.svg", "image/svg+xml"),
    ):
        app.get(path, include_in_schema=False)(page(name, kind))


def _api(app: FastAPI, hub: Hub) -> None:
    facts, limits = hub.facts, hub.limits

    @app.exception_handler(ProtocolError)
    async def typed(request: Request, error: ProtocolError) -> Response:
        return _problem(error)

    @app.exception_handler(HTTPException)
    async def untyped(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "not_allowed"}.get(error.status_code, "bad_message")
        message = " ".join(str(error.detail).split())
        return JSONResponse({"code": code, "message": message}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"code": "bad_value", "message": f"{place}: {first['msg']}"}, 422)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server runs."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": Problem}})
    async def ready() -> Response:
        """The model is warm: sessions begin at once."""
        if not hub.ready:
            return _problem(ProtocolError("not_ready", "the model is still warming up"))
        return JSONResponse({"status": "ready"})

    @app.get("/api/info")
    async def info() -> dict[str, Any]:
        """The model, its samples and keys, and how busy the server is."""
        busy = {"taken": len(hub.sessions), "most": limits.sessions}
        return {**facts.public(), "version": __version__, "sessions": busy}

    @app.get(
        "/api/samples/{name}",
        responses={200: {"content": {"image/png": {}}}, 404: {"model": Problem}},
        response_class=FileResponse,
    )
    async def sample(name: str) -> Response:
        """A sample picture."""
        path = facts.sample(name)
        if path is None:
            return JSONResponse({"code": "not_found", "message": "there is no such sample"}, 404)
        return FileResponse(path, headers={"Cache-Control": "max-age=3600"})

    @app.get(
        "/api/recordings/{name}",
        responses={200: {"content": {"video/mp4": {}}}, 404: {"model": Problem}},
        response_class=FileResponse,
    )
    async def recording(name: str) -> Response:
        """A finished recording; its name came with the message that it is finished."""
        path = hub.recording(name)
        if path is None:
            return JSONResponse({"code": "not_found", "message": "there is no such recording"}, 404)
        return FileResponse(path, media_type="video/mp4", filename="aad1.mp4")

    @app.post(
        "/api/generate",
        responses={
            200: {"content": {"video/mp4": {}}}, 400: {"model": Problem},
            413: {"model": Problem}, 422: {"model": Problem}, 429: {"model": Problem},
            503: {"model": Problem},
        },
        response_class=FileResponse,
    )  # fmt: skip
    async def generate(
        request: Request,
        prompt: Annotated[str, Form(max_length=protocol.MAX_PROMPT)],
        image: Annotated[UploadFile | None, File(description="PNG, JPEG or WebP")] = None,
        sample: Annotated[str | None, Form(max_length=100)] = None,
        chunks: Annotated[int, Form(ge=1, le=MOST_CHUNKS)] = 5,
        seed: Annotated[int, Form(ge=0, le=protocol.MAX_SEED)] = 0,
    ) -> Response:
        """An image and a prompt -> a video. Give an image, or the name of a sample."""
        if image is not None and sample is not None:
            raise ProtocolError("bad_value", "give an image or a sample, not both")
        data = b"" if image is None else await image.read()
        if image is not None and not data:
            raise ProtocolError("bad_image", "the picture has 0 bytes")
        start = protocol.Start(prompt=prompt, sample=sample, image=data)
        pixels = await hub.picture(start)
        path = await hub.one_shot(pixels, prompt, seed, chunks, request.is_disconnected)
        clean = BackgroundTask(path.unlink, missing_ok=True)
        return FileResponse(path, media_type="video/mp4", filename="aad1.mp4", background=clean)


def _websocket(app: FastAPI, hub: Hub) -> None:
    @app.websocket("/ws")
    async def connect(socket: WebSocket, session: str | None = None) -> None:
        await socket.accept()
        try:
            live = hub.open() if session is None else hub.find(session)
        except Exception as error:
            problem = protocol.typed(error)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it may have gone
                await socket.send_json(problem.message())
                await socket.close(CLOSE.get(problem.code, 1011), str(problem))
            return
        owner = session is None
        outbox = Outbox()
        outbox.event(
            {
                "type": "hello", "session": live.id, "role": "owner" if owner else "viewer",
                **live.status(), "info": hub.facts.public(),
            }
        )  # fmt: skip
        if live.last is not None and live.core.status == "paused":
            outbox.frame(live.last)  # nothing else would come
        live.listeners.add(outbox)
        tasks = {
            asyncio.create_task(_send(socket, outbox)),
            asyncio.create_task(_receive(socket, outbox, hub, live, owner)),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            live.listeners.discard(outbox)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            faults = [r for r in results if isinstance(r, Exception) and not isinstance(r, GONE)]
            for fault in faults:
                protocol.typed(fault)
            if owner:
                await hub.leave(live)
            # One who reads nothing leaves no room for a goodbye.
            with contextlib.suppress(*GONE):
                await asyncio.wait_for(socket.close(1011 if faults else 1000), CLOSE_SECONDS)


async def _send(socket: WebSocket, outbox: Outbox) -> None:
    """Until the outbox is closed, the client gone, or too slow for too long."""
    while True:
        message = await outbox.next()
        if message is None:
            return
        send = socket.send_bytes if isinstance(message, bytes) else socket.send_text
        await asyncio.wait_for(send(message), SEND_SECONDS)  # type: ignore[arg-type]


async def _receive(socket: WebSocket, outbox: Outbox, hub: Hub, live: Live, owner: bool) -> None:
    """Answer the client's messages until it goes."""
    rate = hub.limits.messages_per_second
    controller = Controller(live, hub.picture)
    bucket = Bucket(rate, 2 * rate)
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        data = message.get("text")
        data = message.get("bytes") or b"" if data is None else data
        if not bucket.take():
            outbox.event(ProtocolError("rate_limited", "too many messages; slow down").message())
        elif owner:
            outbox.event(await controller.answer(data))
        else:
            refusal = ProtocolError("view_only", "only the session's owner steers it")
            outbox.event(refusal.message())
