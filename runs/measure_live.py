"""Measure `aad1 serve` as a client sees it: rate, latency of switches, memory over time, load.

    python runs/measure_live.py --minutes 10            # one session; memory must not grow
    python runs/measure_live.py --minutes 1 --sessions 4

Starts a server of its own on this machine, drives it over the loopback and prints what was seen.
Exit code 1 if a goal was missed: no frame missing or doubled, and one client too many told that the
server is busy; with one session also the native rate within 1%, and switches of at most 1.5
(median) and 2.2 (worst) chunk durations; from two minutes on also memory that grew by at most 5%
(or 20 MiB) after the first one.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from aad1.errors import UserError
from aad1.serve.client import LiveClient, ServerError

KEYS = ("turn left", "turn right", "walk forward", "turn left while walking", "stand still")


RATE = 0.99
"""Of the native rate."""
MEDIAN, WORST = 1.5, 2.2
"""Chunk durations from a switch to its first frame."""


@dataclass
class Seen:
    """What one client saw."""

    frames: int = 0
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    missing: int = 0
    doubled: int = 0
    fps: float = 16.0
    chunk: float = 1.0
    """Seconds."""
    error: str = ""
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Frames a second, from the first to the last."""
        return self.frames / self.seconds if self.seconds else 0.0

    def step(self, number: int, previous: int) -> None:
        """Count what lies between two frames; one too few does not make up for one too many."""
        self.frames += 1
        self.missing += max(0, number - previous - 1)
        self.doubled += number <= previous


def drive(url: str, seconds: float, seed: int, seen: Seen) -> None:
    """One session: a switch every 2 to 4 seconds, at random times within a chunk."""
    try:
        _drive(url, seconds, seed, seen)
    except UserError as error:
        seen.error = str(error)


def _drive(url: str, seconds: float, seed: int, seen: Seen) -> None:
    rng = random.Random(seed)
    with LiveClient(url) as client:
        info = client.hello["info"]
        seen.fps, seen.chunk = info["fps"], info["chunk_frames"] / info["fps"]
        samples = list(client.hello["info"]["samples"])
        client.start(KEYS[0], sample=samples[seed % len(samples)], seed=seed)
        frames = client.frames()
        first = previous = next(frames)
        due, pending = first.received + 3, None
        for frame in frames:
            seen.step(frame.number, previous.number)
            seen.seconds = frame.received - first.received
            seen.gaps = [*seen.gaps[-4000:], frame.received - previous.received]
            previous = frame
            if pending is not None and frame.steer >= pending[0]:
                seen.latencies.append(frame.received - pending[1])
                pending = None
            if pending is None and frame.received > due:
                asked = time.perf_counter()
                pending = (client.steer(rng.choice(KEYS)), asked)
                due = asked + rng.uniform(2, 4)
            if frame.received - first.received > seconds:
                break
        seen.stats = client.stats


def memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def wait_ready(server: subprocess.Popen[str], url: str) -> None:
    while server.poll() is None:
        try:
            LiveClient(url).close()
            return
        except ServerError:
            time.sleep(0.2)
    raise SystemExit("the server ended before it was ready")


def summary(number: int, s: Seen) -> str:
    """A line of what one session saw."""
    gaps = sorted(s.gaps) or [float("nan")]
    latencies = s.latencies or [float("nan")]
    return (
        f"session {number}: {s.frames} frames in {s.seconds:.0f} s, {s.rate:.2f} frames/s; gap "
        f"median {1000 * median(gaps):.0f}, p99 {1000 * gaps[int(0.99 * len(gaps))]:.0f} ms; "
        f"{s.missing} missing, {s.doubled} doubled; {len(s.latencies)} switches, median "
        f"{median(latencies):.2f}, worst {max(latencies):.2f} s; server: speed "
        f"{s.stats.get('speed')}, chunk {s.stats.get('chunk_ms')} ms (network "
        f"{s.stats.get('dit_ms')}, decode {s.stats.get('decode_ms')}), "
        f"{s.stats.get('stalls')} stalls"
    )


def goals(seen: list[Seen], used: list[tuple[float, float]]) -> list[str]:
    """What was not met, one line each. Rate and latency are goals of one session only.

    used: (seconds since the beginning, MiB) of the server, once a second.
    """
    missed = [f"session {k} failed: {s.error}" for k, s in enumerate(seen) if s.error]
    missed += [
        f"session {k}: {s.missing} frames missing, {s.doubled} doubled"
        for k, s in enumerate(seen)
        if s.missing or s.doubled
    ]
    if len(seen) == 1 and not seen[0].error:
        s = seen[0]
        if s.rate < RATE * s.fps:
            missed.append(f"{s.rate:.2f} frames/s, the goal is {RATE * s.fps:.2f}")
        if not s.latencies:
            missed.append("no switch was seen")
        else:
            chunks = [latency / s.chunk for latency in s.latencies]
            if median(chunks) > MEDIAN:
                missed.append(f"switches: median {median(chunks):.2f} chunks, the goal is {MEDIAN}")
            if max(chunks) > WORST:
                missed.append(f"switches: worst {max(chunks):.2f} chunks, the goal is {WORST}")
    windows = memory_windows(used)
    if windows is not None:
        early, late = windows
        if late > early + max(20, 0.05 * early):
            missed.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
    return missed


def memory_windows(used: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Most MiB in the first and in the last minute; None if there were not two of them."""
    end = used[-1][0] if used else 0.0
    if end < 120:
        return None
    return max(m for t, m in used if t < 60), max(m for t, m in used if t >= end - 60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="doom")
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    command = [sys.executable, "-m", "aad1.cli", "serve", "--model", args.model, "--port", "0"]
    command += ["--threads", str(args.threads), "--max-sessions", str(args.sessions)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[2]
        wait_ready(server, url)
        seen, used, refused = measure(server.pid, url, args.sessions, 60 * args.minutes)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
    for k, s in enumerate(seen):
        print(summary(k, s))
    windows = memory_windows(used)
    if windows is None:
        most = max((m for _, m in used), default=0.0)
        print(f"memory: {most:.0f} MiB at most (whether it grows takes two minutes)")
    else:
        early, late = windows
        print(f"memory: {early:.0f} MiB at most in the first minute, {late:.0f} in the last")
    print(f"client {args.sessions + 1}, while the others run: {refused or 'was let in'}")
    missed = goals(seen, used)
    missed += [] if refused.startswith("busy") else ["one client too many was not told busy"]
    for line in missed:
        print(f"MISSED: {line}")
    print("all goals met" if not missed else f"{len(missed)} goals missed")
    return int(bool(missed))


def measure(
    pid: int, url: str, sessions: int, seconds: float
) -> tuple[list[Seen], list[tuple[float, float]], str]:
    """Drive all sessions. What they saw, the server's memory, what one client more was told."""
    seen = [Seen() for _ in range(sessions)]
    threads = [
        threading.Thread(target=drive, args=(url, seconds, k, seen[k]), daemon=True)
        for k in range(sessions)
    ]
    used: list[tuple[float, float]] = []
    refused: str | None = None
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        used.append((time.perf_counter() - began, memory(pid)))
        if refused is None and all(s.frames > 16 for s in seen):
            refused = one_more(url)
        time.sleep(1)
    return seen, used, refused or ""


def one_more(url: str) -> str:
    """What a client after the last one is told; nothing if it was let in."""
    try:
        LiveClient(url).close()
    except ServerError as error:
        return f"{error.code}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
