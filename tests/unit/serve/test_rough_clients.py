"""Clients that break rules, read slowly or vanish: the server stays up and others are unharmed."""

from __future__ import annotations

import gc
import io
import itertools
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from aad1.errors import UserError
from aad1.serve.client import LiveClient
from aad1.serve.protocol import CODES, pack
from serve_fakes import CHUNK, FakeModel

Make = Callable[..., Any]
Serve = Callable[[Any], str]


@pytest.fixture(scope="module")
def app(make_app: Make) -> Any:
    return make_app(sessions=8, images_per_minute=60000, messages_per_second=1000)


@pytest.fixture(scope="module")
def url(app: Any, serve: Serve) -> str:
    return serve(app)


class Witness:
    """A well-behaved session beside the rough one: its frames must come, all and in time."""

    def __init__(self, url: str) -> None:
        self.client = LiveClient(url)
        self.client.start("a", sample="00.png")

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        # what waited in the socket meanwhile comes first; nothing may be missing in it
        numbers = [f.number for f in itertools.islice(self.client.frames(), 60)]
        self.client.close()
        assert numbers == list(range(60))


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()


def answer(client: LiveClient, message: str | bytes) -> dict[str, Any]:
    """The first error or acknowledgement after a raw message."""
    client.events.clear()
    client._socket.send(message)
    end = time.perf_counter() + 5
    while not any(event["type"] in ("error", "ack") for event in client.events):
        client._receive(end)
    return next(event for event in client.events if event["type"] in ("error", "ack"))


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A PNG by hand: any size in its header, any data."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes((width + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", body) + part(b"IEND", b"")


