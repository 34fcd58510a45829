"""Sessions that share one model's thread, without a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aad1.serve.engine import Engine
from aad1.serve.guard import Limits
from aad1.serve.live import Live
from serve_fakes import FakeModel


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def test_resets_of_one_session_leave_nothing_for_the_others_to_wait_for(
    tmp_path: Path,
) -> None:
    gate, busy = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        gate.wait(10)

    async def run() -> None:
        model = FakeModel(wait, fps=160.0)
        engine = Engine(model, lambda frame: b"")
        rough, other = Live(engine, tmp_path, Limits()), Live(engine, tmp_path, 60)
        await rough.start(None, "a", 0)
        await until(busy.is_set)  # the first chunk is being made and cannot be taken back
        point, text = model.begin(None, 9), model.encode("bb")
        for _ in range(50):
            await rough.reset()
            await asyncio.sleep(0.002)  # its next chunk is put in the queue
        other.core.start(point, "bb", text, other._now())
        other._wake()
        await asyncio.sleep(0.01)
        gate.set()
        await until(lambda: any(made[0] == "seed 9" for made in model.made))
        before = next(k for k, made in enumerate(model.made) if made[0] == "seed 9")
        assert before <= 2  # the chunk that was being made, and the one after the last reset
        await rough.close()
        await other.close()
        await engine.close()

    asyncio.run(run())


def test_a_chunk_that_is_thrown_away_costs_no_cache_pass(tmp_path: Path) -> None:
    gate, busy = threading.Event(), threading.Event()
    gate.set()

    def wait() -> None:
        busy.set()
        gate.wait(10)

    async def run() -> None:
        model = FakeModel(wait)
        engine = Engine(model, lambda frame: b"")
        live = Live(engine, tmp_path, Limits())
        await live.start(None, "a", 0)
        await until(lambda: len(model.settled) == 2)  # one on show, one ready
        live.pause()  # there is time for all
        gate.clear()
        busy.clear()
        await live.steer("bb")
        await until(busy.is_set)
        await live.steer("ccc")  # the chunk of "bb" is being made
        gate.set()
        await until(lambda: model.settled[-1][-1] == 3.0)
        assert [made[-1] for made in model.made] == [1.0, 1.0, 2.0, 3.0]
        assert [made[-1] for made in model.settled] == [1.0, 1.0, 3.0]
        await live.close()
        await engine.close()

    asyncio.run(run())
