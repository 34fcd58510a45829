"""Few-step streaming against a plain reimplementation of Self-Forcing's published inference loop.

The reference shares nothing with the package: original Wan names, channels-last tokens, one big
K/V cache that every pass writes rotated keys into, noise levels looked up in a table of 1,000.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aad1.models.weights import read_tensors
from aad1.pipeline import Pipeline
from aad1.rollout.stream import seeded_noise
from aad1.streaming import Stream

pytest.importorskip("diffusers")

Weights = dict[str, torch.Tensor]
HEADS, HEAD_DIM, LAYERS = 2, 128, 2
SIZE = (48, 32)
PROMPT = "a red cat walks"

# Wan's own names, from those of diffusers (algorithm.md, section 1).
ORIGINAL = [
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"to_out\.0", "o"),
    (r"\.to_([qkv])", r".\1"),
    (r"\.norm2\.", ".norm3."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
]


@pytest.fixture(scope="module")
def checkpoint(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer as Self-Forcing publishes one; its `generator` is another network."""
    theirs = read_tensors(wan_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    state = {}
    for name, value in theirs.items():
        for pattern, new in ORIGINAL:
            name = re.sub(pattern, new, name)
        state[f"model.{name}"] = value
    path = tmp_path_factory.mktemp("sf") / "self_forcing_dmd.pt"
    torch.save({"generator": {k: -v for k, v in state.items()}, "generator_ema": state}, path)
    return path


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> Weights:
    state = torch.load(checkpoint, weights_only=True)["generator_ema"]
    return {name.removeprefix("model."): value for name, value in state.items()}


class Reference:
    """The causal Wan and its loop, [B, F, C, H, W] latents as published; float32, RoPE in float64.

    window: frames that stay in the cache, the current block included.
    sink: LongLive's first frames, which stay; then keys are cached as they are before rotation, and
        rotated at their place among those that are seen, as it does for unlimited length.
    """

    def __init__(self, w: Weights, window: int, sink: int = 0, shift: float = 5) -> None:
        self.w, self.window, self.sink = w, window, sink
        steps = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
        self.sigmas = shift * steps / (1 + (shift - 1) * steps)
        self.timesteps = self.sigmas * 1000

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def heads(self, x: torch.Tensor, name: str, norm: str | None) -> torch.Tensor:
        y = self.linear(x, name)
        if norm:
            scale = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            y = y * scale * self.w[f"{norm}.weight"]
        return y.unflatten(-1, (HEADS, HEAD_DIM))

    def rotate(self, x: torch.Tensor, start: int, grid: tuple[int, int, int]) -> torch.Tensor:
        f, h, w = grid
        complex_dims = HEAD_DIM // 2
        side = complex_dims // 3
        dims = (complex_dims - 2 * side, side, side)
        places = (
            torch.arange(start, start + f).view(f, 1, 1).expand(f, h, w),
            torch.arange(h).view(1, h, 1).expand(f, h, w),
            torch.arange(w).view(1, 1, w).expand(f, h, w),
        )
        angles = [
            place.reshape(-1, 1).double()
            / 10000 ** (torch.arange(0, 2 * d, 2, dtype=torch.float64) / (2 * d))
            for place, d in zip(places, dims, strict=True)
        ]
        angle = torch.cat(angles, 1)
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(HEAD_DIM)
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).flatten(2)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-6)

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, start: int
    ) -> torch.Tensor:
        """x [B, f, C, H, W], t [B, f] in [0, 1000]; writes its keys from frame `start` on."""
        w = self.w
        b, f, c, height, width = x.shape
        grid = (f, height // 2, width // 2)
        patches = x.unflatten(3, (-1, 2)).unflatten(5, (-1, 2))  # B f C h p w q
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        d = HEADS * HEAD_DIM
        h = patches @ w["patch_embedding.weight"].view(d, -1).T + w["patch_embedding.bias"]
        per_frame = grid[1] * grid[2]
        half = w["time_embedding.0.weight"].shape[1] // 2
        powers = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = t.double()[..., None] * powers
        e = torch.cat([angle.cos(), angle.sin()], -1).float()
        e = self.linear(F.silu(self.linear(e, "time_embedding.0")), "time_embedding.2")
        e0 = self.linear(F.silu(e), "time_projection.1").unflatten(-1, (6, d))
        context = F.gelu(self.linear(text, "text_embedding.0"), approximate="tanh")
        context = self.linear(context, "text_embedding.2")
        for i in range(LAYERS):
            n = f"blocks.{i}"
            mod = (w[f"{n}.modulation"][:, None] + e0).repeat_interleave(per_frame, 1).unbind(2)
            y = self.norm(h) * (1 + mod[1]) + mod[0]
            q = self.heads(y, f"{n}.self_attn.q", f"{n}.self_attn.norm_q")
            k = self.heads(y, f"{n}.self_attn.k", f"{n}.self_attn.norm_k")
            v = self.heads(y, f"{n}.self_attn.v", None)
            cache_k, cache_v = self.cache[i]
            first, last = start * per_frame, (start + f) * per_frame
            if self.sink:
                cache_k[:, first:last], cache_v[:, first:last] = k, v
                late = max(self.sink, start + f - (self.window - self.sink))
                parts = (slice(0, min(self.sink * per_frame, last)), slice(late * per_frame, last))
                k, v = (torch.cat([c[:, p] for p in parts], 1) for c in (cache_k, cache_v))
                frames = k.shape[1] // per_frame
                k = self.rotate(k, 0, (frames, *grid[1:]))
                y = self.attention(self.rotate(q, frames - f, grid), k, v)
            else:
                q, k = self.rotate(q, start, grid), self.rotate(k, start, grid)
                cache_k[:, first:last], cache_v[:, first:last] = k, v
                seen = slice(max(0, last - self.window * per_frame), last)
                y = self.attention(q, cache_k[:, seen], cache_v[:, seen])
            h = h + self.linear(y, f"{n}.self_attn.o") * mod[2]
            y = self.norm(h) * w[f"{n}.norm3.weight"] + w[f"{n}.norm3.bias"]
            q = self.heads(y, f"{n}.cross_attn.q", f"{n}.cross_attn.norm_q")
            k = self.heads(context, f"{n}.cross_attn.k", f"{n}.cross_attn.norm_k")
            v = self.heads(context, f"{n}.cross_attn.v", None)
            h = h + self.linear(self.attention(q, k, v), f"{n}.cross_attn.o")
            y = self.norm(h) * (1 + mod[4]) + mod[3]
            y = F.gelu(self.linear(y, f"{n}.ffn.0"), approximate="tanh")
            h = h + self.linear(y, f"{n}.ffn.2") * mod[5]
        shift, scale = (w["head.modulation"][:, None] + e[:, :, None]).unbind(2)
        shift = shift.repeat_interleave(per_frame, 1)
        scale = scale.repeat_interleave(per_frame, 1)
        y = self.linear(self.norm(h) * (1 + scale) + shift, "head.head")
        y = y.view(b, *grid, 2, 2, c)
        return y.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, c, height, width)

    def sigma(self, t: float) -> float:
        return float(self.sigmas[int((self.timesteps - t).abs().argmin())])

    @torch.no_grad()
    def inference(
        self,
        noise: Callable[[int, int], torch.Tensor],
        text: torch.Tensor,
        blocks: int,
        step_list: list[int],
    ) -> torch.Tensor:
        """noise(block, step) [B, f, C, H, W]; step_list as in the configs: before it is warped."""
        table = torch.cat([self.timesteps, torch.zeros(1)])
        return self.loop(noise, text, blocks, [float(table[1000 - step]) for step in step_list])

    @torch.no_grad()
    def loop(
        self,
        noise: Callable[[int, int], torch.Tensor],
        text: torch.Tensor,
        blocks: int,
        warped: list[float],
    ) -> torch.Tensor:
        """The same, for the timesteps that the network is shown."""
        b, f, _, height, width = noise(0, 0).shape
        tokens = blocks * f * (height // 2) * (width // 2)
        self.cache = [
            (torch.zeros(b, tokens, HEADS, HEAD_DIM), torch.zeros(b, tokens, HEADS, HEAD_DIM))
            for _ in range(LAYERS)
        ]
        output = []
        for block in range(blocks):
            start, x = block * f, noise(block, 0)
            for index, t in enumerate(warped):
                v = self.velocity(x, torch.full((b, f), t), text, start)
                x0 = x - self.sigma(t) * v
                if index < len(warped) - 1:
                    s = self.sigma(warped[index + 1])
                    x = (1 - s) * x0 + s * noise(block, index + 1)
            output.append(x0)
            self.velocity(x0, torch.zeros(b, f), text, start)  # the clean pass; writes the cache
        return torch.cat(output, 1)


def published(weights: Weights, stream: Stream, blocks: int, steps: list[int]) -> torch.Tensor:
    """The reference with the noise of `stream`, as [B, C, F, h, w]."""
    shape = (16, SIZE[1] // 8, SIZE[0] // 8)
    draw = seeded_noise([stream.seed], stream.rollout.geometry, shape, torch.device("cpu"))
    text = stream.pipeline.encode_prompt(PROMPT)
    reference = Reference(weights, window=21)
    out = reference.inference(lambda i, n: draw(i, n).transpose(1, 2), text, blocks, steps)
    return out.transpose(1, 2)


def both_paths(pipe: Pipeline, blocks: int) -> tuple[Stream, list[torch.Tensor]]:
    """A stream, and its latents on the plain and on the fast path."""
    stream = pipe.stream(None, PROMPT, seed=5, size=SIZE)
    stream.chunks = blocks
    fast = pipe.fast_rollout(stream.rollout)
    assert fast is not None
    text = pipe.encode_prompt(PROMPT)
    parts = fast.stream(None, lambda i: text, stream.noise(), blocks)
    return stream, [torch.cat(list(x), 2) for x in (stream.latents(), parts)]


@pytest.mark.parametrize("blocks", [4, 9])  # 4 blocks fill the window of 12, 9 roll it
def test_longlive_equals_its_loop(
    wan_folder: Path, checkpoint: Path, weights: Weights, blocks: int
) -> None:
    pipe = Pipeline.from_pretrained(checkpoint, base=wan_folder, recipe="longlive")
    stream, made = both_paths(pipe, blocks)
    noise, text = stream.noise(), pipe.encode_prompt(PROMPT)

    def published(**options: int) -> torch.Tensor:
        reference = Reference(weights, **{"window": 12, "sink": 3, **options})
        draw = lambda i, n: noise(i, n).transpose(1, 2)  # noqa: E731
        return reference.inference(draw, text, blocks, [1000, 750, 500, 250]).transpose(1, 2)

    want = published()
    for got in made:
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.std()), rtol=1e-4)
    if blocks == 4:  # nothing was left out yet, so the other way to count gives the same
        torch.testing.assert_close(published(sink=0), want, atol=1e-3, rtol=1e-3)
    else:
        for wrong in (dict(window=11), dict(sink=2), dict(sink=0)):
            assert float((published(**wrong) - want).abs().max()) > 1e-3 * float(want.std())


