"""What a run writes down: JSONL always, TensorBoard, and a bar or plain lines on the screen."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class RunLog:
    """log.jsonl and TensorBoard events in the run's folder; progress on the terminal.

    On a terminal a rich progress bar shows the last values; otherwise each logged update is one
    plain line.
    """

    def __init__(self, folder: Path, title: str, total: int, done: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.title, self.total = title, total
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._began = time.monotonic()
        self._board = _board(folder)
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, values="")
            self._bar.start()

    def values(self, update: int, values: dict[str, float], kind: str = "train") -> None:
        """Record numbers of one update."""
        seconds = round(time.monotonic() - self._began, 2)
        record = {"kind": kind, "update": update, "seconds": seconds, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, update)
        text = " ".join(f"{k} {v:.4g}" for k, v in values.items())
        if self._bar is not None:
            if kind != "train":
                self._bar.console.print(f"{self.title} {kind} {update}: {text}")
            self._bar.update(self._task, completed=update, values=text)
        else:
            print(f"{self.title} {kind} {update}/{self.total} {seconds:.0f}s {text}", flush=True)

    def advance(self, update: int) -> None:
        """Move the bar without recording anything."""
        if self._bar is not None:
            self._bar.update(self._task, completed=update)

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(text, flush=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        self._file.close()


class SilentLog(RunLog):
    """For processes beside the first one: nothing is written, nothing shown."""

    def __init__(self, folder: Path, title: str, total: int, done: int = 0) -> None:
        self.title, self.total = title, total

    def values(self, update: int, values: dict[str, float], kind: str = "train") -> None:
        pass

    def advance(self, update: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # logs are complete in JSONL; TensorBoard is a view on them
        return None
    return SummaryWriter(folder / "tensorboard")
