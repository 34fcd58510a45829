"""The page in headless Chromium, with the packaged doom model."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aad1.media.reading import read_video
from aad1.model_names import PACKAGED
from aad1.pipeline import Pipeline
from aad1.serve.facts import Facts, read_facts
from aad1.serve.model import PipelineModel
from aad1.serve.run import background
from aad1.serve.server import create_app
from browser.find import find_browser
from serve_fakes import FakeModel

BROWSER = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser was found"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pipeline = Pipeline.from_pretrained("doom")
    app = create_app(PipelineModel(pipeline), read_facts("doom", pipeline))
    with background(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 860}, accept_downloads=True)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on(
        "request", lambda r: None if r.url.startswith((url, "blob:")) else problems.append(r.url)
    )
    page.goto(url)
    page.wait_for_selector("#start:enabled")
    yield page
    page.close()
    assert problems == []  # nothing failed, and nothing was asked of any other host


def drop(page: Any, path: Path) -> None:
    """Drop a file onto the picture, as a user does with the mouse."""
    data = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([name, data]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [path.name, data],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def seen(page: Any, name: str) -> Any:
    return page.evaluate(f"window.aad1.{name}")


def wait(page: Any, name: str, at_least: float, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while seen(page, name) < at_least:
        assert time.monotonic() < end, f"{name} stays at {seen(page, name)}"
        page.wait_for_timeout(50)


def wait_for_prompt(page: Any, words: str, seconds: float = 30) -> None:
    """The page forbids eval, which Playwright's own waiting for an expression uses."""
    end = time.monotonic() + seconds
    while (shown := page.input_value("#prompt")) != words:
        assert time.monotonic() < end, f"the prompt stays at {shown!r}"
        page.wait_for_timeout(50)


def pixels(page: Any) -> list[int]:
    """The picture that is on the screen."""
    return page.evaluate(
        """() => { const c = document.getElementById("screen");
        return Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data); }"""
    )


def test_drop_steer_record_download(page: Any, tmp_path: Path) -> None:
    drop(page, PACKAGED / "doom_frames" / "03.png")
    wait(page, "frames", 1)
    first = pixels(page)
    wait(page, "frames", 12)
    assert pixels(page) != first

    page.click("#record")
    page.wait_for_selector("#record.on")
    steer = seen(page, "steer")
    page.keyboard.press("ArrowRight")
    wait(page, "steer", steer + 1)
    assert page.input_value("#prompt") == "turn right"
    assert len(seen(page, "latencies")) == 1
    page.fill("#prompt", "walk forward")
    page.press("#prompt", "Enter")
    wait(page, "steer", steer + 2)

    page.click("#pause")
    page.wait_for_selector("#pause:has-text('Resume')")
    page.wait_for_timeout(300)
    frames = seen(page, "frames")
    page.wait_for_timeout(400)
    assert seen(page, "frames") == frames
    page.click("#record")
    page.wait_for_selector("#download:visible")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "shown.mp4")
    video = read_video(tmp_path / "shown.mp4")
    promised = int(page.inner_text("#download").split("(")[1].split()[0])
    assert len(video) == promised > 16

    page.click("#pause")
    wait(page, "frames", frames + 8)
    page.click("#reset")
    page.wait_for_timeout(1500)
    assert seen(page, "number") < frames
    page.click("#stop")
    page.wait_for_selector("#pause:disabled")


def test_keys_mean_what_they_say_after_clicks_and_releases(page: Any) -> None:
    page.click("#start")
    wait(page, "frames", 4)
    page.evaluate("""() => {
        const real = WebSocket.prototype.send;
        window.sent = [];
        WebSocket.prototype.send = function (text) {
            window.sent.push(JSON.parse(text).type); real.call(this, text);
        };
    }""")
    page.keyboard.press("Space")  # stand still, and not Start again
    wait_for_prompt(page, "stand still")
    assert page.get_attribute("#keys [data-key=still]", "aria-pressed") == "true"
    page.keyboard.down("ArrowUp")
    page.keyboard.down("ArrowLeft")
    assert page.input_value("#prompt") == "turn left while walking"
    page.keyboard.up("ArrowLeft")  # the other one is still held
    assert page.input_value("#prompt") == "walk forward"
    page.keyboard.up("ArrowUp")
    assert page.input_value("#prompt") == "walk forward"
    assert page.evaluate("window.sent") == ["prompt"] * 4
    page.focus("#stop")
    page.keyboard.press("Enter")  # who uses the keyboard keeps the focus
    assert page.evaluate("document.activeElement.id") in ("stop", "")
    page.wait_for_selector("#pause:disabled")


