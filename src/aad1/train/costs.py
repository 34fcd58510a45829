"""What passes of the networks cost, as formulas on their configs: work and kept activations.

Work is counted in floating-point operations, a multiplication and an addition each, of matrix
products, convolutions and attention alone; a test holds the counts equal to torch's own counter.
Activations are bytes that a forward pass keeps for the backward pass; a test holds them equal to
the storages that are alive after one.

n tokens of a pass, d width, f width of the feed-forward, S text rows of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aad1.core.chunks import ChunkGeometry, Plan, bidirectional, block_causal, cached
from aad1.core.chunks import parallel_chunks as parallel
from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig

BACKWARD_EXTRA = 0.1
"""Gradients on their way through one block, as a share of what the block keeps (measured)."""


@dataclass(frozen=True)
class Clip:
    """A training clip: latent frames, tokens per frame, text rows per prompt."""

    frames: int
    tokens: int
    text: int = 512


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass, those of attention apart: their backward costs differ."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.linear, times * self.attention)

    @property
    def forward(self) -> float:
        """Operations without a backward pass."""
        return self.linear + self.attention

    def training(self, again: bool) -> float:
        """Forward, gradients of weights and input, and the forward `again` if checkpointed."""
        return (3 + again) * self.forward

    def to_input(self, again: bool) -> float:
        """As `training` with frozen weights: linear layers have one product in the backward."""
        return (2 + again) * self.linear + (3 + again) * self.attention


def _sizes(plan: Plan, clip: Clip) -> tuple[int, int]:
    """Query tokens of a pass, and pairs of query and key tokens."""
    queries = sum(len(g.queries) for g in plan) * clip.tokens
    pairs = sum(len(g.queries) * len(g.keys) for g in plan) * clip.tokens**2
    return queries, pairs


def _embedding(config: WanConfig, n: int, rows: int, levels: int) -> float:
    d, patch = config.width, math.prod(config.patch_size)
    image = 2 * n * config.in_channels * patch * d
    text = 2 * rows * (config.text_dim * d + d * d)
    time = 2 * levels * (config.freq_dim * d + 7 * d * d)
    return image + text + time


def transformer(
    config: WanConfig,
    clip: Clip,
    plan: Plan,
    *,
    prompts: int,
    levels: int = 1,
    layers: int | None = None,
    head: bool = True,
) -> Work:
    """One pass along a plan. prompts: how many the pass is given (one per frame, or one).

    levels: noise levels that it is given. layers: of them, if it stops early (no `head` then).
    """
    d, rows = config.width, prompts * clip.text
    n, pairs = _sizes(plan, clip)
    count = config.num_layers if layers is None else layers
    block = 2 * n * (6 * d * d + 2 * d * config.ffn_dim) + 2 * rows * 2 * d * d
    attention = 4 * d * (pairs + n * clip.text)
    out = 2 * n * d * config.out_channels * math.prod(config.patch_size) if head else 0
    linear = count * block + _embedding(config, n, rows, levels) + out
    return Work(linear, count * attention)


def cache_pass(config: WanConfig, clip: Clip, plan: Plan, *, prompts: int = 1) -> Work:
    """The pass that stops at K and V of the last layer."""
    n, _ = _sizes(plan, clip)
    before = transformer(
        config, clip, plan, prompts=prompts, layers=config.num_layers - 1, head=False
    )
    return before + Work(2 * n * 2 * config.width**2)


def rollout(config: WanConfig, clip: Clip, geometry: ChunkGeometry, steps: float) -> Work:
    """A recorded rollout from the image: `steps` passes a chunk, and the cache passes."""
    total = Work()
    chunks = geometry.chunks(clip.frames)
    for i in range(chunks):
        start, size = geometry.start(i), geometry.size(i)
        plan = cached(geometry, geometry.kept(start, size), start, size)
        if i:
            total += transformer(config, clip, plan, prompts=1) * steps
        if i < chunks - 1:
            total += cache_pass(config, clip, plan)
    return total


def replay(config: WanConfig, clip: Clip, geometry: ChunkGeometry) -> Work:
    """The exit passes of all chunks again, in one."""
    plan = replay_plan(clip, geometry)
    return transformer(config, clip, plan, prompts=clip.frames - geometry.first)


def replay_plan(clip: Clip, geometry: ChunkGeometry) -> Plan:
    """Its attention plan: the cache lacks the last chunk."""
    return parallel(geometry, clip.frames - geometry.chunk, clip.frames, 1)


def discriminator(
    config: WanConfig,
    clip: Clip,
    geometry: ChunkGeometry,
    heads: DiscriminatorConfig,
    levels: int = 1,
) -> Work:
    """The backbone up to its last tap, and the heads. levels: noise levels that it is given."""
    plan = bidirectional(clip.frames)
    if heads.causal:
        plan = block_causal(geometry, clip.frames)
    work = transformer(
        config, clip, plan, prompts=clip.frames, levels=levels, layers=heads.taps[-1] + 1,
        head=False,
    )  # fmt: skip
    d, taps = config.width, len(heads.taps)
    queries = clip.frames - 1 if heads.per_frame else 1
    n = (clip.frames - 1 if heads.per_frame else clip.frames) * clip.tokens
    head = 2 * n * 2 * d * d + 2 * d * d + 2 * queries * (d * d + 2 * d * config.ffn_dim)
    return work + Work(taps * head + 2 * queries * taps * d, taps * 4 * d * n)


# -- activations ----------------------------------------------------------------------------------


def kept_by_block(config: WanConfig, clip: Clip, plan: Plan, *, prompts: int, bf16: bool) -> int:
    """Bytes that one block keeps for the backward pass if it is not checkpointed.

    bf16: computed in bfloat16 under autocast; the residual stream stays float32.
    """
    d, size = config.width, 2 if bf16 else 4
    n = _sizes(plan, clip)[0]
    per_token = (72 if bf16 else 88) * d + size * 2 * config.ffn_dim
    # Statistics of six norms, and the log-sum-exp of both attentions.
    per_token += 36 + 8 * config.num_attention_heads
    keys = sum(len(g.keys) for g in plan) * clip.tokens
    # Several groups: their queries are gathered, and keys seen by several of them are copied.
    gathered = (n + 2 * (keys - n)) * d * size if len(plan) > 1 else 0
    text = prompts * clip.text * ((12 if bf16 else 16) * d + 4)
    return n * per_token + gathered + text


def graph(
    config: WanConfig,
    clip: Clip,
    plan: Plan,
    *,
    prompts: int,
    bf16: bool,
    checkpointed: bool,
    layers: int | None = None,
    clips: int = 1,
    passes: int = 1,
) -> float:
    """Bytes of activations at the height of a backward pass through `layers` blocks.

    clips: in each pass; passes: alive together. Checkpointed, a block keeps its float32 input, and
    one block at a time keeps everything.
    """
    count = config.num_layers if layers is None else layers
    n = _sizes(plan, clip)[0]
    block = clips * kept_by_block(config, clip, plan, prompts=prompts, bf16=bf16)
    if checkpointed:
        return passes * count * clips * 4 * n * config.width + (1 + BACKWARD_EXTRA) * block
    return (passes * count + BACKWARD_EXTRA) * block


def cache_bytes(config: WanConfig, clip: Clip, frames: int, *, bf16: bool) -> int:
    """K and V of so many latent frames, in all layers."""
    return 2 * frames * clip.tokens * config.width * config.num_layers * (2 if bf16 else 4)
