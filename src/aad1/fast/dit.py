"""The transformer's passes for generation: the same weights, arranged for speed.

A pass is, for every layer, `before_attention` (norm, modulation, q/k/v, RoPE, writing K and V into
their slots), one attention call over the slots, and `after_attention` (the rest of the block). The
two functions see the chunk only, never the cache: they are compiled once for all layers, and not
again when the cache fills. Attention stays outside, so its backend is chosen at run time.

A pass may hold two chunks side by side (`Part`s), each with its own noise level and prompt: the
clean one that is written to the cache and the next, noisy one. See aad1.fast.rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from aad1.core.kv_cache import KV
from aad1.fast.config import FastConfig
from aad1.fast.ops import (
    Linear,
    Rows,
    Table,
    add_norm,
    gated_add,
    linear,
    linear_gelu,
    norm_rope,
    quantise_rows,
    rms,
)
from aad1.fast.slots import Slots
from aad1.models.dit import MIN_SIGMA, Attention, Block, WanTransformer, attend

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
RECOMPILES = 64  # shapes that the compiler may see: sizes, batches, one or two chunks in a pass


class Layer(NamedTuple):
    """Weights of one block."""

    qkv: Linear
    kv: Linear
    """The part of qkv that the cache pass of the last layer needs."""
    out: Linear
    norm_q: torch.Tensor
    norm_k: torch.Tensor
    text_q: Linear
    text_out: Linear
    text_norm_q: torch.Tensor
    norm_scale: torch.Tensor
    """The second norm's weight - 1, and its bias: float32 [1, 1, 1, D]."""
    norm_shift: torch.Tensor
    up: Linear
    down: Linear


class Modulation(NamedTuple):
    """What a noise level does to one block, float32 [1, F or 1, 1, D] each."""

    shift1: torch.Tensor
    scale1: torch.Tensor
    gate1: torch.Tensor
    shift2: torch.Tensor
    scale2: torch.Tensor
    gate2: torch.Tensor


class Tables(NamedTuple):
    """How K is rotated: for this pass, for the one that reads it later, and not at all in time.

    store, raw: None where no chunk of the pass needs them.
    """

    own: Table
    store: Table | None
    raw: Table | None


class Fixed(NamedTuple):
    """What every layer shares and no pass changes."""

    heads: int
    eps: float
    kernels: bool


@dataclass(frozen=True)
class Part:
    """One chunk in a pass: where it stands, its noise level, and its prompt's K and V by layer.

    keep: its own K and V are those that later chunks read, although it is the last of a pass that
    predicts.
    """

    start: int
    size: int
    sigma: float
    text: list[KV]
    keep: bool = False


def before_attention(
    x: torch.Tensor,
    layer: Layer,
    shift: torch.Tensor,
    scale: torch.Tensor,
    tables: Tables,
    slots: KV | None,
    fixed: Fixed,
) -> tuple[torch.Tensor | None, ...]:
    """x [B, F, L, D] -> q and K rotated by tables.own, V, K by tables.store, K by tables.raw.

    Each [B, F, L, N, D / N], None for what is not asked for.
    slots: where K and V are written, if they have one place; both are None in the result then.
    """
    h = _normed(x, layer.qkv, scale, shift, fixed)
    q, k, v = linear(h, layer.qkv, fixed.kernels, x.dtype).chunk(3, -1)
    (queries,) = _rotated(q, layer.norm_q, (tables.own,), (None,), fixed)
    own, store, raw = _rotated(k, layer.norm_k, tables, (slots and slots[0], None, None), fixed)
    v = v.unflatten(-1, (fixed.heads, -1))
    if slots is None:
        return queries, own, v, store, raw
    slots[1].copy_(v)
    return queries, None, None, store, raw


def keys_values(
    x: torch.Tensor,
    layer: Layer,
    shift: torch.Tensor,
    scale: torch.Tensor,
    tables: Tables,
    fixed: Fixed,
) -> tuple[torch.Tensor | None, ...]:
    """K as it is kept, V, and K by tables.raw: where the cache pass ends."""
    h = _normed(x, layer.kv, scale, shift, fixed)
    k, v = linear(h, layer.kv, fixed.kernels, x.dtype).chunk(2, -1)
    kept, raw = _rotated(
        k, layer.norm_k, (tables.store or tables.own, tables.raw), (None, None), fixed
    )
    return kept, v.unflatten(-1, (fixed.heads, -1)), raw


def _normed(
    x: torch.Tensor, layer: Linear, scale: torch.Tensor, shift: torch.Tensor, fixed: Fixed
) -> torch.Tensor | Rows:
    """What `layer` is given: the modulated norm of x."""
    quantise = layer.scale is not None
    return add_norm(x, None, None, scale, shift, fixed.eps, fixed.kernels, quantise)[1]


def _rotated(
    x: torch.Tensor,
    weight: torch.Tensor,
    tables: Sequence[Table | None],
    outs: Sequence[torch.Tensor | None],
    fixed: Fixed,
) -> tuple[torch.Tensor | None, ...]:
    return norm_rope(x, weight, fixed.eps, fixed.heads, tables, outs, fixed.kernels)


