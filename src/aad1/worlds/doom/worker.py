"""A process that records shards, and the line protocol with it.

Worker processes are started with subprocess, not multiprocessing: nothing of the caller's
`__main__` is imported again, and a game that takes its process down is seen as an end of file.
The first line to a worker is the job, each further one "number clips"; it answers each of these
with "done" or "error MESSAGE".
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from contextlib import closing, suppress
from pathlib import Path

import aad1
from aad1.worlds.doom.clips import Recorder
from aad1.worlds.doom.job import Job, Shard

_PROGRAM = "from aad1.worlds.doom.worker import main; main()"


class Worker:
    """The parent's side of a worker process."""

    def __init__(self, job: Job) -> None:
        source = str(Path(aad1.__file__).resolve().parents[1])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        # The engine leaves its settings, and reports of crashes on exit, where it is started.
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self._folder.name,
        )
        self._last_words = "no message"
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self._send(job.to_json())

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._last_words = line.strip()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def record(self, shard: Shard) -> str | None:
        """Have a shard recorded and written; what went wrong, if anything did."""
        self._send(f"{shard.number} {shard.clips}")
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Whatever else a library prints, an answer is a line that begins with our word.
            if line.startswith("done"):
                return None
            if line.startswith("error "):
                return line.removeprefix("error ").strip()
        code = self._process.wait()
        self._reader.join(timeout=1)
        return f"the process ended with code {code}: {self._last_words}"

    @property
    def alive(self) -> bool:
        """Whether it can be given another shard."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process after the shard in hand."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._reader.join(timeout=1)
        self._folder.cleanup()


def main() -> None:
    """The worker's side: reads stdin, answers on stdout."""
    job = Job.from_json(sys.stdin.readline())
    with closing(Recorder(job.config)) as recorder:
        for line in sys.stdin:
            shard = Shard(*map(int, line.split()))
            try:
                job.write(shard, *recorder.shard(job.split, job.seed, *shard))
                answer = "done"
            except Exception as error:  # the parent decides what to do about it
                answer = f"error {type(error).__name__}: " + " ".join(str(error).split())
            print(answer, flush=True)
