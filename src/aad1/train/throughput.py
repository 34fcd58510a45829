"""How fast a run trains, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from aad1.parallel.mesh import Processes
from aad1.train.loop import Trainer


class Throughput:
    """Clips of the global batch per second of training steps, and seconds waited for data.

    Validation, sample sheets and checkpoints do not count. Of several processes the one that waited
    longest counts, since the others then wait for it.
    """

    def __init__(self, trainer: Trainer, processes: Processes) -> None:
        self.trainer, self.processes = trainer, processes
        self._seconds = 0.0
        self._position, self._waited = trainer.position, trainer.reader.waited
        self.clips, self.seconds, self.waited = 0, 0.0, 0.0
        """Of the whole run, up to the last `take`."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """What happens within is training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - began

    def take(self) -> dict[str, float]:
        """Numbers since the last call, nothing if there was no step; call it in all processes."""
        clips, seconds = self.trainer.position - self._position, self._seconds
        waited = max(self.processes.gather(self.trainer.reader.waited - self._waited))
        self._seconds = 0.0
        self._position, self._waited = self.trainer.position, self.trainer.reader.waited
        self.clips += clips
        self.seconds += seconds
        self.waited += waited
        return {"clips_per_s": clips / seconds, "data_wait_s": waited} if clips else {}

    def summary(self) -> str:
        """The whole run in a few words; call it in all processes."""
        self.take()
        if not self.clips:
            return ""
        return (
            f"; {self.clips / self.seconds:.3g} clips/s, of {self.seconds:.0f} s in training steps "
            f"{self.waited:.2g} s waited for data"
        )