def test_a_file_dropped_beside_the_picture_leaves_the_page_alone(page: Any) -> None:
    left = page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["x"], "x.png", { type: "image/png" }));
            const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true,
              cancelable: true });
            return document.querySelector("header").dispatchEvent(event);
        }"""
    )
    assert not left  # dispatchEvent: false if the default was prevented


def test_without_the_token_the_page_says_so(browser: Any) -> None:
    pipeline = Pipeline.from_pretrained("doom")
    app = create_app(PipelineModel(pipeline), read_facts("doom", pipeline), token="open sesame")
    with background(app) as url:
        page = browser.new_page()
        for query, word in (("", "missing"), ("?token=other", "wrong")):
            page.goto(url + query)
            page.wait_for_selector(f"#status.bad:has-text('address is {word}')")
        page.goto(f"{url}?token=open%20sesame")
        page.wait_for_selector("#start:enabled")
        page.close()


def test_the_rate_on_the_page_has_the_stalls_in_it(browser: Any) -> None:
    """A chunk of 1 s takes 2 s: eight frames a second, whatever the bursts."""
    facts = Facts(
        name="slow", world="fake", width=16, height=16, fps=16.0, chunk_frames=16,
        text_to_video=True,
    )  # fmt: skip
    slow = threading.Event()
    model = FakeModel(lambda: time.sleep(2.0 if slow.is_set() else 0))
    with background(create_app(model, facts)) as url:
        slow.set()
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#start:enabled")
        page.click("#start")
        wait(page, "frames", 17)
        page.wait_for_timeout(2000)
        rates = []
        for _ in range(20):
            page.wait_for_timeout(300)
            rates.append(seen(page, "fps"))
        page.close()
    assert sum(rates) / len(rates) == pytest.approx(8, rel=0.3)
    assert max(rates) < 12  # the last 3 s have at most two chunks


def test_a_server_that_falls_silent_is_noticed(page: Any) -> None:
    page.evaluate("JSON.parse = () => ({ type: 'nothing' })")  # no message says anything
    page.wait_for_selector("#status.bad:has-text('the server has sent nothing for')")


def test_every_control_has_a_name_and_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360  # nothing is cut off at the side
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    roles = ("button", "textbox", "combobox", "spinbutton", "link", "image", "group")
    nodes = [n for n in tree["nodes"] if n.get("role", {}).get("value") in roles]
    nodes = [n for n in nodes if not n["ignored"]]
    names = [n.get("name", {}).get("value", "") for n in nodes]
    assert len(names) > 25
    assert all(names), [n["role"]["value"] for n in nodes if not n.get("name", {}).get("value")]
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["width"] >= 40 and box["height"] >= 40  # large enough for a finger


def test_what_is_no_picture_is_said_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    drop(page, tmp_path / "notes.txt")
    page.wait_for_selector("#status.bad:has-text('notes.txt is not a picture')")


def test_a_viewer_watches_and_cannot_steer(page: Any, browser: Any) -> None:
    page.click("#start")
    wait(page, "frames", 2)
    link = page.get_attribute("#share a", "href")
    viewer = browser.new_page()
    viewer.goto(link)
    wait(viewer, "frames", 5)
    assert viewer.is_disabled("#start") and viewer.is_disabled("#record")
    assert viewer.is_hidden("#keys")
    viewer.keyboard.press("ArrowLeft")  # not this viewer's to say
    page.keyboard.press("ArrowRight")
    wait_for_prompt(viewer, "turn right")
    assert viewer.is_hidden("#status.bad")
    viewer.close()
