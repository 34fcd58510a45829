"""Shards handed out to workers that fail in every way, without the game."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aad1.worlds.doom import DoomConfig, pool
from aad1.worlds.doom.job import Job, Shard

JOB = Job(DoomConfig(), "train", 0, Path("nowhere"))
SHARDS = [Shard(number, 32) for number in range(6)]


class FakeWorker:
    """Fails as `fate` says: "error", "death" or None, for a shard and how often it was tried."""

    fate: Callable[[int, int], str | None]
    tries: dict[int, int]
    opened: list[FakeWorker]

    def __init__(self, job: Job) -> None:
        assert job is JOB
        self.alive, self.closed = True, False
        FakeWorker.opened.append(self)

    def record(self, shard: Shard) -> str | None:
        assert self.alive
        tried = FakeWorker.tries[shard.number] = FakeWorker.tries.get(shard.number, 0) + 1
        end = FakeWorker.fate(shard.number, tried)
        self.alive = end != "death"
        return end

    def close(self) -> None:
        self.closed = True


def _record(
    monkeypatch: pytest.MonkeyPatch,
    fate: Callable[[int, int], str | None],
    workers: int = 1,
    finished: Callable[[Shard], None] | None = None,
) -> tuple[str | None, list[int]]:
    """The error, and the numbers of the shards that were finished."""
    monkeypatch.setattr(pool, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "fate", staticmethod(fate), raising=False)
    monkeypatch.setattr(FakeWorker, "tries", {}, raising=False)
    monkeypatch.setattr(FakeWorker, "opened", [], raising=False)
    numbers: list[int] = []
    error = pool.record_shards(
        JOB, SHARDS, workers, finished or (lambda shard: numbers.append(shard.number))
    )
    assert all(worker.closed for worker in FakeWorker.opened)
    return error, numbers


@pytest.mark.parametrize("workers", [1, 3, 9])
def test_each_shard_is_recorded_once(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    error, numbers = _record(monkeypatch, lambda number, tried: None, workers)
    assert error is None
    assert sorted(numbers) == list(range(6))
    assert len(FakeWorker.opened) <= min(workers, 6)


def test_a_worker_that_dies_is_replaced_and_its_shard_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, numbers = _record(monkeypatch, lambda number, tried: "death" if tried < 2 else None)
    assert error is None
    assert sorted(numbers) == list(range(6))
    assert set(FakeWorker.tries.values()) == {2}
    assert len(FakeWorker.opened) == 7  # the first one and six after a death


def test_a_second_death_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    error, numbers = _record(monkeypatch, lambda number, tried: "death" if number == 2 else None)
    assert error == "shard-00002.safetensors, twice: death"
    assert numbers == [0, 1, 3, 4, 5]  # the others came between the two tries


def test_an_error_that_leaves_the_worker_alive_ends_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, numbers = _record(monkeypatch, lambda number, tried: "error" if number == 2 else None)
    assert error == "shard-00002.safetensors: error"
    assert numbers == [0, 1]
    assert FakeWorker.tries[2] == 1


def test_what_the_caller_raises_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(shard: Shard) -> None:
        raise RuntimeError(f"no room for {shard.number}")

    error, _ = _record(monkeypatch, lambda number, tried: None, finished=finished)
    assert error == "RuntimeError: no room for 0"
    assert FakeWorker.tries == {0: 1}
