"""The causal rollout on the fast path: what aad1.rollout.stream.Rollout gives, sooner.

    fast = FastRollout(model, geometry, sigmas)
    for x0 in fast.stream(image, text, noise, chunks): ...     # as Rollout.stream
    fast.merged(image, text, noise, chunks)                     # offline: one pass per chunk

A `FastRollout` keeps what videos of one size share (weights made ready, compiled code); each video
has a `Session` with its own cache. `Session.generate` and `commit` only launch work: neither waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.flow import add_noise
from aad1.core.kv_cache import KV
from aad1.errors import UserError
from aad1.fast.config import FastConfig, default_config, usable
from aad1.fast.dit import FastTransformer
from aad1.fast.place import Part
from aad1.fast.slots import Slots
from aad1.models.dit import WanTransformer
from aad1.rollout.stream import Noise, Rollout


class FastRollout:
    """A causal generator on the fast path; arguments as of `aad1.rollout.stream.Rollout`.

    config: None takes `default_config` of the model's device. Parts that cannot work here are left
    out, with one warning that names them.

    UserError for a geometry that only the plain rollout knows (see `admits`).
    """

    def __init__(
        self,
        model: WanTransformer,
        geometry: ChunkGeometry,
        sigmas: tuple[float, ...] = (1.0,),
        config: FastConfig | None = None,
    ) -> None:
        Rollout(model, geometry, sigmas)  # checks the noise levels
        if not admits(geometry):
            raise UserError(
                "the fast path needs positions that count from the visible frames "
                f"(relative=True) where there is a sink, got {geometry}"
            )
        config = config or default_config(model.device, model.config.width)
        self.config = usable(
            config, model.device, geometry, model.config.width, model.config.ffn_dim
        )
        self.transformer = FastTransformer(model, self.config)
        self.model, self.geometry, self.sigmas = model, geometry, sigmas
        self.side: torch.cuda.Stream | None = None
        """Where a pass runs before it is captured as a graph."""
        self._free: list[Session] = []

    def session(self, batch: int, height: int, width: int) -> Session:
        """A cache for `batch` videos of latents height x width, at the start of a video.

        Give it back with `release`, and the next video of that size starts without allocating.
        """
        for i, kept in enumerate(self._free):
            if kept.shape == (batch, height, width):
                session = self._free.pop(i)
                session.restart()
                return session
        self._free.clear()  # of another size: its memory is needed
        return Session(self, (batch, height, width))

    def release(self, session: Session) -> None:
        """Keep a session's memory for the next video of its size."""
        self._free = [session]

    @torch.no_grad()
    def stream(
        self,
        image: torch.Tensor | None,
        text: Callable[[int], torch.Tensor],
        noise: Noise,
        chunks: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """As `Rollout.stream`: clean latents chunk by chunk, the same to rounding."""
        first = noise(0, 0) if image is None else image
        session = self.session(len(first), *first.shape[3:])
        try:
            if image is not None:
                session.prefill(image, text(0))
            made = 0
            while chunks is None or made < chunks:
                context = text(session.chunk)
                x0 = session.generate(context, noise)
                made += 1
                yield x0
                if chunks is None or made < chunks:
                    session.commit(x0, context)
        finally:
            self.release(session)

    @torch.no_grad()
    def merged(
        self,
        image: torch.Tensor | None,
        text: Callable[[int], torch.Tensor],
        noise: Noise,
        chunks: int,
    ) -> Iterator[torch.Tensor]:
        """The same clean latents with the cache pass of a chunk inside the first pass of the next.

        One pass per chunk and noise level, each of the size of two. Nothing is committed before
        the next chunk is asked for, so this is for videos made at one go.
        """
        first = noise(0, 0) if image is None else image
        session = self.session(len(first), *first.shape[3:])
        try:
            clean, context = image, text(0)
            if image is not None and image.shape[2] != self.geometry.chunk:
                session.prefill(image, context)
                clean = None
            for _ in range(chunks):
                if clean is None:
                    context = text(session.chunk)
                    clean = session.generate(context, noise)
                else:
                    following = text(session.chunk + 1)
                    clean = session.commit_and_generate(clean, context, following, noise)
                    context = following
                yield clean
        finally:
            self.release(session)


def admits(geometry: ChunkGeometry) -> bool:
    """Whether the fast path knows the geometry: any with relative positions or without a sink.

    Attention sees differences of positions alone, and without a sink both ways of counting give
    the same.
    """
    return geometry.relative or not geometry.sink


class Session:
    """One video in the making: its cache, its prompts' K and V, and the next chunk."""

    def __init__(self, rollout: FastRollout, shape: tuple[int, int, int]) -> None:
        self.rollout, self.shape = rollout, shape
        batch, height, width = shape
        model = rollout.model
        _, p, q = model.config.patch_size
        if height % p or width % q:
            raise UserError(f"latents are {height}x{width}, not a multiple of the patch {p}x{q}")
        self.slots = Slots(
            model.config, rollout.geometry, batch, (height // p, width // q), model.device,
            model.dtype,
        )  # fmt: skip
        self._prompts = _Prompts(rollout.transformer)
        self._graphs: dict[tuple[object, ...], Any] = {}
        self.restart()

    def restart(self) -> None:
        """Back to the start of a video."""
        self.slots.reset()
        self.chunk = self.start = 0

    def prefill(self, image: torch.Tensor, text: torch.Tensor) -> None:
        """The image [B, C, first, H, W] as chunk 0, written to the cache at sigma 0."""
        if image.shape[2] != self.rollout.geometry.first:
            raise UserError(
                f"the image must be {self.rollout.geometry.first} latent frame(s), "
                f"got {image.shape[2]}"
            )
        self.commit(image, text, graph=self.rollout.config.image_graph)

    @torch.no_grad()
    def generate(self, text: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Clean latents [B, C, F, H, W] of the next chunk, with every noise level in turn."""
        x_t = noise(self.chunk, 0)
        x0 = self._pass(x_t, (self._part(x_t.shape[2], self.rollout.sigmas[0], text),))
        return self._further_steps(x0, text, noise)

    @torch.no_grad()
    def commit(self, x0: torch.Tensor, text: torch.Tensor, graph: bool = False) -> None:
        """On to the next chunk: the cache pass over this clean one, K and V for those that follow.

        graph: as a CUDA graph, even where others are not.
        """
        self._pass(x0, (self._part(x0.shape[2], 0.0, text),), predict=False, graph=graph)
        self._advance(x0.shape[2])

    @torch.no_grad()
    def commit_and_generate(
        self, x0: torch.Tensor, text: torch.Tensor, following: torch.Tensor, noise: Noise
    ) -> torch.Tensor:
        """`commit(x0, text)`, then `generate(following, noise)`, the first pass of which is shared:
        the clean rows do not see the noisy ones, which see K and V of the clean ones."""
        clean = self._part(x0.shape[2], 0.0, text)
        self._advance(x0.shape[2])
        x_t = noise(self.chunk, 0)
        noisy = self._part(x_t.shape[2], self.rollout.sigmas[0], following)
        both = self._pass(torch.cat([x0.to(x_t.dtype), x_t], 2), (clean, noisy))
        return self._further_steps(both, following, noise)

    def _further_steps(self, x0: torch.Tensor, text: torch.Tensor, noise: Noise) -> torch.Tensor:
        for step, sigma in enumerate(self.rollout.sigmas[1:], 1):
            level = torch.full((len(x0),), sigma, device=x0.device)
            x_t = add_noise(x0, noise(self.chunk, step), level)
            x0 = self._pass(x_t, (self._part(x_t.shape[2], sigma, text),))
        return x0

    def _part(self, size: int, sigma: float, text: torch.Tensor) -> Part:
        return Part(self.start, size, sigma, self._prompts.of(text))

    def _advance(self, size: int) -> None:
        self.chunk += 1
        self.start += size

    def _pass(
        self,
        latents: torch.Tensor,
        parts: tuple[Part, ...],
        predict: bool = True,
        graph: bool = False,
    ) -> torch.Tensor:
        """One pass; graph: as a CUDA graph, even where others are not."""
        run = self.rollout.transformer.run
        geometry = self.rollout.geometry
        whole = all(p.size in (geometry.chunk, geometry.first) for p in parts)
        if not (graph or (self.rollout.config.graph and whole)):
            out = run(latents, self.slots, parts, predict=predict)
        else:
            out = self._graphed(latents, parts, predict)
        return latents if out is None else out

    def _graphed(
        self, latents: torch.Tensor, parts: tuple[Part, ...], predict: bool
    ) -> torch.Tensor | None:
        """The pass as a CUDA graph, captured when its slots, levels and prompt memory first occur.

        With one past chunk in the window there are few of them: two phases of the ring.
        """
        places = [(tuple(self.slots.own(p.start, p.size)), self.slots.filled(p.start, p.size),
                   self.slots.table(p.start, p.size)[0].data_ptr(), p.sigma, id(p.text))
                  for p in parts]  # fmt: skip
        key = (latents.shape, latents.dtype, predict, *places)
        with torch.cuda.device(latents.device):
            if key not in self._graphs:
                out, self._graphs[key] = self._captured(latents, parts, predict)
                return out
            graph, static, later, _ = self._graphs[key]
            static.copy_(latents)
            graph.replay()
        return None if later is None else later.clone()

    def _captured(
        self, latents: torch.Tensor, parts: tuple[Part, ...], predict: bool
    ) -> tuple[torch.Tensor | None, Any]:
        """The pass's result, and what it takes to replay it."""
        rollout, run = self.rollout, self.rollout.transformer.run
        if rollout.side is None:
            rollout.side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # This run compiles and plans, and it is also the pass itself: a merged pass must not
        # run twice, since its noisy chunk takes the slots that its clean one has read.
        rollout.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(rollout.side):
            out = run(latents, self.slots, parts, predict=predict)
        torch.cuda.current_stream().wait_stream(rollout.side)
        with torch.inference_mode(False):  # overwritten later, in whatever mode
            static = latents.clone()
        graph = torch.cuda.CUDAGraph()
        # Records, without computing anything. Other threads may use the device meanwhile: a server
        # encodes prompts beside the thread that has the model.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            later = run(static, self.slots, parts, predict=predict)
        # The first run's memory is the side stream's.
        return None if out is None else out.clone(), (graph, static, later, parts)


class _Prompts:
    """K and V of the last two prompts, in memory that stays where it is (graphs point to it)."""

    def __init__(self, transformer: FastTransformer) -> None:
        self._transformer = transformer
        self._kept: list[tuple[torch.Tensor, list[KV]]] = []  # the last used one last

    def of(self, rows: torch.Tensor) -> list[KV]:
        """K and V by layer; computed once for each tensor that is given."""
        keep = self._transformer.config.precompute
        for i, (known, memory) in enumerate(self._kept):
            if known is rows and keep:
                self._kept.append(self._kept.pop(i))
                return memory
        with torch.inference_mode(False):  # overwritten later, in whatever mode
            made = self._transformer.text(rows.clone())
        if len(self._kept) == 2:
            _, memory = self._kept.pop(0)
            if memory[0][0].shape == made[0][0].shape:
                for old, new in zip(memory, made, strict=True):
                    old[0].copy_(new[0])
                    old[1].copy_(new[1])
                made = memory
        self._kept.append((rows, made))
        return made
