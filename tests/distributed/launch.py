"""Start a job of `jobs.py` in several processes, as torchrun would; collect what they return."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

JOBS = Path(__file__).with_name("jobs.py")
SOURCE = Path(__file__).parents[2] / "src"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "TORCH_SHOW_CPP_STACKTRACES": "0",
    }


def start(size: int, job: str, folder: Path, /, **arguments: Any) -> list[subprocess.Popen[str]]:
    """The processes of a job, running; each writes its result to folder/<rank>.pt."""
    return spawn(size, [sys.executable, str(JOBS), job, str(folder), json.dumps(arguments)])


def aad1(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The command line in several processes, running."""
    return spawn(size, [sys.executable, "-m", "aad1.cli", *arguments])


def spawn(size: int, command: list[str]) -> list[subprocess.Popen[str]]:
    port = str(free_port())
    started = []
    for rank in range(size):
        env = environment()
        if size > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        started.append(
            subprocess.Popen(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """(exit code, output) of each; none is left running."""
    end = time.monotonic() + timeout
    out = []
    try:
        for process in started:
            text, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            out.append((process.returncode, text))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return out


def launch(size: int, job: str, /, **arguments: Any) -> list[Any]:
    """Run a job to its end and return the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        for code, text in finish(start(size, job, Path(folder), **arguments)):
            assert code == 0, text
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(size)]