def test_causvid_equals_its_loop(wan_folder: Path, checkpoint: Path, weights: Weights) -> None:
    """Timesteps 1000, 757, 522 as they are, on a table of shift 8, from which sigmas are looked up:
    they lie up to 0.0003 beside the timesteps, hence the tolerance."""
    pipe = Pipeline.from_pretrained(checkpoint, base=wan_folder, recipe="causvid")
    stream, made = both_paths(pipe, 7)
    noise, text = stream.noise(), pipe.encode_prompt(PROMPT)

    def published(steps: list[float]) -> torch.Tensor:
        draw = lambda i, n: noise(i, n).transpose(1, 2)  # noqa: E731
        return Reference(weights, window=21, shift=8).loop(draw, text, 7, steps).transpose(1, 2)

    want = published([1000, 757, 522])
    error = max(float((got - want).norm() / want.norm()) for got in made)
    other = published([1000, 752, 522])
    assert error < 0.2 * float((other - want).norm() / want.norm())
    assert error < 3e-3


CASES = [
    # 9 blocks of 3 frames roll the window of 21 on; 7 are the clip of 21 frames itself
    ("self-forcing", None, 3, [1000, 750, 500, 250], 7),
    ("self-forcing", None, 3, [1000, 750, 500, 250], 9),
    ("self-forcing", 2, 3, [1000, 500], 4),
    ("one-forcing", None, 3, [1000], 5),
    ("one-forcing-frame", None, 1, [1000], 23),
]