def noise_file(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    "nothing known": (b"hello, I am a picture", "bad_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_image"),
    "gif, which is not taken": (noise_file("gif"), "bad_image"),
    "tiff, which is not taken": (noise_file("tiff"), "bad_image"),
    "png cut in the middle": (noise_file("png")[:3000], "bad_image"),
    "jpeg cut in the middle": (noise_file("jpeg")[:900], "bad_image"),
    "webp cut in the middle": (noise_file("webp")[:900], "bad_image"),
    "png with damaged data": (png(64, 64, b"not zlib"), "bad_image"),
    "bomb: 60000x60000 in the header": (png(60000, 60000, zlib.compress(bytes(9))), "too_large"),
    "bomb: just above the limit": (png(4001, 4000), "too_large"),
    "no pixels": (png(0, 0), "bad_image"),
    "too many bytes": (bytes(8 * 2**20 + 1), "too_large"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_bad_pictures_get_a_typed_answer(url: str, name: str) -> None:
    data, code = PICTURES[name]
    with Witness(url), LiveClient(url) as client:
        event = answer(client, pack({"type": "start", "prompt": "a"}, data))
        assert (event["type"], event["code"]) == ("error", code)
        assert "\n" not in event["message"]
        assert client.start("a", sample="00.png") == 1  # the session lives on


def test_damaged_files_of_any_kind_do_no_harm(url: str) -> None:
    rng = random.Random(0)
    with Witness(url), LiveClient(url) as client:
        for k in range(60):
            data = bytearray(noise_file(("png", "jpeg", "webp")[k % 3]))
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            event = answer(client, pack({"type": "start", "prompt": "a"}, bytes(data)))
            assert event["type"] == "ack" or event["code"] in ("bad_image", "too_large")


def test_messages_of_any_kind_get_a_typed_answer(url: str) -> None:
    rng = random.Random(1)
    good = ['{"type":"start","prompt":"a","sample":"00.png"}', '{"type":"prompt","prompt":"b"}']
    with Witness(url), LiveClient(url) as client:
        for _ in range(300):
            text = rng.choice(good)
            place = rng.randrange(len(text))
            text = text[:place] + chr(rng.randrange(1, 0x2FF)) + text[place + rng.randint(0, 3) :]
            message: str | bytes = text if rng.random() < 0.5 else text.encode()
            event = answer(client, message)
            assert event["type"] == "ack" or event["code"] in CODES
        client.start("a", sample="00.png")


def test_a_message_above_the_hard_limit_closes_that_connection_only(url: str) -> None:
    ended = pytest.raises(UserError, match="the connection has ended")  # code 1009, or a reset
    with Witness(url), LiveClient(url) as client, ended:
        client.command({"type": "start", "prompt": "a"}, bytes(20 * 2**20))


def test_a_reader_that_stops_loses_frames_and_nobody_else_does(url: str, app: Any) -> None:
    hub = app.state.hub
    host, port = url.removeprefix("http://").split(":")
    with Witness(url) as witness:
        before = set(hub.sessions)
        with socket.create_connection((host, int(port))) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(
                f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            raw.recv(1000)
            assert until(lambda: bool(set(hub.sessions) - before))
            slow = hub.sessions[(set(hub.sessions) - before).pop()]
            (outbox,) = slow.listeners
            command = b'{"type":"start","prompt":"a","sample":"00.png"}'
            mask = b"\x00\x00\x00\x00"
            raw.sendall(bytes([0x81, 0x80 | len(command)]) + mask + command)
            assert until(lambda: slow.core.stats(0.0)["frame"] > 20)
            # fill every buffer between here and there: frames as large as a picture of 1080p
            real = slow.engine._pack
            slow.engine._pack = lambda frame: real(frame) + bytes(300_000)
            assert until(lambda: outbox.dropped > 20, 10)
            slow.engine._pack = real
            assert len(outbox._frames) <= 32
            witness.client._frames.clear()
        assert until(lambda: slow.id not in hub.sessions)


def test_slow_frames_do_not_hold_up_answers(url: str) -> None:
    with LiveClient(url) as client:
        client.start("a", sample="00.png")
        time.sleep(0.5)  # 80 frames wait; the answer must not wait behind an endless queue
        began = time.perf_counter()
        client.command({"type": "ping"})
        assert time.perf_counter() - began < 1


def test_clients_that_vanish_in_the_middle_of_a_chunk(make_app: Make, serve: Serve) -> None:
    going, gate = threading.Event(), threading.Event()
    gate.set()

    def wait() -> None:
        going.set()
        gate.wait(5)

    app = make_app(FakeModel(wait, fps=160.0), sessions=4)
    url = serve(app)
    for _ in range(5):
        client = LiveClient(url)
        going.clear()
        gate.clear()
        client.command({"type": "start", "prompt": "a", "sample": "00.png"})
        assert going.wait(5)
        client._socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
        client._socket.socket.close()
        assert until(lambda: not app.state.hub.sessions)
        gate.set()
    with LiveClient(url) as client:
        client.start("a", sample="00.png")
        assert [f.number for f in itertools.islice(client.frames(), 40)] == list(range(40))


def test_two_hundred_connections_leave_nothing_behind(make_app: Make, serve: Serve) -> None:
    app = make_app(sessions=4)
    url = serve(app)

    def cycle(k: int) -> None:
        with LiveClient(url) as client:
            if k % 2:
                client.start("a", sample="00.png")
            if k % 4 == 3:
                client.record()
                next(client.frames())

    def left() -> tuple[int, int]:
        gc.collect()
        objects = sum(type(o).__name__ in ("Live", "Outbox", "Recorder") for o in gc.get_objects())
        return objects, len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    for k in range(8):
        cycle(k)
    assert until(lambda: not app.state.hub.sessions)
    time.sleep(0.2)
    objects, files = left()
    for k in range(200):
        cycle(k)
    assert until(lambda: not app.state.hub.sessions)
    # The last sessions may still be held by a frame on some stack; a leak would leave 400.
    assert until(lambda: left()[0] <= objects + 8)
    assert until(lambda: left()[1] <= files + 4)
    assert len(list(app.state.hub.recordings.glob("*.mp4"))) <= app.state.hub.limits.recordings
    assert until(lambda: not [t for t in threading.enumerate() if "_write" in t.name])


def test_four_sessions_slow_down_evenly_and_say_so(make_app: Make, serve: Serve) -> None:
    """A chunk of 0.1 s takes 0.05 s: four sessions ask for twice what there is."""
    app = make_app(FakeModel(lambda: time.sleep(0.05), fps=160.0), sessions=4)
    url = serve(app)
    clients = [LiveClient(url) for _ in range(4)]
    for client in clients:
        client.start("a", sample="00.png")

    def read(k: int) -> None:
        for _ in clients[k].frames():
            if time.perf_counter() > end:
                return

    end = time.perf_counter() + 3
    cores = [live.core for live in app.state.hub.sessions.values()]
    before = [core.stats(0.0)["frame"] for core in cores]
    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [core.stats(0.0)["frame"] - b for core, b in zip(cores, before, strict=True)]
    speeds = [client.stats["speed"] for client in clients]
    for client in clients:
        client.close()
    assert min(counts) > 4 * CHUNK
    assert max(counts) - min(counts) <= 2 * CHUNK
    assert max(speeds) < 0.65
    assert min(speeds) > 0.25


def test_requests_of_any_kind_get_no_server_error(url: str) -> None:
    """The schema of the REST addresses, and what schemathesis makes of it."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, settings

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    names = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        names.add(f"{operation.method.upper()} {operation.path}")

        @settings(
            max_examples=12, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck), derandomize=True,
        )  # fmt: skip
        def check(case: Any) -> None:
            reply = case.call()
            assert reply.status_code < 500, (case, reply.text)
            if reply.status_code >= 400 and "json" in reply.headers.get("content-type", [""])[0]:
                assert "\n" not in reply.text

        from hypothesis import given

        given(case=operation.as_strategy())(check)()
    assert "POST /api/generate" in names
    assert len(names) == 6
    assert httpx.get(f"{url}/health").status_code == 200
