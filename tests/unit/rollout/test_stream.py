"""The rollout against whole-clip passes, and the gradient of its two-phase training step."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from aad1.core import chunks as plans
from aad1.core.chunks import ChunkGeometry, Group, block_causal
from aad1.core.kv_cache import KVCache, Piece
from aad1.errors import UserError
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Rollout, record, replay, seeded_noise

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=3, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    torch.manual_seed(0)
    net = WanTransformer(TINY).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def geometries() -> list[ChunkGeometry]:
    out = []
    for chunk, sink, past in itertools.product((1, 2, 4), (0, 1, 3), (0, 1, 4, 7)):
        for relative in (True, False):
            out.append(
                ChunkGeometry(chunk=chunk, sink=sink, window=sink + chunk + past, relative=relative)
            )
    return out


def cached_velocities(model: WanTransformer, x: torch.Tensor, text: torch.Tensor,
                      geometry: ChunkGeometry) -> torch.Tensor:  # fmt: skip
    """Chunk by chunk over the cache, every pass at one noise level, as a whole clip would be."""
    cache, out = KVCache(), []
    level = torch.full((len(x),), 0.3)
    for i in range(geometry.chunks(x.shape[2])):
        start, size = geometry.start(i), geometry.size(i)
        part = x[:, :, start : start + size]
        plan = plans.cached(geometry, cache.frames, start, size)
        past = cache.layers or None
        out.append(model(part, level, text, plan=plan, past=past))
        cache = cache.append(
            model.keys_values(part, level, text, plan=plan, past=past), geometry, start
        )
    return torch.cat(out, 2)


def clip(geometry: ChunkGeometry, chunks: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    frames = geometry.frames(chunks)
    return torch.randn(2, 4, frames, 2, 4), torch.randn(2, 3, 8)


@pytest.mark.parametrize("geometry", geometries(), ids=str)
@torch.no_grad()
def test_cached_chunks_equal_a_whole_clip_pass(
    model: WanTransformer, geometry: ChunkGeometry
) -> None:
    x, text = clip(geometry)
    whole = model(x, torch.full((2,), 0.3), text, plan=block_causal(geometry, x.shape[2]))
    got = cached_velocities(model, x, text, geometry)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def masked_reference(
    model: WanTransformer, x: torch.Tensor, text: torch.Tensor, geometry: ChunkGeometry
) -> torch.Tensor:
    """One pass with one RoPE and a boolean mask built from the definition, frame by frame."""
    frames, tokens = x.shape[2], x.shape[3] * x.shape[4] // 4
    chunk_of = [0] * geometry.first + [
        1 + (f - geometry.first) // geometry.chunk for f in range(geometry.first, frames)
    ]
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for q, k in itertools.product(range(frames), range(frames)):
        same = chunk_of[q] == chunk_of[k]
        start = geometry.start(chunk_of[q])
        size = geometry.size(chunk_of[q])
        recent = start - (geometry.window - geometry.sink - size) <= k < start
        mask[q, k] = same or (k < start and (k < geometry.sink or recent))
    mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    plain = F.scaled_dot_product_attention

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own = q.shape[-2] == k.shape[-2] == len(mask)  # not the text's cross-attention
        return plain(q, k, v, attn_mask=mask if own else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        return model(x, torch.full((2,), 0.3), text)


@pytest.mark.parametrize("chunk,sink,past", [(4, 1, 4), (1, 0, 2), (2, 3, 5), (4, 1, 0)])
def test_absolute_positions_equal_one_masked_pass(
    model: WanTransformer, chunk: int, sink: int, past: int
) -> None:
    geometry = ChunkGeometry(chunk=chunk, sink=sink, window=sink + chunk + past, relative=False)
    x, text = clip(geometry)
    with torch.no_grad():
        got = cached_velocities(model, x, text, geometry)
    torch.testing.assert_close(
        got, masked_reference(model, x, text, geometry), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "wrong", [dict(window=8), dict(window=10), dict(sink=0), dict(relative=False)]
)
@torch.no_grad()
def test_a_wrong_window_sink_or_position_is_seen(
    model: WanTransformer, wrong: dict[str, int]
) -> None:
    """Planted bugs: the comparison above would notice each of them."""
    right = ChunkGeometry()
    x, text = clip(right)
    whole = model(x, torch.full((2,), 0.3), text, plan=block_causal(right, x.shape[2]))
    kwargs = dict(chunk=4, sink=1, window=9, relative=True) | wrong
    got = cached_velocities(model, x, text, ChunkGeometry(**kwargs))  # type: ignore[arg-type]
    assert float((got - whole).abs().max()) > 1e-3


def test_default_geometry_is_the_papers() -> None:
    geometry = ChunkGeometry()
    assert [geometry.size(i) for i in range(6)] == [1, 4, 4, 4, 4, 4]
    assert geometry.kept(1, 4) == (0,)
    assert geometry.kept(17, 4) == (0, 13, 14, 15, 16)
    group: Group = block_causal(geometry, 21)[-1]
    assert group.query_positions == (5, 6, 7, 8)
    assert group.key_positions == tuple(range(9))


def test_impossible_geometry_names_the_value() -> None:
    with pytest.raises(UserError, match="window must be at least sink . chunk = 5 frames, got 4"):
        ChunkGeometry(window=4)
    with pytest.raises(UserError, match="chunk must be at least 1, got 0"):
        ChunkGeometry(chunk=0)
    with pytest.raises(UserError, match="20 latent frames"):
        ChunkGeometry().chunks(20)


def start(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(batch, 4, 1, 2, 4), torch.randn(batch, 3, 8)


def roll(model: WanTransformer, seeds: list[int], image: torch.Tensor, text: torch.Tensor,
         chunks: int, sigmas: tuple[float, ...] = (1.0,)) -> torch.Tensor:  # fmt: skip
    geometry = ChunkGeometry()
    noise = seeded_noise(seeds, geometry, (4, 2, 4), torch.device("cpu"))
    parts = Rollout(model, geometry, sigmas).stream(image, lambda i: text, noise, chunks)
    return torch.cat(list(parts), 2)


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.8)])
def test_noise_depends_on_seed_and_chunk_only(
    model: WanTransformer, sigmas: tuple[float, ...]
) -> None:
    image, text = start()
    long = roll(model, [5, 6], image, text, 20, sigmas)
    short = roll(model, [5, 6], image, text, 5, sigmas)
    torch.testing.assert_close(long[:, :, :20], short, atol=0, rtol=0)
    swapped = roll(model, [6, 5], image.flip(0), text.flip(0), 5, sigmas).flip(0)
    torch.testing.assert_close(swapped, short, atol=1e-5, rtol=1e-5)
    alone = roll(model, [6], image[1:], text[1:], 5, sigmas)
    torch.testing.assert_close(alone, short[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(roll(model, [7, 6], image, text, 1, sigmas)[0], short[0, :, :4])


def test_last_chunk_has_no_cache_pass(
    model: WanTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = WanTransformer.keys_values

    def counted(self: WanTransformer, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(WanTransformer, "keys_values", counted)
    roll(model, [1, 2], *start(), chunks=3)
    assert len(calls) == 3  # the image and two of the three chunks


def test_hundreds_of_chunks_stay_small_and_finite(model: WanTransformer) -> None:
    geometry = ChunkGeometry()
    image, text = start(1)
    rollout = Rollout(model, geometry)
    noise = seeded_noise([0], geometry, (4, 2, 4), torch.device("cpu"))
    with torch.no_grad():
        state = rollout.prefill(image, text)
        for _ in range(300):
            x0 = rollout.generate(state, text, noise).x0.clamp(-3, 3)
            state = rollout.commit(state, x0, text)
            assert len(state.cache.frames) <= geometry.window - geometry.chunk
            assert state.cache.layers[0][0].shape[1] == len(state.cache.frames)
    assert state.cache.frames == (0, 1197, 1198, 1199, 1200)
    assert bool(torch.isfinite(x0).all())


def test_text_to_video_begins_from_noise(model: WanTransformer) -> None:
    geometry = ChunkGeometry(first=4)
    noise = seeded_noise([0], geometry, (4, 2, 4), torch.device("cpu"))
    rollout = Rollout(model, geometry)
    parts = list(rollout.stream(None, lambda i: torch.zeros(1, 3, 8), noise, 3))
    assert [p.shape[2] for p in parts] == [4, 4, 4]


def clone(model: WanTransformer) -> WanTransformer:
    other = WanTransformer(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def plain_clip(rollout: Rollout, image: torch.Tensor, text: torch.Tensor,
               noise: object, frames: int) -> torch.Tensor:  # fmt: skip
    """The plain graph: every exit pass keeps its gradient, the cache is detached."""
    geometry = rollout.geometry
    state = rollout.prefill(image, text[:, 0])
    state = detached(state)
    out = []
    for i in range(1, geometry.chunks(frames)):
        context = text[:, geometry.start(i)]
        x0 = rollout.generate(state, context, noise).x0  # type: ignore[arg-type]
        out.append(x0)
        state = detached(rollout.commit(state, x0.detach(), context))
    return torch.cat(out, 2)


def detached(state: object) -> object:
    from aad1.rollout.stream import State

    assert isinstance(state, State)
    layers = tuple((k.detach(), v.detach()) for k, v in state.cache.layers)
    return State(state.chunk, state.start, KVCache((Piece(state.cache.frames, layers),)))


@pytest.mark.parametrize(
    "geometry", [ChunkGeometry(), ChunkGeometry(chunk=2, sink=2, window=9),
                 ChunkGeometry(relative=False)], ids=str)  # fmt: skip
def test_two_phase_gradient_is_that_of_the_plain_graph(
    model: WanTransformer, geometry: ChunkGeometry
) -> None:
    a, b = clone(model), clone(model)
    frames = 13
    torch.manual_seed(4)
    image = torch.randn(2, 4, 1, 2, 4)
    text = chunk_text(torch.randn(2, frames, 3, 8), geometry, frames)
    target = torch.randn(2, 4, frames - 1, 2, 4)
    noise = seeded_noise([0, 1], geometry, (4, 2, 4), torch.device("cpu"))

    x = plain_clip(Rollout(a, geometry), image, text, noise, frames)
    ((x - target) ** 2).mean().backward()

    rollout = Rollout(b, geometry)
    recorded = record(rollout, image, text, noise, frames)
    leaf = recorded.x0[:, :, 1:].clone().requires_grad_()
    (dx,) = torch.autograd.grad(((leaf - target) ** 2).mean(), leaf)
    again = replay(rollout, recorded, text)
    torch.testing.assert_close(again, recorded.x0[:, :, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, again, atol=1e-5, rtol=1e-5)
    again.backward(dx)
    largest = max(float(p.grad.abs().max()) for p in a.parameters() if p.grad is not None)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None or float(q.grad.abs().max()) == 0
        else:
            torch.testing.assert_close(q.grad, p.grad, atol=2e-6 * largest, rtol=1e-4)


def test_no_gradient_from_one_chunk_to_earlier_noise(model: WanTransformer) -> None:
    """A missing detach would let the last chunk's loss reach earlier chunks' noise."""
    geometry = ChunkGeometry()
    image, text = torch.randn(1, 4, 1, 2, 4), torch.randn(1, 13, 3, 8)
    noise = seeded_noise([0], geometry, (4, 2, 4), torch.device("cpu"))
    recorded = record(Rollout(model, geometry), image, text, noise, 13)
    assert not any(k.requires_grad or v.requires_grad for k, v in recorded.past)
    x_t = recorded.x_t.clone().requires_grad_()
    leaf = type(recorded)(recorded.x0, x_t, recorded.sigma, recorded.past)
    out = replay(Rollout(model, geometry), leaf, text)
    (g,) = torch.autograd.grad(out[:, :, -4:].sum(), x_t)
    assert float(g[:, :, :-4].abs().max()) == 0
    assert float(g[:, :, -4:].abs().max()) > 0


def test_cache_is_written_from_clean_latents(model: WanTransformer) -> None:
    """Noisy instead of clean K/V in the cache would change the next chunk."""
    geometry = ChunkGeometry()
    image, text = torch.randn(1, 4, 1, 2, 4), torch.randn(1, 9, 3, 8)
    noise = seeded_noise([0], geometry, (4, 2, 4), torch.device("cpu"))
    recorded = record(Rollout(model, geometry), image, text, noise, 9)
    clean = recorded.x0[:, :, :5]
    zero = torch.zeros(1)
    with torch.no_grad():
        want = model.keys_values(
            clean, zero, chunk_text(text, geometry, 5), plan=block_causal(geometry, 5)
        )
    for (k, v), (wk, wv) in zip(recorded.past, want, strict=True):
        torch.testing.assert_close(k, wk, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, wv, atol=1e-5, rtol=1e-5)


def chunk_text(text: torch.Tensor, geometry: ChunkGeometry, frames: int) -> torch.Tensor:
    starts = [
        geometry.start(0 if f < geometry.first else 1 + (f - geometry.first) // geometry.chunk)
        for f in range(frames)
    ]
    return text[:, starts]


def test_bad_sigmas_are_refused(model: WanTransformer) -> None:
    for bad in ((), (0.9,), (1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(UserError, match="sigmas"):
            Rollout(model, ChunkGeometry(), bad)


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.8)])
def test_streaming_equals_the_training_rollout(
    model: WanTransformer, sigmas: tuple[float, ...]
) -> None:
    """What is served is what was trained: same chunks, same clean K/V behind each of them."""
    geometry = ChunkGeometry()
    torch.manual_seed(6)
    image = torch.randn(2, 4, 1, 2, 4)
    text = chunk_text(torch.randn(2, 17, 3, 8), geometry, 17)
    noise = seeded_noise([3, 4], geometry, (4, 2, 4), torch.device("cpu"))
    rollout = Rollout(model, geometry, sigmas)
    recorded = record(rollout, image, text, noise, 17)
    parts = rollout.stream(image, lambda i: text[:, geometry.start(i)], noise, 4)
    streamed = torch.cat([image, *parts], 2)
    torch.testing.assert_close(streamed, recorded.x0, atol=1e-5, rtol=1e-5)


def test_every_chunk_step_and_seed_has_noise_of_its_own() -> None:
    noise = seeded_noise([0, 1], ChunkGeometry(), (4, 2, 4), torch.device("cpu"))
    draws = [noise(chunk, step)[b] for chunk in (1, 2, 3) for step in (0, 1) for b in (0, 1)]
    for a, b in itertools.combinations(draws, 2):
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) < 0.5
    assert abs(float(torch.stack(draws).std()) - 1) < 0.1


def test_streaming_keeps_the_consumers_grad_mode(model: WanTransformer) -> None:
    image, text = start()
    noise = seeded_noise([0, 1], ChunkGeometry(), (4, 2, 4), torch.device("cpu"))
    for x0 in Rollout(model, ChunkGeometry()).stream(image, lambda i: text, noise, 2):
        assert torch.is_grad_enabled()
        assert not x0.requires_grad
