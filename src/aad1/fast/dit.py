"""The transformer's passes for generation: the same weights, arranged for speed.

A pass is, for every layer, `before_attention` (norm, modulation, q/k/v, RoPE, writing K and V into
their slots), one attention call over the slots, and `after_attention` (the rest of the block); see
aad1.fast.block.

A pass may hold two chunks side by side (`Part`s), each with its own noise level and prompt: the
clean one that is written to the cache and the next, noisy one. See aad1.fast.rollout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from aad1.core.kv_cache import KV
from aad1.fast.block import (
    Fixed,
    Modulation,
    Tables,
    after_attention,
    before_attention,
    keys_values,
)
from aad1.fast.config import FastConfig
from aad1.fast.layers import made_ready
from aad1.fast.ops import Table, add_norm
from aad1.fast.place import Part, Place
from aad1.fast.slots import Slots
from aad1.models.dit import MIN_SIGMA, Block, WanTransformer

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
RECOMPILES = 64  # shapes that the compiler may see: sizes, batches, one or two chunks in a pass


class FastTransformer:
    """A WanTransformer made ready for generation; its weights are shared, not copied.

    q, k and v become one matrix, of which the model's own three are views from then on. float8
    weights are copies. Weights must not change afterwards: what depends on them is kept.
    """

    def __init__(self, model: WanTransformer, config: FastConfig) -> None:
        self.model, self.config = model, config
        c = model.config
        self.fixed = Fixed(c.num_attention_heads, c.eps, config.triton)
        self.layers = [made_ready(b, config.fp8) for b in model.blocks if isinstance(b, Block)]
        self._modulation: dict[float, tuple[list[Modulation], tuple[torch.Tensor, ...]]] = {}
        self._functions: Any = (before_attention, keys_values, after_attention)
        self._compiled: Any = self._functions
        if config.compile:
            dynamo: Any = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILES)
            self._compiled = tuple(
                torch.compile(f, fullgraph=True, dynamic=False) for f in self._functions
            )

    # -- what is computed once ------------------------------------------------------------

    @torch.no_grad()
    def text(self, rows: torch.Tensor) -> list[KV]:
        """K and V of a prompt [B, S, text_dim] for the cross-attention of every layer."""
        context = self.model.condition_embedder.text(rows.to(self.model.dtype))
        return [b.attn2.key_value(context) for b in self.model.blocks if isinstance(b, Block)]

    @torch.no_grad()
    def modulation(self, sigma: float) -> tuple[list[Modulation], tuple[torch.Tensor, ...]]:
        """Of every block, and shift and scale of the head, at a noise level."""
        if sigma in self._modulation:
            return self._modulation[sigma]
        level = torch.full((1,), sigma, device=self.model.device)
        e, e0 = self.model.condition_embedder.time(level)
        blocks = [
            Modulation(*(part.contiguous() for part in b.modulation(e0)))
            for b in self.model.blocks
            if isinstance(b, Block)
        ]
        table = self.model.scale_shift_table.float() + e[:, :, None]
        made = (blocks, tuple(p.contiguous() for p in table[:, :, :, None].unbind(2)))
        if self.config.precompute:
            self._modulation[sigma] = made
        return made

    # -- passes ---------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self, latents: torch.Tensor, slots: Slots, parts: tuple[Part, ...], *, predict: bool = True
    ) -> torch.Tensor | None:
        """One pass over `slots`, which it updates; parts in the order of their frames.

        latents: [B, C, F, H, W] of all parts. All parts but the last are clean chunks that are
        written to the cache for good; with `predict` off so is the last one.
        Returns the last part's x0, [B, C, its frames, H, W], or None with `predict` off.
        """
        model = self.model
        first, final = parts[0], parts[-1]
        slots.prepare(first.start, first.size, final.start + final.size)
        if len(parts) == 1:
            slots.turn_sink(first.start, first.size)
        places = [Place(slots, p, keep=not predict or p is not final) for p in parts]
        tables = _tables(places)
        levels = [self.modulation(p.sigma) for p in parts]
        sizes = tuple(p.size for p in parts)
        whole = all(size in (slots.geometry.chunk, slots.geometry.first) for size in sizes)
        before, only_kv, after = self._compiled if whole else self._functions
        x = model.patch_embedding(latents.to(model.dtype)).flatten(3).permute(0, 2, 3, 1)
        x = x.contiguous()
        with self._attention():
            for i, layer in enumerate(self.layers):
                m = _side_by_side([blocks[i] for blocks, _ in levels], sizes)
                if i == len(self.layers) - 1 and not predict and len(parts) == 1:
                    kept = only_kv(x, layer, m.shift1, m.scale1, tables, self.fixed)
                    places[0].write(i, *kept[:2])
                    places[0].keep_sink(i, kept[2])
                    break
                direct = places[0].direct(i) if len(parts) == 1 else None
                made = before(x, layer, m.shift1, m.scale1, tables, direct, self.fixed)
                q, own, v, stored, raw = made
                seen = []
                for place, at in zip(places, _ranges(sizes), strict=True):
                    if direct is None:
                        slots.turn_sink(place.part.start, place.part.size, i)
                        place.write(i, own[:, at], v[:, at])
                    seen.append(place.attend(i, q[:, at]))
                    if place.store is not None:
                        place.write(i, stored[:, at])
                    place.keep_sink(i, None if raw is None else raw[:, at])
                attended = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
                texts = tuple(p.text[i] for p in parts)
                x = after(x, attended, layer, m, texts, sizes, self.fixed)
        if not predict:
            return None
        out = self._head(x[:, -final.size :], levels[-1][1], slots.grid).to(latents.dtype)
        x_t = latents[:, :, -final.size :]
        if model.config.prediction == "x0":
            out = (x_t - out) / max(final.sigma, MIN_SIGMA)
        return x_t - final.sigma * out

    def _head(
        self, x: torch.Tensor, modulation: tuple[torch.Tensor, ...], grid: tuple[int, int]
    ) -> torch.Tensor:
        """[B, F, L, D] -> what the last linear layer predicts, [B, C, F, H, W]."""
        shift, scale = modulation
        _, h = add_norm(x, None, None, scale, shift, self.fixed.eps, self.fixed.kernels)
        assert isinstance(h, torch.Tensor)
        _, p, q = self.model.config.patch_size
        out = self.model.proj_out(h).unflatten(2, grid).unflatten(-1, (p, q, -1))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """cuDNN's attention first, if it is asked for."""
        if not self.config.cudnn:
            yield
            return
        with sdpa_kernel(BACKENDS, set_priority=True):
            yield


def _tables(places: list[Place]) -> Tables:
    """Of all chunks of a pass, joined along their frames."""

    def joined(tables: list[Table]) -> Table:
        if len(tables) == 1:
            return tables[0]
        return torch.cat([t[0] for t in tables]), torch.cat([t[1] for t in tables])

    store = [p.store or p.own for p in places] if any(p.store for p in places) else None
    raw = [p.raw or p.own for p in places] if any(p.raw for p in places) else None
    return Tables(
        joined([p.own for p in places]),
        None if store is None else joined(store),
        None if raw is None else joined(raw),
    )


def _ranges(sizes: tuple[int, ...]) -> list[slice]:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _side_by_side(levels: list[Modulation], sizes: tuple[int, ...]) -> Modulation:
    """One modulation per frame where the chunks of a pass differ in noise level."""
    if len(levels) == 1:
        return levels[0]
    return Modulation(
        *(
            torch.cat([m.expand(-1, n, -1, -1) for m, n in zip(of, sizes, strict=True)], 1)
            for of in zip(*levels, strict=True)
        )
    )