@pytest.mark.parametrize("recipe,steps,chunk,step_list,blocks", CASES)
def test_streaming_equals_the_published_loop(
    wan_folder: Path, checkpoint: Path, weights: Weights, recipe: str, steps: int | None,
    chunk: int, step_list: list[int], blocks: int,
) -> None:  # fmt: skip
    pipe = Pipeline.from_pretrained(checkpoint, base=wan_folder, recipe=recipe, steps=steps)
    stream = pipe.stream(None, PROMPT, seed=5, size=SIZE)
    stream.chunks = blocks
    parts = list(stream.latents())
    assert [p.shape[2] for p in parts] == [chunk] * blocks
    got = torch.cat(parts, 2)
    want = published(weights, stream, blocks, step_list)
    assert 0.3 < float(want.std()) < 100
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.std()), rtol=1e-4)
    fast = pipe.fast_rollout(stream.rollout)  # what users stream on
    assert fast is not None
    text = pipe.encode_prompt(PROMPT)
    same = torch.cat(list(fast.stream(None, lambda i: text, stream.noise(), blocks)), 2)
    torch.testing.assert_close(same, want, atol=1e-4 * float(want.std()), rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(window=20),
        dict(sink=1),
        dict(sink=1, relative=False),
        dict(chunk=4, first=4),
    ],
)
def test_a_wrong_geometry_is_seen(
    wan_folder: Path, weights: Weights, wrong: dict[str, int]
) -> None:
    """Planted bugs: the comparison above would notice each of them."""
    pipe = Pipeline.from_pretrained(wan_folder, recipe="self-forcing", steps=1)
    right = pipe.stream(None, PROMPT, seed=5, size=SIZE)
    want = published(weights, right, 9, [1000])
    pipe.info = replace(pipe.info, geometry=replace(pipe.info.geometry, **wrong))
    stream = pipe.stream(None, PROMPT, seed=5, size=SIZE)
    stream.chunks = 9
    got = torch.cat(list(stream.latents()), 2)[:, :, :27]
    assert float((got - want).abs().max()) > 1e-3 * float(want.std())


