"""Measure `aad1 serve` as a client sees it: rate, latency of switches, memory over time, load.

    python runs/measure_live.py --minutes 10            # one session; memory must not grow
    python runs/measure_live.py --minutes 1 --sessions 4

Starts a server of its own on this machine, drives it over the loopback and prints a table. Exit
code 1 if memory grew by more than 5% (or 20 MiB) after the first minute.
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

from aad1.serve.client import LiveClient, ServerError

KEYS = ("turn left", "turn right", "walk forward", "turn left while walking", "stand still")


@dataclass
class Seen:
    """What one client saw."""

    frames: int = 0
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    missing: int = 0
    stats: dict[str, float] = field(default_factory=dict)


def drive(url: str, seconds: float, seed: int, seen: Seen) -> None:
    """One session: a switch every 2 to 4 seconds, at random times within a chunk."""
    rng = random.Random(seed)
    with LiveClient(url) as client:
        samples = list(client.hello["info"]["samples"])
        client.start(KEYS[0], sample=samples[seed % len(samples)], seed=seed)
        frames = client.frames()
        first = previous = next(frames)
        due, pending = first.received + 3, None
        for frame in frames:
            seen.frames += 1
            seen.missing += frame.number - previous.number - 1
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
        seen.seconds = previous.received - first.received
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
    url = server.stdout.readline().split()[2]
    wait_ready(server, url)
    seen = [Seen() for _ in range(args.sessions)]
    threads = [
        threading.Thread(target=drive, args=(url, 60 * args.minutes, k, seen[k]))
        for k in range(args.sessions)
    ]
    used: list[tuple[float, float]] = []
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        used.append((time.perf_counter() - began, memory(server.pid)))
        time.sleep(1)
    refused = _refusal(url, args.sessions) if args.sessions > 1 else ""
    server.terminate()
    server.wait(20)
    for k, s in enumerate(seen):
        gaps = sorted(s.gaps)
        worst = max(s.latencies, default=float("nan"))
        print(
            f"session {k}: {s.frames} frames in {s.seconds:.0f} s, {s.frames / s.seconds:.2f} "
            f"frames/s; gap median {1000 * median(gaps):.0f}, p99 "
            f"{1000 * gaps[int(0.99 * len(gaps))]:.0f} ms; {s.missing} missing; "
            f"{len(s.latencies)} switches, median {median(s.latencies or [0]):.2f}, worst "
            f"{worst:.2f} s; server: speed {s.stats.get('speed')}, chunk {s.stats.get('chunk_ms')} "
            f"ms (network {s.stats.get('dit_ms')}, decode {s.stats.get('decode_ms')}), "
            f"{s.stats.get('stalls')} stalls"
        )
    early = [m for t, m in used if t < 60] or [used[0][1]]
    late = [m for t, m in used if t >= used[-1][0] - 60]
    print(f"memory: {max(early):.0f} MiB at most in the first minute, {max(late):.0f} in the last")
    if refused:
        print(refused)
    return int(max(late) > max(early) + max(20, 0.05 * max(early)))


def _refusal(url: str, sessions: int) -> str:
    """What the client after the last one is told."""
    clients = [LiveClient(url) for _ in range(sessions)]
    try:
        LiveClient(url)
    except ServerError as error:
        return f"client {sessions + 1}: {error.code}: {error}"
    finally:
        for client in clients:
            client.close()
    return f"client {sessions + 1} was let in"


if __name__ == "__main__":
    sys.exit(main())
