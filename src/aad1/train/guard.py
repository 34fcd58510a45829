"""What happens to runs: signals, two runs in one folder, a config that changed in between."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from aad1.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Ask a run to save and end: what clusters send before they take a machine away."""
LOCK = ".lock"


class Stopped(Exception):
    """A signal ended the run; it saved, and the same command goes on from there."""


class StopFlag:
    """Set by a signal, and nothing else is done then; a second one ends the program at once."""

    def __init__(self) -> None:
        self.name = ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Within, SIGTERM and SIGUSR1 set the flag."""
        try:
            before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        except ValueError:  # only the main thread may; another just does not listen
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; UserError names the run that holds it. It ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder} is being written by another run ({holder})") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


FREE = {
    "name", "out", "mesh", "device", "compile", "checkpoint_blocks", "log_every", "sample_every",
    "checkpoint_every", "max_minutes", "max_skipped", "accept_changes", "optim.updates",
    "stage.graph", "prefetch", "gather_bf16", "average_on_cpu", "moments_on_cpu", "cudnn_attention",
    "teacher", "init",  # known by their weights, not by where they lie
}  # fmt: skip
"""Settings that may be others when a run continues: they change no number, or how long it runs."""


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = FREE
) -> list[str]:
    """What differs between two configs as plain data, `field: old -> new`, but for `free`."""
    old, new = _flat(before), _flat(now)
    names = [n for n in dict.fromkeys([*old, *new]) if n not in free]
    return [
        f"{n}: {old.get(n, 'absent')} -> {new.get(n, 'absent')}"
        for n in names
        if old.get(n, "absent") != new.get(n, "absent")
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            out |= _flat(item, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = item
    return out