def test_positions_from_the_videos_start_are_the_same_without_a_sink(wan_folder: Path) -> None:
    """Why the recipes may count from the first visible frame, which never grows."""
    pipe = Pipeline.from_pretrained(wan_folder, recipe="self-forcing", steps=1)
    made = []
    for relative in (True, False):
        pipe.info = replace(pipe.info, geometry=replace(pipe.info.geometry, relative=relative))
        stream = pipe.stream(None, PROMPT, seed=5, size=SIZE)
        stream.chunks = 9
        made.append(torch.cat(list(stream.latents()), 2))
    torch.testing.assert_close(made[0], made[1], atol=3e-4, rtol=1e-4)


def test_an_image_may_take_the_place_of_the_first_chunk(wan_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="self-forcing")
    image = torch.rand(20, 40, 3)
    stream = pipe.stream(image, PROMPT, size=SIZE)
    stream.chunks = 2
    assert stream.rollout.geometry.first == 1
    assert [len(part) for part in stream] == [13, 12]
    assert stream.frames(2) == 25


@pytest.mark.parametrize(
    "recipe,first,more", [("self-forcing", 9, 12), ("one-forcing-frame", 1, 4)]
)
def test_text_to_video_frames_and_seconds(
    wan_folder: Path, recipe: str, first: int, more: int
) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe=recipe, steps=1)
    whole = pipe(None, PROMPT, num_chunks=3, seed=1, size=SIZE)
    assert whole.shape == (first + 2 * more, 32, 48, 3)
    stream = pipe.stream(None, PROMPT, seed=1, size=SIZE)
    parts = [next(stream) for _ in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert [stream.frames(n) for n in (1, 2, 3)] == [first, first + more, first + 2 * more]
    for seconds in (0.01, first / 16, (first + 1) / 16, 5.0):
        chunks = stream.chunks_for(seconds)
        assert stream.frames(chunks) >= round(seconds * 16)
        assert chunks == 1 or stream.frames(chunks - 1) < round(seconds * 16)


def test_a_new_prompt_holds_from_the_next_chunk_on(wan_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="one-forcing")
    plain = pipe.stream(None, "a cat", seed=1, size=SIZE)
    steered = pipe.stream(None, "a cat", seed=1, size=SIZE)
    first = next(plain)
    assert torch.equal(next(steered), first)
    steered.prompt = "two red dogs"
    assert not torch.equal(next(steered), next(plain))


def live_bytes() -> int:
    """Of all tensors that Python knows."""
    while gc.collect():  # what one round frees may be what held the rest
        pass
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors if not t.is_meta}.values())  # fmt: skip


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("recipe,full", [("self-forcing", 8), ("one-forcing-frame", 24)])
def test_an_endless_stream_takes_the_same_memory(
    wan_folder: Path, recipe: str, full: int, fast: bool
) -> None:
    """After `full` chunks, which fill the window, to the byte; a list of frames would show."""
    pipe = Pipeline.from_pretrained(wan_folder, recipe=recipe, steps=1, fast=fast)
    stream = pipe.stream(None, PROMPT, size=(32, 32))
    for _ in range(full):
        frames = next(stream)
    before = live_bytes()
    for _ in range(4):
        frames = next(stream)
        assert live_bytes() == before
    kept = [frames, next(stream)]
    assert live_bytes() == before + kept[0].nbytes  # the measure sees one chunk of frames


def test_an_endless_rollout_builds_nothing_new(wan_folder: Path) -> None:
    """Position tables and cache keep their size once the window is full."""
    from aad1.core.rope import rope_table

    pipe = Pipeline.from_pretrained(wan_folder, recipe="self-forcing", steps=1)
    latents = pipe.stream(None, PROMPT, size=(32, 32)).latents()
    for _ in range(9):
        next(latents)
    before = rope_table.cache_info().misses
    for _ in range(6):
        next(latents)
    assert rope_table.cache_info().misses == before