def after_attention(
    x: torch.Tensor,
    attended: torch.Tensor,
    layer: Layer,
    modulation: Modulation,
    texts: tuple[KV, ...],
    sizes: tuple[int, ...],
    fixed: Fixed,
) -> torch.Tensor:
    """The block from attention's output [B, F, L, N, D / N] on. texts: of chunks of `sizes`."""
    m, kernels, dtype = modulation, fixed.kernels, x.dtype
    fp8 = layer.up.scale is not None
    x, h = add_norm(
        x, linear(attended.flatten(-2), layer.out, kernels, dtype), m.gate1, layer.norm_scale,
        layer.norm_shift, fixed.eps, kernels, fp8,
    )  # fmt: skip
    q = rms(linear(h, layer.text_q, kernels, dtype), layer.text_norm_q, fixed.eps).to(dtype)
    q = q.unflatten(-1, (fixed.heads, -1))
    seen = [
        attend(part.flatten(1, 2), k, v).unflatten(1, part.shape[1:3])
        for part, (k, v) in zip(q.split(sizes, 1), texts, strict=True)
    ]
    joined = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
    x, h = add_norm(
        x, linear(joined.flatten(-2), layer.text_out, kernels, dtype), None, m.scale2, m.shift2,
        fixed.eps, kernels, fp8,
    )  # fmt: skip
    h = linear(linear_gelu(h, layer.up, kernels, dtype), layer.down, kernels, dtype)
    return gated_add(x, h, m.gate2, kernels)


class FastTransformer:
    """A WanTransformer made ready for generation; its weights are shared, not copied.

    q, k and v become one matrix, of which the model's own three are views from then on. float8
    weights are copies. Weights must not change afterwards: what depends on them is kept.
    """

    def __init__(self, model: WanTransformer, config: FastConfig) -> None:
        self.model, self.config = model, config
        c = model.config
        self.fixed = Fixed(c.num_attention_heads, c.eps, config.triton)
        self.layers = [_layer(b, config.fp8) for b in model.blocks if isinstance(b, Block)]
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
        places = [_Place(slots, p, p.keep or not predict or p is not final) for p in parts]
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


class _Place:
    """Where one chunk of a pass stands in the cache."""

    def __init__(self, slots: Slots, part: Part, keep: bool) -> None:
        """keep: its K and V are those that later chunks read."""
        self.slots, self.part = slots, part
        where = (part.start, part.size)
        self.own = slots.table(*where)
        self.store = slots.store_table(*where) if keep else None
        self.raw = slots.raw_table(*where) if keep else None
        self.runs = slots.own(*where)
        self.filled = slots.filled(*where)

    def direct(self, layer: int) -> KV | None:
        """Views of the chunk's slots, if they lie side by side."""
        if len(self.runs) > 1:
            return None
        (a, b), s = self.runs[0], self.slots
        return s.k[layer, :, a:b], s.v[layer, :, a:b]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Copy K and V [B, F, L, N, head_dim] into the chunk's slots, or K alone."""
        at = 0
        for a, b in self.runs:
            self.slots.k[layer, :, a:b].copy_(k[:, at : at + b - a])
            if v is not None:
                self.slots.v[layer, :, a:b].copy_(v[:, at : at + b - a])
            at += b - a

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        k, v = (m[layer, :, : self.filled].flatten(1, 2) for m in (self.slots.k, self.slots.v))
        return attend(q.flatten(1, 2), k, v).unflatten(1, q.shape[1:3])

    def keep_sink(self, layer: int, raw: torch.Tensor | None) -> None:
        """Keep the time channels of new sink frames as they are before rotation."""
        if self.raw is not None and raw is not None:
            sink, start = self.slots.sink_raw[layer], self.part.start
            new = raw[:, : sink.shape[1] - start, ..., : sink.shape[-1]]
            sink[:, start : start + new.shape[1]].copy_(new)


def _tables(places: list[_Place]) -> Tables:
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


def _layer(block: Block, fp8: bool) -> Layer:
    attn, cross, ffn = block.attn1, block.attn2, block.ffn
    pack = _quantised if fp8 else _plain
    qkv = pack(_joined(attn))
    return Layer(
        qkv=qkv,
        kv=qkv.rows(attn.to_q.out_features),
        out=pack(_of(attn.to_out[0])),
        norm_q=attn.norm_q.weight.detach(),
        norm_k=attn.norm_k.weight.detach(),
        text_q=pack(_of(cross.to_q)),
        text_out=pack(_of(cross.to_out[0])),
        text_norm_q=cross.norm_q.weight.detach(),
        norm_scale=_row(block.norm2.weight) - 1,
        norm_shift=_row(block.norm2.bias),
        up=pack(_of(ffn.net[0].proj)),  # type: ignore[arg-type]
        down=pack(_of(ffn.net[2])),
    )


def _row(values: torch.Tensor) -> torch.Tensor:
    return values.detach().float()[None, None, None]


def _of(layer: torch.nn.Module) -> Linear:
    assert isinstance(layer, torch.nn.Linear)
    return Linear(layer.weight.detach(), layer.bias.detach())


def _joined(attn: Attention) -> Linear:
    """q, k and v as one layer; the model's own parameters become views of it."""
    three = (attn.to_q, attn.to_k, attn.to_v)
    weight = torch.cat([layer.weight.detach() for layer in three])
    bias = torch.cat([layer.bias.detach() for layer in three])
    for layer, w, b in zip(three, weight.chunk(3), bias.chunk(3), strict=True):
        layer.weight.data, layer.bias.data = w, b
    return Linear(weight, bias)


def _plain(layer: Linear) -> Linear:
    return layer


def _quantised(layer: Linear) -> Linear:
    weight, scale = quantise_rows(layer.weight)
    return Linear(weight, layer.bias, scale)
