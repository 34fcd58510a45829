"""An mp4 of the frames that were shown, written by a thread while they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from aad1.errors import UserError
from aad1.media.writing import write_video
from aad1.serve.model import Pixels

BACKLOG = 128
"""Frames that may wait for the encoder."""


class Recorder:
    """add() frames, then finish(). Memory stays constant; the file appears when it is complete."""

    def __init__(self, path: Path, fps: float, most_frames: int) -> None:
        self.path, self.most_frames = path, most_frames
        self.frames = 0
        self._queue: queue.Queue[Pixels | None] = queue.Queue(BACKLOG)
        self._error: UserError | None = None
        self._thread = threading.Thread(target=self._write, args=(fps,), daemon=True)
        self._thread.start()

    def _write(self, fps: float) -> None:
        try:
            write_video(self.path, self._frames(), fps)
        except Exception as error:  # of a codec or a disk: whatever it is, the user is told
            self._error = UserError(f"the recording could not be written: {error}")

    def _frames(self) -> Iterator[Pixels]:
        while (frame := self._queue.get()) is not None:
            yield frame

    @property
    def full(self) -> bool:
        """Whether it is as long as allowed."""
        return self.frames >= self.most_frames

    def add(self, pixels: Pixels) -> bool:
        """Take one frame; False if the recording cannot go on: it is full, or the disk is slow."""
        if self.full or self._error is not None:
            return False
        try:
            self._queue.put_nowait(pixels)
        except queue.Full:
            return False
        self.frames += 1
        return True

    def finish(self) -> int:
        """Wait for the file and return its number of frames. UserError if there is none."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.frames
