"""`aad1 serve`: what a user can get wrong, the self-test, and the examples."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aad1.cli import main
from aad1.errors import UserError
from aad1.media.reading import read_video
from aad1.model_names import PACKAGED
from aad1.serve import command
from aad1.serve.client import LiveClient
from aad1.serve.run import background
from aad1.serve.selftest import selftest
from serve_fakes import FakeModel

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere: it needs --token"),
        (["--host", "example.org"], "needs --token"),
        (["--token", "short"], "--token must have at least 8 characters, got 5"),
        (["--port", "70000"], "--port must be in 0..65535, got 70000"),
        (["--port", "0", "--model", "dom"], "did you mean 'doom'?"),
        (["--port", "0", "--max-sessions", "0"], "sessions must be a finite number above 0, got 0"),
        (
            ["--port", "0", "--max-recording", "inf"],
            "--max-recording must be a finite number",
        ),
        (["--port", "0", "--max-image-mb", "nan"], "--max-image-mb must be a finite number above"),
        (["--port", "0", "--max-idle", "-1"], "--max-idle must be a finite number above 0, got -1"),
        (["--port", "0", "--quality", "0"], "quality must be in 1..100, got 0"),
        (["--port", "0", "--threads", "-1"], "--threads must be at least 0, got -1"),
        (["--port", "0", "--device", "tpu"], "device must be auto, cpu, cuda or mps, got 'tpu'"),
        (["--port", "0", "--plain", "--fp8"], "--plain leaves the fast path out"),
        (["--port", "0", "--without", "speed"], "no part 'speed' of the fast path"),
        (["--port", "0", "--decoder", "x.pth"], "a tiny decoder is for Wan 2.1's latents"),
        (["--host", "192.0.2.1", "--token", "12345678"], "cannot listen on 192.0.2.1 port 8000"),
    ],
)
def test_mistakes_end_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in error
    assert "--port" in error
    assert error.count("\n") == 1


def test_the_address_that_is_printed_can_be_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_app", lambda args: SimpleNamespace())
    stopped = SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr("aad1.serve.run.uvicorn_server", lambda app: stopped)
    with pytest.raises(AttributeError):  # of an application that is none
        main(["serve", "--port", "0", "--host", "0.0.0.0", "--token", "a&b c#/%"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("aad1 live: http://127.0.0.1:")
    assert "/?token=a%26b%20c%23%2F%25  (on all addresses of this machine; " in line


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "NEEDED", ("fastapi", "no_such_package"))
    assert main(["serve"]) == 2
    assert "needs no_such_package: pip install 'aad1[serve]'" in capsys.readouterr().err


def test_no_browser_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    command._open_browser("http://127.0.0.1:1")
    assert capsys.readouterr().err == (
        "aad1: no browser was found; open http://127.0.0.1:1 in one\n"
    )


class Broken(FakeModel):
    """Frames that do not move."""

    def generate(self, point: Any, text: Any) -> Any:
        made = super().generate(point, text)
        made.frames[...] = 7
        return made


def test_the_self_test_passes_and_can_fail(make_app: Callable[..., Any]) -> None:
    lines = selftest(make_app(FakeModel(fps=160.0)), ("go", "a" * 200))
    assert "161 frames" in lines[0]
    assert lines[-1] == "shutdown clean"
    with pytest.raises(UserError, match="does not move"):
        selftest(make_app(Broken(fps=160.0)), ("go", "stop"))


class Continuing(FakeModel):
    """Begins with a picture, as a model for which none are packaged."""

    def begin(self, image: Any, seed: int) -> Any:
        if image is None:
            raise UserError("this model continues an image")
        return super().begin(image, seed)


def test_the_self_test_makes_a_picture_where_there_is_no_sample(
    make_app: Callable[..., Any],
) -> None:
    app = make_app(Continuing(fps=160.0), sampled=False)
    assert "161 frames" in selftest(app, ("go", "a" * 200))[0]


class Leaving(FakeModel):
    """Leaves a thread behind."""

    def encode(self, prompt: str) -> Any:
        threading.Thread(target=time.sleep, args=(8,), name="left", daemon=True).start()
        return super().encode(prompt)


def test_the_self_test_sees_threads_that_are_left(make_app: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="threads are left: left"):
        selftest(make_app(Leaving(fps=160.0)), ("go", "a" * 200))


def test_a_server_that_stops_waits_for_the_chunk_in_the_making(
    make_app: Callable[..., Any],
) -> None:
    before = set(threading.enumerate())
    making = threading.Event()

    def wait() -> None:
        making.set()
        time.sleep(0.5)

    with background(make_app(FakeModel(wait, fps=160.0))) as url, LiveClient(url) as client:
        making.clear()
        client.start("a", sample="00.png")
        assert making.wait(5)
    assert set(threading.enumerate()) <= before


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_display_a_stream_becomes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TclError(Exception):
        pass

    def tk() -> None:
        raise TclError("no display name and no $DISPLAY environment variable")

    fake = ModuleType("tkinter")
    fake.TclError, fake.Tk = TclError, tk  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tkinter", fake)
    picture = str(PACKAGED / "sprites_frames" / "00.png")
    flags = ["--model", "sprites", "--image", picture, "--seconds", "1"]
    monkeypatch.setattr(sys, "argv", ["stream", *flags])
    monkeypatch.chdir(tmp_path)
    example("stream").main()
    assert len(read_video(tmp_path / "out" / "stream.mp4")) > 4
    monkeypatch.setitem(sys.modules, "tkinter", None)  # not installed
    assert not example("stream").has_window()


@pytest.mark.parametrize(
    "name, flags, frames",
    [
        ("stream", ["--seconds", "2"], 9),
        ("environment", ["--actions", "left", "right"], 9),
        ("switch_prompts", ["--seconds", "0.5"], None),
    ],
)
def test_the_examples_run(
    name: str, flags: list[str], frames: int | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the sprites model, which is small: its chunks have 4 frames."""
    out = tmp_path / "x.mp4"
    picture = ["--image", str(PACKAGED / "sprites_frames" / "00.png")]
    flags = ["--model", "sprites", "--out", str(out), *flags]
    monkeypatch.setattr(sys, "argv", [name, *flags, *(picture if name != "switch_prompts" else [])])
    example(name).main()
    count = len(read_video(out))
    assert count == frames if frames is not None else count > 4
