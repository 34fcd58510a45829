"""Run the application: in the foreground, or in a thread for tests, examples and the self-test."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aad1.errors import UserError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

HEARTBEAT_SECONDS = 20.0
CLOSE_SECONDS = 5.0
"""That a goodbye may take before the connection is cut."""
SEND_BUFFER = 2**16
"""Bytes that the system may hold for one slow reader (Linux doubles it): a few tens of frames. By
default it grows to megabytes, which such a reader would see before anything is dropped."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_one(host: str) -> bool:
    """Whether that is one address, rather than all of this machine."""
    return host not in ("0.0.0.0", "::", "")


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address. UserError if it is taken or not this machine's."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be in 0..65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # of its connections too
    try:
        sock.bind((host, port))
        sock.listen(128)  # taken from now on, while the model still loads
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --port"
        ) from None
    return sock


def address(sock: socket.socket) -> str:
    """http://host:port of a bound socket, as this machine reaches it."""
    host, port = sock.getsockname()[:2]
    host = host if is_one(host) else "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_server(app: FastAPI) -> uvicorn.Server:
    """The server with a heartbeat, a bound on messages, and no log of addresses (or tokens)."""
    import uvicorn
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    class Connection(WebSocketsSansIOProtocol):
        """Cut some time after its end: closing waits for what was not read, perhaps for ever."""

        async def run_asgi(self) -> None:
            await super().run_asgi()
            self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    hub = app.state.hub
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws=Connection,
        # Somewhat above the limit, so that a picture slightly too large gets an answer in words.
        ws_max_size=2 * hub.limits.image_bytes + 2**16, ws_max_queue=8,
        ws_ping_interval=HEARTBEAT_SECONDS, ws_ping_timeout=HEARTBEAT_SECONDS,
        ws_per_message_deflate=False, timeout_graceful_shutdown=5, proxy_headers=False,
        server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    hub.on_fatal = stop
    return server


@contextmanager
def background(app: FastAPI, *, wait: float = 120.0) -> Iterator[str]:
    """Serve on a free local port from a thread; gives the address once the model is warm.

    UserError if it is not warm in `wait` seconds. Leaving stops the server and joins its thread.
    """
    sock = bind("127.0.0.1", 0)
    server = uvicorn_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + wait
        while not app.state.hub.ready:
            if not thread.is_alive() or time.monotonic() > end:
                raise UserError("the server did not become ready")
            time.sleep(0.02)
        yield address(sock)
    finally:
        server.should_exit = True
        thread.join(15)
        sock.close()
    if thread.is_alive():
        raise UserError("the server did not stop")
