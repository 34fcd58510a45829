"""The model and its threads, which all sessions of a process share."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from PIL import Image

from aad1.errors import UserError
from aad1.media.images import ImageLike
from aad1.serve.model import LiveModel, Pixels

T = TypeVar("T")
Format = Literal["jpeg", "webp"]


def packer(format: Format, quality: int) -> Callable[[Pixels], bytes]:  # noqa: A002
    """frame [H, W, 3] -> a picture file."""
    if not 1 <= quality <= 100:
        raise UserError(f"quality must be in 1..100, got {quality}")
    options: dict[str, Any] = {"quality": quality}
    options |= {"subsampling": 0} if format == "jpeg" else {"method": 0}

    def pack(frame: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format, **options)
        return buffer.getvalue()

    return pack


class Engine:
    """The model and the threads that all sessions of a process share."""

    def __init__(self, model: LiveModel, pack: Callable[[Pixels], bytes]) -> None:
        self.model, self._pack = model, pack
        self._worker = ThreadPoolExecutor(1, "aad1-model")
        self._side = ThreadPoolExecutor(1, "aad1-side")

    async def on_worker(self, call: Callable[..., T], *args: Any) -> T:
        """Run on the model's thread, after what waits there."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *args)

    async def on_side(self, call: Callable[..., T], *args: Any) -> T:
        """Run beside the model: pictures, prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._side, call, *args)

    async def make(
        self, point: Any, text: Any, *, packed: bool = True
    ) -> tuple[Pixels, list[bytes], Any, dict[str, float]]:
        """The chunk after a point: frames, the same as files, the point after, seconds spent."""
        made = await self.on_worker(self.model.generate, point, text)
        began = time.perf_counter()
        files = await self.on_side(self._pack_all, made.frames) if packed else []
        return made.frames, files, made.after, made.seconds | {"pack": time.perf_counter() - began}

    async def settle(self, point: Any) -> float:
        """The cache pass of the chunk before a point, ahead of its use; the seconds it took."""

        def timed() -> float:
            began = time.perf_counter()
            self.model.settle(point)
            return time.perf_counter() - began

        return await self.on_worker(timed)

    def _pack_all(self, frames: Pixels) -> list[bytes]:
        return [self._pack(frame) for frame in frames]

    async def warm(self, image: ImageLike | None, prompt: str, chunks: int = 3) -> None:
        """Make a few chunks, so that the first user does not wait for one-time work."""
        point = await self.on_worker(self.model.begin, image, 0)
        text = await self.on_side(self.model.encode, prompt)
        for _ in range(chunks):
            _, _, point, _ = await self.make(point, text)

    async def close(self) -> None:
        """End the threads; what waits there is dropped, what runs is waited for."""
        for pool in (self._worker, self._side):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)
