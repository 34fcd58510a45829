"""The causal rollout: one implementation for training, generation and serving.

Chunk by chunk: noise -> generator over the K/V cache -> clean chunk x0 -> cache pass on x0 at
sigma 0 -> next chunk (paper, section on inference; algorithm.md, section 4). States are
immutable: a consumer may keep one and branch from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from aad1.core.chunks import ChunkGeometry, Plan, cached, parallel_chunks, without_unseen
from aad1.core.flow import add_noise, x0_from_velocity
from aad1.core.kv_cache import KV, KVCache, frames_of
from aad1.core.transfer import upload
from aad1.errors import UserError
from aad1.models.dit import WanTransformer

Noise = Callable[[int, int], torch.Tensor]
"""noise(chunk index, step) -> standard normal [B, C, frames of the chunk, H, W]."""


@dataclass(frozen=True)
class State:
    """Where a rollout stands: the next chunk, its first frame, and the cache before it."""

    chunk: int = 0
    start: int = 0
    cache: KVCache = KVCache()


@dataclass(frozen=True)
class Step:
    """One generated chunk: its clean latents and what the last pass was given."""

    x0: torch.Tensor
    x_t: torch.Tensor
    sigma: float


@dataclass(frozen=True)
class Rollout:
    """A causal generator with its geometry and noise levels.

    sigmas: noise levels, from 1 downwards, one network pass each; (1.0,) is one step.
    """

    model: WanTransformer
    geometry: ChunkGeometry
    sigmas: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        s = self.sigmas
        if not s or s[0] != 1.0 or any(a <= b for a, b in pairwise(s)):
            raise UserError(f"sigmas must start at 1 and fall, got {s}")
        if s[-1] <= 0:
            raise UserError(f"sigmas must be above 0, got {s}")

    def _plan(self, state: State, size: int) -> Plan:
        return cached(self.geometry, state.cache.frames, state.start, size)

    def prefill(self, image: torch.Tensor, text: torch.Tensor) -> State:
        """The image [B, C, first, H, W] as chunk 0, written to the cache at sigma 0."""
        if image.shape[2] != self.geometry.first:
            raise UserError(
                f"the image must be {self.geometry.first} latent frame(s), got {image.shape[2]}"
            )
        return self.commit(State(), image, text)

    def generate(
        self, state: State, text: torch.Tensor, noise: Noise, exit_step: int | None = None
    ) -> Step:
        """The next chunk: every step re-noises the last x0 with fresh noise (SDE sampling).

        text: [B, S, D] of this chunk's prompt. exit_step stops after that step (training).
        """
        last = len(self.sigmas) - 1 if exit_step is None else exit_step
        x_t = noise(state.chunk, 0)
        plan = self._plan(state, x_t.shape[2])
        past = state.cache.layers or None
        x0 = x_t
        for step, sigma in enumerate(self.sigmas[: last + 1]):
            level = torch.full((len(x_t),), sigma, device=x_t.device)
            if step:
                x_t = add_noise(x0, noise(state.chunk, step), level)
            v = self.model(x_t, level, text, plan=plan, past=past)
            x0 = x0_from_velocity(x_t, v, level)
        return Step(x0, x_t, self.sigmas[last])

    def cache_pass(self, state: State, x0: torch.Tensor, text: torch.Tensor) -> tuple[KV, ...]:
        """K and V of a clean chunk at sigma 0, for every layer."""
        level = torch.zeros(len(x0), device=x0.device)
        plan = self._plan(state, x0.shape[2])
        return self.model.keys_values(x0, level, text, plan=plan, past=state.cache.layers or None)

    def commit(self, state: State, x0: torch.Tensor, text: torch.Tensor) -> State:
        """The state after a clean chunk: its K/V in the cache, what fell out of sight dropped."""
        new = self.cache_pass(state, x0, text)
        cache = state.cache.append(new, self.geometry, state.start)
        return State(state.chunk + 1, state.start + x0.shape[2], cache)

    @torch.no_grad()  # as a decorator: a `with` here would leak into the consumer at each yield
    def stream(
        self,
        image: torch.Tensor | None,
        text: Callable[[int], torch.Tensor],
        noise: Noise,
        chunks: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Clean latents chunk by chunk, without the image; endless if `chunks` is None.

        image: [B, C, first, H, W], or None for text to video (chunk 0 is generated too).
        text(i): [B, S, D], asked for when chunk i is begun, so a prompt may change in between.
        A chunk is handed over before its cache pass, and the last one of a finite rollout has
        none. Runs without autograd.
        """
        state = State() if image is None else self.prefill(image, text(0))
        made = 0
        while chunks is None or made < chunks:
            context = text(state.chunk)
            x0 = self.generate(state, context, noise).x0
            made += 1
            yield x0
            if chunks is None or made < chunks:
                state = self.commit(state, x0, context)


