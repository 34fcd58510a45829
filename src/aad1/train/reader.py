"""Batches for the training loop, read ahead of the computation where they come from disk.

Reading ahead changes no number: a batch is a function of its position in the stream, and a run's
position moves when a batch is used, not when it is read. What was read for positions that are then
not asked for (a run went on from a checkpoint) is dropped.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import torch

from aad1.stages.base import Batch
from aad1.train.sources import Source, Stored

PATIENCE = 5.0
"""Seconds that the end of a run waits for a read that is under way."""


@dataclass(frozen=True)
class _Ready:
    """A batch on the training device, once the copy that `event` stands for is done."""

    batch: Batch
    event: torch.cuda.Event | None = None


class Reader:
    """What a loop takes its batches from.

    A `Stored` source is read by a thread of its own, up to `depth` micro-batches ahead; on CUDA the
    thread also copies, from page-locked memory and on a stream of its own. A source in memory, or
    depth 0: batches are made when they are asked for, if they were not announced.

    waited: seconds that `batch` and `announce` have taken in all. To be closed (it is a context
    manager), which ends the thread.
    """

    def __init__(self, source: Source, device: torch.device, depth: int = 2) -> None:
        self.source, self.device = source, device
        self.depth = depth if isinstance(source, Stored) else 0
        self.waited = 0.0
        self._copies = _Copies(device)
        self._pending: deque[tuple[int, int, Future[_Ready]]] = deque()
        self._thread: _Thread | None = None
        self._announced: tuple[int, int, Batch] | None = None

    def announce(self, position: int, count: int) -> None:
        """The batch that will be asked for next. Unless it is on a disk it is made now: on a device
        that computes by itself it is ready sooner if that is asked for before the host waits."""
        if not isinstance(self.source, Stored):
            began = time.monotonic()
            self._announced = (position, count, self.source.batch(position, count))
            self.waited += time.monotonic() - began

    def batch(self, position: int, count: int, following: Iterable[int] = ()) -> Batch:
        """Samples position .. position + count - 1; the positions after it are read meanwhile.

        What reading them raised, in the thread too, is raised here when this batch is asked for.
        """
        began = time.monotonic()
        try:
            if not self.depth:
                made, self._announced = self._announced, None
                if made is not None and made[:2] == (position, count):
                    return made[2]
                return self.source.batch(position, count)
            wanted = [position, *islice(following, self.depth)]
            ahead = [(p, n) for p, n, _ in self._pending]
            if ahead != [(p, count) for p in wanted[: len(ahead)]]:
                self._drop()
            for p in wanted[len(self._pending) :]:
                self._pending.append((p, count, self._submit(p, count)))
            return self._copies.receive(self._pending.popleft()[2].result())
        finally:
            self.waited += time.monotonic() - began

    def _submit(self, position: int, count: int) -> Future[_Ready]:
        if self._thread is None:
            self._thread = _Thread()
        source, copies = self.source, self._copies
        assert isinstance(source, Stored)
        return self._thread.submit(lambda: copies.send(source.read(position, count)))

    def _drop(self) -> None:
        for _, _, future in self._pending:
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """End the thread; a read that hangs (on a network disk, say) is not waited for long."""
        self._drop()
        if self._thread is not None:
            self._thread.end(PATIENCE)
            self._thread = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Thread:
    """Runs calls one after the other. Python's own executors would keep a program from ending as
    long as a call hangs."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[_Ready], Callable[[], _Ready]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="aad1-reader", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], _Ready]) -> Future[_Ready]:
        future: Future[_Ready] = Future()
        self._calls.put((future, call))
        return future

    def end(self, patience: float) -> None:
        self._calls.put(None)
        self._thread.join(patience)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # whoever waits for the batch must hear of it
                future.set_exception(error)
            del item, future, call  # no batch is held while waiting for the next call


class _Copies:
    """Copies to the training device: at once on the CPU, on a stream of their own on CUDA.

    Not beside the capture of a CUDA graph, which allocations of another thread would break: worlds
    on disk are `large`, and none is captured for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pin = True

    def send(self, batch: Batch) -> _Ready:
        """Begin the copy (in the reading thread)."""
        if self._stream is None:
            return _Ready(batch.to(self.device))
        with torch.cuda.stream(self._stream):
            # The pinned buffer is not used again before the copy is done: torch sees to that.
            return _Ready(
                batch.map(self._pinned).to(self.device, non_blocking=True),
                self._stream.record_event(),
            )

    def receive(self, ready: _Ready) -> Batch:
        """The batch, for kernels queued from now on (in the computing thread)."""
        if ready.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready.event)
            # Its memory belongs to the other stream, which must not reuse it while we compute.
            for tensor in (ready.batch.latents, ready.batch.trajectory):
                if tensor is not None:
                    tensor.record_stream(stream)
        return ready.batch

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._pin:
            try:
                return tensor.pin_memory()
            except RuntimeError as error:
                self._pin = False
                said = str(error).splitlines()[0]
                warnings.warn(f"no page-locked memory for batches: {said}", stacklevel=2)
        return tensor
