"""Clients that break rules, read slowly or vanish: the server stays up and others are unharmed."""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from aad1.errors import UserError
from aad1.serve import run, server
from aad1.serve.client import LiveClient, ServerError
from aad1.serve.protocol import CODES, pack, unpack
from aad1.serve.session import Frame
from aad1.serve.viewer import Outbox
from serve_fakes import CHUNK, FakeModel, until

Make = Callable[..., Any]
Serve = Callable[[Any], str]


@pytest.fixture(scope="module")
def app(make_app: Make) -> Any:
    return make_app(sessions=8, images_per_minute=60000, messages_per_second=1000)


@pytest.fixture(scope="module")
def url(app: Any, serve: Serve) -> str:
    return serve(app)


LONGEST_GAP = 0.5
"""Seconds between two frames of a session beside a rough one (they are 1/160 s apart)."""


class Witness:
    """A well-behaved session beside the rough one: its frames must come, all and in time."""

    def __init__(self, url: str) -> None:
        self.client = LiveClient(url)
        self.client.start("a", sample="00.png")
        self.numbers: list[int] = []
        self.times: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        for frame in self.client.frames():
            self.numbers.append(frame.number)
            self.times.append(frame.received)
            if self._done.is_set():
                return

    def __enter__(self) -> Witness:
        self._thread.start()
        assert until(lambda: len(self.numbers) > 20)
        return self

    def __exit__(self, *_: object) -> None:
        count = len(self.numbers)
        assert until(lambda: len(self.numbers) > count + 20)  # it goes on
        self._done.set()
        self._thread.join()
        self.client.close()
        assert self.numbers == list(range(len(self.numbers)))
        assert max(np.diff(self.times)) < LONGEST_GAP


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
    "too many bytes": (bytes(8_000_001), "too_large"),
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
    with Witness(url):
        before = set(hub.sessions)
        with Deaf(url).socket:
            assert until(lambda: bool(set(hub.sessions) - before))
            slow = hub.sessions[(set(hub.sessions) - before).pop()]
            (outbox,) = slow.listeners
            assert until(lambda: slow.core.stats(0.0)["frame"] > 20)
            # fill every buffer between here and there: frames as large as a picture of 1080p
            real = slow.engine._pack
            slow.engine._pack = lambda frame: real(frame) + bytes(300_000)
            assert until(lambda: outbox.dropped > 20, 10)
            slow.engine._pack = real
            assert len(outbox._frames) <= 32
        assert until(lambda: slow.id not in hub.sessions)


def test_answers_go_before_frames_and_the_oldest_frames_are_dropped() -> None:
    async def run() -> None:
        outbox = Outbox()
        for k in range(40):
            outbox.frame(
                Frame(pixels=np.zeros((1, 1, 3), np.uint8), packed=b"x", number=k, chunk=0,
                      generation=1, steer=1)
            )  # fmt: skip
        outbox.event({"type": "ack"})
        assert await outbox.next() == '{"type":"ack"}'
        assert outbox.dropped == 8
        first = await outbox.next()
        assert isinstance(first, bytes)
        assert unpack(first)[0]["number"] == 8
        outbox.event({"type": "ended"})
        assert await outbox.next() == '{"type":"ended"}'
        assert await outbox.next() is None  # whatever frames are left

    asyncio.run(run())


