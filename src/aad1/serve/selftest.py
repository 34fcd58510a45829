"""`aad1 serve --selftest`: a client on this machine drives ten chunks and checks what comes."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from aad1.errors import UserError
from aad1.serve.client import LiveClient
from aad1.serve.model import Pixels
from aad1.serve.run import background

if TYPE_CHECKING:
    from fastapi import FastAPI

CHUNKS = 10


def _plain_picture(width: int, height: int) -> Pixels:
    """uint8 [height, width, 3]: grey, from dark on the left to light on the right."""
    ramp = np.linspace(64, 192, width).astype(np.uint8)
    return np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()


def selftest(app: FastAPI, prompts: tuple[str, str]) -> list[str]:
    """Ten chunks with a switch in the fifth. Returns lines to print; UserError names what failed.

    Checked: every frame arrives once and in order, frames move, the switch is seen within 2.2
    chunks (if the model is fast enough), the rate is the native one or the server says that it is
    slower, and the server stops and leaves no thread.
    """
    hub = app.state.hub
    facts = hub.facts
    length = facts.chunk_frames / facts.fps
    threads = set(threading.enumerate())
    with background(app) as url, LiveClient(url) as client:
        sample = next(iter(facts.samples), None)
        needed = sample is None and not facts.text_to_video
        image = _plain_picture(facts.width, facts.height) if needed else None
        began = time.perf_counter()
        client.start(prompts[0], image=image, sample=sample)
        total = CHUNKS * facts.chunk_frames + 1
        switch = total // 2
        frames, asked, number, latency = [], 0.0, -1, None
        for frame in client.frames():
            frames.append(frame)
            if len(frames) == switch:
                asked, number = time.perf_counter(), client.steer(prompts[1])
            if number >= 0 and latency is None and frame.steer >= number:
                latency = frame.received - asked
            if len(frames) == total:
                break
        stats = client.stats
        client.stop()
    left = [t for t in threading.enumerate() if t not in threads]
    numbers = [frame.number for frame in frames]
    checks = {
        "frames missing, doubled or out of order": numbers == list(range(total)),
        "frames of a wrong size": all(
            f.pixels.shape == (facts.height, facts.width, 3) for f in frames
        ),
        "the picture does not move": any(
            abs(frames[-1].pixels.astype(int) - frames[0].pixels).max(axis=(0, 1)) > 8
        ),
        "the switch was never seen": latency is not None,
        f"threads are left: {', '.join(t.name for t in left)}": not left,
    }
    for problem, good in checks.items():
        if not good:
            raise UserError(f"self-test: {problem}")
    assert latency is not None
    gaps = [b.received - a.received for a, b in pairwise(frames)]
    fps, speed = 1 / mean(gaps), stats.get("speed") or 0.0
    if speed >= 1.2 and fps < 0.95 * facts.fps:
        raise UserError(f"self-test: {fps:.1f} frames/s at the client, {facts.fps:g} were possible")
    if speed >= 1.2 and latency > 2.2 * length:
        raise UserError(f"self-test: the switch took {latency:.2f} s, allowed {2.2 * length:.2f}")
    return [
        f"{total} frames in {frames[-1].received - began:.1f} s, each once and in order",
        f"{fps:.1f} frames/s at the client (native {facts.fps:g}); "
        f"gap median {1000 * median(gaps):.0f} ms, longest {1000 * max(gaps):.0f} ms",
        f"made at {speed:.2f}x real time: {stats['chunk_ms']:.0f} ms a chunk of "
        f"{1000 * length:.0f} ms (network {stats['dit_ms']:.0f}, decode {stats['decode_ms']:.0f}, "
        f"pack {stats['pack_ms']:.0f})",
        f"switch to its first frame: {latency:.2f} s ({latency / length:.2f} chunks)",
        "shutdown clean",
    ]
