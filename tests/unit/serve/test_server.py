"""The server with a fake model: sessions, viewers, recordings, one-shot videos, guards."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from aad1.errors import UserError
from aad1.media.reading import read_video
from aad1.serve import recorder
from aad1.serve.client import LiveClient, ReceivedFrame, ServerError
from aad1.serve.guard import Bucket
from aad1.serve.run import background
from serve_fakes import CHUNK, FakeModel, until

Make = Callable[..., Any]
Serve = Callable[[Any], str]


@pytest.fixture(scope="module")
def app(make_app: Make) -> Any:
    return make_app(sessions=3, images_per_minute=6000)


@pytest.fixture(scope="module")
def url(app: Any, serve: Serve) -> str:
    return serve(app)


def png(width: int = 20, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "png")
    return buffer.getvalue()


def take(client: LiveClient, count: int) -> list[ReceivedFrame]:
    return list(itertools.islice(client.frames(), count))


# -- sessions -------------------------------------------------------------------------------------


def test_a_session_from_start_to_stop(app: Any, url: str) -> None:
    with LiveClient(url) as client:
        assert client.hello["role"] == "owner"
        assert client.hello["info"]["chunk_frames"] == CHUNK
        assert client.start("abc", sample="00.png", seed=4) == 1
        frames = take(client, 40)
        assert [f.number for f in frames] == list(range(40))
        assert [f.chunk for f in frames] == [k // CHUNK for k in range(40)]
        assert abs(int(frames[0].pixels[..., 2].mean()) - 3) <= 2  # JPEG's rounding
        number = client.steer("a" * 200)
        after = next(f for f in client.frames() if f.steer >= number)
        assert abs(int(after.pixels[..., 2].mean()) - 200) <= 2
        client.pause()
        shown = app.state.hub.sessions[client.hello["session"]].core.stats(0.0)["frame"]
        time.sleep(0.3)
        assert app.state.hub.sessions[client.hello["session"]].core.stats(0.0)["frame"] == shown
        client.resume()
        assert client.reset(seed=9) == 2
        assert next(f for f in client.frames() if f.generation == 2).number == 0
        client.stop()
        with pytest.raises(ServerError) as caught:
            client.steer("x")
        assert caught.value.code == "not_started"
    assert until(lambda: not app.state.hub.sessions)


def test_unknown_words_are_named(url: str) -> None:
    with LiveClient(url) as client:
        answer = client.command({"type": "start", "prompt": "go unknown", "sample": "00.png"})
        assert answer["unknown_words"] == ["unknown"]


def test_pictures_come_as_file_array_or_sample(url: str, samples: Path) -> None:
    with LiveClient(url) as client:
        client.start("a", image=samples / "00.png")
        client.start("a", image=np.zeros((8, 8, 3), np.uint8))
        with pytest.raises(ServerError, match="continues a picture"):
            client.start("a")
        with pytest.raises(ServerError, match="no sample '../00.png'"):
            client.start("a", sample="../00.png")


def test_figures_come_every_second(url: str) -> None:
    with LiveClient(url) as client:
        client.start("a", sample="00.png")
        take(client, 200)
        stats = client.stats
    assert stats["native_fps"] == 160
    assert stats["fps"] == pytest.approx(160, rel=0.1)
    assert stats["speed"] > 1
    assert stats["queued_frames"] <= 2 * CHUNK
    assert stats["dropped_frames"] == 0


def test_one_more_than_the_most_is_told_that_the_server_is_busy(app: Any, url: str) -> None:
    clients = [LiveClient(url) for _ in range(3)]
    with pytest.raises(ServerError, match="all 3 sessions are taken") as caught:
        LiveClient(url)
    assert caught.value.code == "busy"
    clients[0].close()
    assert until(lambda: len(app.state.hub.sessions) == 2)
    clients[0] = LiveClient(url)
    for client in clients:
        client.start("a", sample="00.png")
    for client in clients:
        assert [f.number for f in take(client, 20)] == list(range(20))
        client.close()
    assert until(lambda: not app.state.hub.sessions)


def test_viewers_see_the_same_frames_and_may_not_steer(app: Any, url: str) -> None:
    with LiveClient(url) as owner, LiveClient(url, session=owner.hello["session"]) as viewer:
        assert viewer.hello["role"] == "viewer"
        owner.start("ab", sample="00.png")
        own, seen = take(owner, 30), take(viewer, 30)
        for a, b in zip(own, seen, strict=True):
            assert a.number == b.number
            np.testing.assert_array_equal(a.pixels, b.pixels)
        viewer._socket.send('{"type": "stop"}')
        assert hears(viewer, "error")["code"] == "view_only"
        owner.close()
        hears(viewer, "ended")
    with pytest.raises(ServerError) as caught:
        LiveClient(url, session="nosuchsession")
    assert caught.value.code == "no_session"


def test_a_viewer_of_a_paused_session_sees_what_is_on_show_and_hears_of_prompts(url: str) -> None:
    with LiveClient(url) as owner:
        owner.start("ab", sample="00.png")
        take(owner, 10)
        owner.pause()
        while owner.stats.get("status") != "paused":
            owner._receive(time.perf_counter() + 5)
        with LiveClient(url, session=owner.hello["session"], timeout=5) as viewer:
            assert (viewer.hello["status"], viewer.hello["prompt"]) == ("paused", "ab")
            assert next(viewer.frames()).number == owner.stats["frame"] - 1
            owner.steer("abc")
            assert hears(viewer, "status")["prompt"] == "abc"


def hears(client: LiveClient, kind: str) -> dict[str, Any]:
    """The next event of that kind; UserError if it does not come."""
    end = time.perf_counter() + 5
    while True:
        for event in client.events:
            if event["type"] == kind:
                client.events.remove(event)
                return event
        client._receive(end)


# -- recordings -----------------------------------------------------------------------------------


def test_a_recording_holds_what_was_shown(url: str, tmp_path: Path) -> None:
    with LiveClient(url) as client:
        client.start("a" * 30, sample="00.png")
        shown = take(client, 10)
        client.record()
        shown += take(client, 30)
        client.steer("a" * 200)  # what follows is recorded too, and in its place
        shown += take(client, 60)
        client.pause()
        time.sleep(0.1)
        client.resume()
        shown += take(client, 10)
        client.pause()
        count = client.save_recording(tmp_path / "x.mp4")
        shown += client._frames
    video = read_video(tmp_path / "x.mp4")
    assert len(video) == count >= 75
    assert video.shape[1:] == (240, 240, 3)  # small pictures are enlarged
    # It holds consecutive frames of those that were received: compare what the pixels say.
    assert {f.steer for f in shown} == {1, 2}
    seen = np.stack([f.pixels.mean((0, 1)) for f in shown])
    held = video.float().mean((1, 2)).numpy()
    errors = [abs(seen[k : k + count] - held).max() for k in range(len(seen) - count + 1)]
    assert min(errors) < 8  # of 255, for H.264 and JPEG; one frame off is 120 at a chunk's end
    assert np.ptp(held[:, 2]) > 150  # the switch is in it
    # each frame says its place in the chunk (8 levels apart): consecutive, none twice, none lost
    place = np.rint(video.float().mean((1, 2))[:, 0].numpy() / 8).astype(int)
    assert (np.diff(place) % CHUNK == 1).all()


def test_mistakes_with_recordings(url: str) -> None:
    with LiveClient(url) as client:
        with pytest.raises(ServerError, match="no recording is running") as caught:
            client.command({"type": "record", "on": False})
        assert caught.value.code == "recording_failed"
        client.record()
        with pytest.raises(ServerError, match="running already"):
            client.record()
        with pytest.raises(ServerError, match="no frames"):
            client.command({"type": "record", "on": False})
    assert httpx.get(f"{url}/api/recordings/none.mp4").status_code == 404
    assert httpx.get(f"{url}/api/recordings/..%2Fx.mp4").status_code == 404


def test_a_recording_ends_by_itself_when_it_is_full(make_app: Make, serve: Serve) -> None:
    url = serve(make_app(recording_seconds=0.25))
    with LiveClient(url) as client:
        client.start("a", sample="00.png")
        client.record()
        event = hears(client, "recorded")
        assert event["frames"] == 40
        assert event["reason"] == "it is as long as allowed"
        reply = httpx.get(f"{url}/{event['url']}")
        assert reply.headers["content-type"] == "video/mp4"


def test_a_session_deletes_its_own_oldest_recordings_only(make_app: Make, serve: Serve) -> None:
    app = make_app(recordings=2)
    url = serve(app)

    def record(client: LiveClient) -> str:
        client.record()
        lives = app.state.hub.sessions.values()
        assert until(lambda: any(x._recorder is not None and x._recorder.frames for x in lives))
        return str(client.command({"type": "record", "on": False})["url"])

    def there(*names: str) -> list[bool]:
        return [httpx.get(f"{url}/{name}").status_code == 200 for name in names]

    with LiveClient(url) as quiet:
        quiet.start("a", sample="00.png")
        kept = record(quiet)
        with LiveClient(url) as rough:
            rough.start("a", sample="00.png")
            names = [record(rough) for _ in range(4)]
            assert there(kept, *names) == [True, False, False, True, True]
        assert until(lambda: len(app.state.hub.sessions) == 1)
        assert there(kept, *names) == [True, False, False, True, True]  # may still be fetched
        quiet.record()
        take(quiet, 5)
    # Of those that ended together the newest two; what was not finished has no name to be had.
    # A session leaves the list before its last file is closed: files are what to wait for.
    assert until(lambda: there(kept, *names) == [True, False, False, False, True])
    assert not app.state.hub.sessions
    assert until(lambda: len(list(app.state.hub.recordings.glob("*.mp4"))) == 2)


def test_a_recording_that_the_encoder_cut_says_so(
    make_app: Make, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "BACKLOG", 2)
    real = recorder.Recorder._frames

    def slow(self: Any) -> Any:
        for frame in real(self):
            time.sleep(0.2)
            yield frame

    monkeypatch.setattr(recorder.Recorder, "_frames", slow)
    with LiveClient(serve(make_app())) as client:
        client.start("a", sample="00.png")
        client.record()
        event = hears(client, "recorded")
        assert event["reason"] == "the encoder could not keep up"
        assert event["frames"] < 20


def test_a_session_that_nobody_uses_ends(make_app: Make, serve: Serve) -> None:
    app = make_app(idle_seconds=1.5)
    with LiveClient(serve(app)) as idle, LiveClient(idle.url) as paused, LiveClient(idle.url) as on:
        for client in (paused, on):
            client.start("a", sample="00.png")
        take(paused, 5)
        paused.record()
        take(paused, 5)
        paused.pause()
        assert "no video ran for" in hears(idle, "ended")["reason"]
        assert hears(paused, "recorded")["frames"] > 0
        hears(paused, "ended")
        assert until(lambda: len(app.state.hub.sessions) == 1)
        assert [f.number for f in take(on, 400)] == list(range(400))  # 2.5 s of video


# -- one shot -------------------------------------------------------------------------------------


def test_one_shot_gives_an_mp4_with_the_right_frames(url: str, tmp_path: Path) -> None:
    for form, files in (
        ({"sample": "00.png"}, None),
        ({}, {"image": ("x.png", png(), "image/png")}),
    ):
        reply = httpx.post(
            f"{url}/api/generate", data={"prompt": "ab", "chunks": "3", **form}, files=files
        )
        assert reply.status_code == 200, reply.text
        (tmp_path / "x.mp4").write_bytes(reply.content)
        assert len(read_video(tmp_path / "x.mp4")) == 3 * CHUNK


@pytest.mark.parametrize(
    "data, files, status, code",
    [
        ({"prompt": "a"}, None, 422, "bad_image"),
        ({"prompt": "a", "sample": "x"}, None, 422, "bad_value"),
        ({"sample": "00.png"}, None, 422, "bad_value"),
        ({"prompt": "a", "sample": "00.png", "chunks": "0"}, None, 422, "bad_value"),
        ({"prompt": "a", "sample": "00.png", "chunks": "31"}, None, 422, "bad_value"),
        ({"prompt": "a"}, {"image": ("x.png", b"", "image/png")}, 422, "bad_image"),
        ({"prompt": "a"}, {"image": ("x.png", png()[:60], "image/png")}, 422, "bad_image"),
        ({"prompt": "a"}, {"image": ("x.svg", b"<svg/>", "image/png")}, 422, "bad_image"),
        ({"prompt": "a"}, {"image": ("x.png", bytes(9_000_000), "image/png")}, 413, "too_large"),
        ({"prompt": "a"}, {"image": ("x.png", png(4001, 4001), "image/png")}, 413, "too_large"),
    ],
)  # fmt: skip
def test_bad_requests_are_answered_in_words(
    url: str, data: Any, files: Any, status: int, code: str
) -> None:
    reply = httpx.post(f"{url}/api/generate", data=data, files=files)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert "\n" not in reply.json()["message"]


def test_only_one_one_shot_at_a_time(make_app: Make, serve: Serve) -> None:
    gate = threading.Event()
    gate.set()
    url = serve(make_app(FakeModel(lambda: gate.wait(10) and None, fps=160.0)))
    gate.clear()
    replies: list[int] = []

    def post() -> None:
        data = {"prompt": "a", "sample": "00.png"}
        replies.append(httpx.post(f"{url}/api/generate", data=data, timeout=20).status_code)

    threads = [threading.Thread(target=post) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert until(lambda: len(replies) == 1)
    gate.set()
    for thread in threads:
        thread.join()
    assert replies == [429, 200]


# -- readiness, tokens, origins -------------------------------------------------------------------


def test_ready_only_after_warm_up(make_app: Make) -> None:
    gate, app, seen = threading.Event(), None, {}
    app = make_app(FakeModel(lambda: gate.wait(10) and None, fps=160.0))

    def probe() -> None:
        from aad1.serve import run

        while not bound:
            time.sleep(0.01)
        address = run.address(bound[0])
        seen["health"] = httpx.get(f"{address}/health").status_code
        seen["ready"] = httpx.get(f"{address}/ready").status_code
        try:
            LiveClient(address)
        except ServerError as error:
            seen["socket"] = error.code
        gate.set()

    from aad1.serve import run

    bound: list[Any] = []
    real = run.bind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "bind", lambda *a: bound.append(real(*a)) or bound[0])
        thread = threading.Thread(target=probe)
        thread.start()
        with background(app) as url:
            thread.join()
            assert seen == {"health": 200, "ready": 503, "socket": "not_ready"}
            assert httpx.get(f"{url}/ready").status_code == 200
            LiveClient(url).close()


def test_a_model_that_cannot_warm_up_stops_the_server(
    make_app: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with (
        pytest.raises(UserError, match="did not become ready"),
        background(make_app(FakeModel(fail))),
    ):
        pass
    assert "aad1: the model could not warm up: out of memory" in capfd.readouterr().err


def test_a_chunk_that_fails_ends_the_video_and_not_the_server(make_app: Make, serve: Serve) -> None:
    failing = threading.Event()

    def wait() -> None:
        if failing.is_set():
            raise RuntimeError("boom")

    url = serve(make_app(FakeModel(wait, fps=160.0)))
    with LiveClient(url) as client:
        client.start("a", sample="00.png")
        take(client, 20)
        failing.set()
        assert hears(client, "error")["code"] == "internal"
        failing.clear()
        client.start("a", sample="00.png")
        assert next(f for f in client.frames() if f.generation > 1).number == 0


def test_a_token_guards_all_but_the_page(make_app: Make, serve: Serve, tmp_path: Path) -> None:
    url = serve(make_app(token="open sesame"))
    for path, status in (("/", 200), ("/app.js", 200), ("/health", 200), ("/api/info", 401)):
        assert httpx.get(url + path).status_code == status
    bearer = {"Authorization": "Bearer open sesame"}
    assert httpx.get(f"{url}/api/info", headers=bearer).status_code == 200
    assert httpx.get(f"{url}/api/info?token=open+sesame").status_code == 200
    assert httpx.get(f"{url}/api/info?token=open").status_code == 401
    assert httpx.post(f"{url}/api/generate", data={"prompt": "a"}).status_code == 401
    assert httpx.get(f"{url}/api/info", headers={"Host": "example.org", **bearer}).is_success
    for token in (None, "wrong"):
        with pytest.raises(UserError, match="403"):
            LiveClient(url, token=token)
    with LiveClient(url, token="open sesame") as client:
        client.start("a", sample="00.png")
        client.record()
        take(client, 20)
        assert client.save_recording(tmp_path / "x.mp4") > 0


def test_other_sites_are_refused(url: str) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    host = url.removeprefix("http://")
    evil = {"Origin": "http://evil.example"}
    assert httpx.get(f"{url}/api/info", headers=evil).status_code == 403
    assert httpx.post(f"{url}/api/generate", data={"prompt": "a"}, headers=evil).status_code == 403
    assert httpx.get(f"{url}/api/info", headers={"Origin": f"http://{host}"}).status_code == 200
    # a name of another site that was pointed at this machine
    rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert httpx.get(f"{url}/api/info", headers=rebound).status_code == 403
    with (
        pytest.raises(InvalidStatus, match="403"),
        connect(f"ws://{host}/ws", additional_headers=evil, proxy=None),
    ):
        pass
    with connect(f"ws://{host}/ws", additional_headers={"Origin": url}, proxy=None) as socket:
        assert "hello" in str(socket.recv())


def test_the_page_loads_nothing_from_elsewhere(url: str) -> None:
    reply = httpx.get(url)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for path in ("/", "/app.js", "/style.css"):
        text = httpx.get(url + path).text
        assert "https://" not in text
        assert "//cdn" not in text
    assert httpx.get(f"{url}/docs").status_code == 404
    assert httpx.get(f"{url}/openapi.json").json()["paths"]["/api/generate"]


def test_rates_are_limited() -> None:
    now = [0.0]
    bucket = Bucket(10, 5, lambda: now[0])
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]
    now[0] = 0.25
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] = 100
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]


def test_too_many_messages_or_pictures_are_refused(make_app: Make, serve: Serve) -> None:
    url = serve(make_app(messages_per_second=5, images_per_minute=12))
    with LiveClient(url) as client:
        codes = []
        for _ in range(4):
            try:
                client.start("a", image=np.zeros((8, 8, 3), np.uint8))
                codes.append("ok")
            except ServerError as error:
                codes.append(error.code)
        assert codes == ["ok", "ok", "rate_limited", "rate_limited"]
        for _ in range(30):
            client._socket.send('{"type": "ping"}')
        assert hears(client, "error")["code"] == "rate_limited"
