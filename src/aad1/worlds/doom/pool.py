"""Worker processes side by side, each served by a thread of this process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from aad1.worlds.doom.job import Job, Shard
from aad1.worlds.doom.worker import Worker


def record_shards(
    job: Job, shards: Iterable[Shard], workers: int, finished: Callable[[Shard], None]
) -> str | None:
    """Record shards with up to `workers` processes, calling `finished` after each.

    A worker that dies is replaced, and its shard tried once more; a second death or any other
    error stops the recording after the shards in hand.

    Returns the first such error, if any.
    """
    todo = _Todo(shards, finished)
    threads = [
        threading.Thread(target=_attend, args=(job, todo))
        for _ in range(min(workers, len(todo.shards)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # such as Ctrl-C: the threads stop after the shard in hand
        todo.stop("interrupted")
        raise
    return todo.error


class _Todo:
    """The shards still to record, shared by the threads."""

    def __init__(self, shards: Iterable[Shard], finished: Callable[[Shard], None]) -> None:
        self.shards = deque(shards)
        self.error: str | None = None
        self._finished = finished
        self._died: set[Shard] = set()
        self._lock = threading.Lock()

    def take(self) -> Shard | None:
        with self._lock:
            return self.shards.popleft() if self.shards and self.error is None else None

    def stop(self, error: str) -> None:
        with self._lock:
            self.error = self.error or error

    def done(self, shard: Shard) -> None:
        with self._lock:
            self._finished(shard)

    def died(self, shard: Shard, error: str) -> None:
        with self._lock:
            if shard not in self._died:
                self._died.add(shard)
                self.shards.append(shard)
                return
        self.stop(f"{shard.name}, twice: {error}")


def _attend(job: Job, todo: _Todo) -> None:
    """Serve one worker, and its successors, for as long as there are shards."""
    worker: Worker | None = None
    try:
        while (shard := todo.take()) is not None:
            worker = worker or Worker(job)
            error = worker.record(shard)
            if error is None:
                todo.done(shard)
            elif worker.alive:  # the same shard would fail the same way again
                todo.stop(f"{shard.name}: {error}")
            else:
                worker.close()
                worker = None
                todo.died(shard, error)
    except Exception as error:
        todo.stop(f"{type(error).__name__}: {error}")
    finally:
        if worker is not None:
            worker.close()