class Deaf:
    """A client that starts a video and then reads nothing."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.socket.recv(1000)
        command = b'{"type":"start","prompt":"a","sample":"00.png"}'
        self.socket.sendall(bytes([0x81, 0x80 | len(command)]) + bytes(4) + command)


def test_a_reader_that_stops_is_soon_behind_by_a_second_and_no_more(
    make_app: Make, serve: Serve
) -> None:
    """Frames of 5.7 kB, the size of doom's: the system's buffers hold little of the way."""
    app = make_app()
    real = app.state.hub.engine._pack
    app.state.hub.engine._pack = lambda frame: real(frame).ljust(5700, b"0")
    deaf = Deaf(serve(app))
    assert until(lambda: bool(app.state.hub.sessions))
    (live,) = app.state.hub.sessions.values()
    (outbox,) = live.listeners
    assert until(lambda: outbox.dropped > 0, 10)
    waiting = live.core.stats(0.0)["frame"] - outbox.dropped
    deaf.socket.close()
    assert waiting < 250  # 752 without a bound on the send buffer


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_a_reader_that_never_reads_nor_closes_is_cut(
    make_app: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((server, "SEND"), (server, "CLOSE"), (run, "CLOSE")):
        monkeypatch.setattr(module, f"{name}_SECONDS", 0.3)
    app = make_app()
    real = app.state.hub.engine._pack
    app.state.hub.engine._pack = lambda frame: real(frame) + bytes(100_000)
    url = serve(app)
    before = len(os.listdir("/proc/self/fd"))
    deaf = Deaf(url)
    assert until(lambda: bool(app.state.hub.sessions))
    assert until(lambda: not app.state.hub.sessions, 10)
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)  # its own end is open
    deaf.socket.close()


def test_a_fault_of_the_server_is_answered_and_logged(
    make_app: Make, serve: Serve, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Faulty(FakeModel):
        def encode(self, prompt: str) -> Any:
            if prompt == "fault":
                raise KeyError("two\nlines")
            return super().encode(prompt)

    app = make_app(Faulty(fps=160.0))
    url = serve(app)
    with Witness(url), LiveClient(url) as client:
        with pytest.raises(ServerError, match=r"the server failed \(KeyError\)") as caught:
            client.start("fault", sample="00.png")
        assert caught.value.code == "internal"
        assert client.start("a", sample="00.png") == 1  # the session lives on
        reply = httpx.post(f"{url}/api/generate", data={"prompt": "fault", "sample": "00.png"})
        assert (reply.status_code, reply.json()["code"]) == (500, "internal")
    monkeypatch.setattr(app.state.hub, "open", lambda: 1 // 0)
    with pytest.raises(ServerError) as caught:
        LiveClient(url)
    assert caught.value.code == "internal"
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        *["aad1: a request failed: KeyError: 'two\\nlines'"] * 2,
        "aad1: a request failed: ZeroDivisionError: integer division or modulo by zero",
    ]


def chunked() -> Iterator[bytes]:
    """A body of 9 MiB that does not say its length."""
    yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    for _ in range(9 * 2**4):
        yield bytes(2**16)
    yield b"\r\n--x--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    "method, path, options, status, code",
    [
        ("POST", "/api/generate", {"content": chunked(), "headers": FORM}, 413, "too_large"),
        ("POST", "/api/generate", {"content": b"no form", "headers": FORM}, 400, "bad_message"),
        ("GET", "/nothing", {}, 404, "not_found"),
        ("DELETE", "/api/info", {}, 405, "not_allowed"),
    ],
)  # fmt: skip
def test_every_refused_request_has_a_code(
    url: str, method: str, path: str, options: Any, status: int, code: str
) -> None:
    reply = httpx.request(method, url + path, **options)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert set(reply.json()) == {"code", "message"}
    assert "\n" not in reply.json()["message"]


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
    """What schemathesis makes of the schema of the REST addresses: what fits it and what does not.

    A form that fits is given a sample that exists (most of the time, and then no image), so that
    some succeed.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode

    seen: dict[str, set[int]] = {}

    def check(case: Any, good: bool) -> None:
        name = f"{case.method.upper()} {case.path}"
        if good and name == "POST /api/generate" and isinstance(case.body, dict):
            case.body |= {"sample": "00.png", "chunks": 1 + case.body.get("seed", 0) % 2}
            case.body.pop("image", None)
        if good and "name" in (case.path_parameters or {}):
            case.path_parameters["name"] = "00.png"
        reply = case.call()
        seen.setdefault(name, set()).add(reply.status_code)
        assert reply.status_code < 500, (case, reply.text)
        if reply.status_code >= 400:
            assert set(reply.json()) == {"code", "message"}, (case, reply.text)
            assert "\n" not in reply.text

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue  # nothing about it can be wrong: a name may be any text
            limit = settings(
                max_examples=12, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck), derandomize=True,
            )  # fmt: skip
            choices = [True, True, False] if mode is GenerationMode.POSITIVE else [False]
            good = st.sampled_from(choices)
            limit(given(case=operation.as_strategy(generation_mode=mode), good=good)(check))()
    assert len(seen) == 6
    assert {200, 422} <= seen["POST /api/generate"]
    assert all(200 in codes for name, codes in seen.items() if "recordings" not in name)
    assert 404 in seen["GET /api/samples/{name}"]
    assert httpx.get(f"{url}/health").status_code == 200