def seeded_noise(
    seeds: Sequence[int],
    geometry: ChunkGeometry,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Noise:
    """Noise that depends on (seed, chunk, step) alone: not on batch, length or device.

    seeds: one per sample; shape: (C, H, W) of the latents. Drawn on the CPU, so it is the same
    on every machine.
    """

    def draw(chunk: int, step: int) -> torch.Tensor:
        channels, height, width = shape
        size = (channels, geometry.size(chunk), height, width)
        parts = []
        for seed in seeds:
            key = hashlib.blake2b(f"{seed}/{chunk}/{step}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            parts.append(torch.randn(size, generator=generator))
        return upload(torch.stack(parts), device, dtype)

    return draw


# -- training: a whole clip, and its gradient -------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A finished no-grad rollout with all that its gradient needs (algorithm.md, section 10).

    x0: [B, C, F, H, W] with the image as frame 0. x_t: exit-pass inputs of the generated
    frames, [B, C, F - first, H, W]; sigma: their noise level. past: per layer, clean K/V of all
    frames but the last chunk's.
    """

    x0: torch.Tensor
    x_t: torch.Tensor
    sigma: float
    past: tuple[KV, ...]


@torch.no_grad()
def record(
    rollout: Rollout,
    image: torch.Tensor,
    text: torch.Tensor,
    noise: Noise,
    frames: int,
    exit_step: int | None = None,
) -> Recorded:
    """Phase one: roll out a whole clip without autograd.

    image [B, C, first, H, W]; text [B, F, S, D] per frame; frames = F in all. exit_step: the
    same step index for every chunk, as Self-Forcing trains few-step students.
    """
    geometry = rollout.geometry
    total = geometry.chunks(frames)
    state = State()
    x0, x_t, kvs = image, [], []
    xs = [image]
    sigma = rollout.sigmas[-1]
    for i in range(total):
        context = text[:, geometry.start(i)]
        if i:
            step = rollout.generate(state, context, noise, exit_step)
            x0, sigma = step.x0, step.sigma
            xs.append(x0)
            x_t.append(step.x_t)
        if i < total - 1:
            new = rollout.cache_pass(state, x0, context)
            kvs.append(new)
            state = State(
                i + 1, geometry.start(i + 1), state.cache.append(new, geometry, state.start)
            )
            del new
    del state  # its cache holds some of the pieces
    layers = [list(pieces) for pieces in zip(*kvs, strict=True)]
    kvs.clear()
    past: list[KV] = []
    while layers:  # joined layer by layer, each one's pieces let go of: never twice the whole
        pieces = layers.pop(0)
        past.append((torch.cat([k for k, _ in pieces], 1), torch.cat([v for _, v in pieces], 1)))
    return Recorded(torch.cat(xs, 2), torch.cat(x_t, 2), sigma, tuple(past))


def replay(
    rollout: Rollout,
    recorded: Recorded,
    text: torch.Tensor,
    skip: int = 1,
    frames: int | None = None,
) -> torch.Tensor:
    """Phase two: the exit passes of all chunks again, in one pass *with* autograd.

    Equal to the recorded clip, and its gradient equals that of the plain graph, because a
    chunk's loss reaches the weights only through that chunk's exit pass (the cache is
    detached). Returns the generated frames [B, C, F - first, H, W].

    skip, frames: only the chunks from number `skip` on, up to that many frames of the clip
        (default: all); returns the frames from start(skip) on.
    """
    geometry = rollout.geometry
    frames = recorded.x0.shape[2] if frames is None else frames
    begin, first = geometry.start(skip), geometry.first
    kept = recorded.past[0][0].shape[1]
    plan, seen = without_unseen(parallel_chunks(geometry, kept, frames, skip), kept)
    past = tuple((frames_of(k, seen), frames_of(v, seen)) for k, v in recorded.past)
    x_t = recorded.x_t[:, :, begin - first : frames - first]
    level = torch.full((len(x_t),), recorded.sigma, device=x_t.device)
    v = rollout.model(x_t, level, text[:, begin:frames], plan=plan, past=past)
    return x0_from_velocity(x_t, v, level)


RolloutFn = Callable[[Rollout, torch.Tensor, torch.Tensor, torch.Tensor, int | None], Recorded]
"""(rollout, image, text, noise [steps, B, C, F - first, H, W], exit step) -> recorded clip."""
