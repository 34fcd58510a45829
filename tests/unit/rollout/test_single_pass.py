"""The rollout without a clean cache pass: against one masked pass, and through the three stages."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from aad1.core import chunks as plans
from aad1.core.chunks import ChunkGeometry, block_causal
from aad1.core.flow import x0_from_velocity
from aad1.core.kv_cache import KVCache
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Recorded, Rollout, record, seeded_noise
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner, noise_from
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.ode_init import OdeInit, OdeInitConfig

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=3, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip
SINGLE = ChunkGeometry(single_pass=True)
FRAMES = 13


def network(seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    net = WanTransformer(TINY).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return network()


def clip(model: WanTransformer, geometry: ChunkGeometry, sigmas: tuple[float, ...]
         ) -> tuple[Recorded, torch.Tensor]:  # fmt: skip
    """A rollout of 13 frames, and its text per frame; the prompt changes with the chunk."""
    torch.manual_seed(1)
    frames = geometry.frames(4)
    image = torch.randn(2, 4, geometry.first, 2, 4)
    sizes = [geometry.size(i) for i in range(4)]
    text = torch.randn(2, 4, 3, 8).repeat_interleave(torch.tensor(sizes), 1)
    noise = seeded_noise([0, 1], geometry, (4, 2, 4), torch.device("cpu"))
    return record(Rollout(model, geometry, sigmas), image, text, noise, frames), text


def as_one_pass(recorded: Recorded, first: int, image_level: float = 0.0
                ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The clip that one pass sees: the clean image, then every chunk's noisy input; its levels."""
    x = torch.cat([recorded.x0[:, :, :first], recorded.x_t], 2)
    level = torch.full((len(x), x.shape[2]), recorded.sigma)
    level[:, :first] = image_level
    return x, level


def masked_attention(geometry: ChunkGeometry, frames: int, tokens: int) -> Any:
    """Attention under a boolean mask written from the definition, frame by frame: a frame sees its
    own chunk, the sink, and the last of the frames before its chunk."""
    chunk_of = [
        0 if f < geometry.first else 1 + (f - geometry.first) // geometry.chunk
        for f in range(frames)
    ]
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for q, k in itertools.product(range(frames), range(frames)):
        start, size = geometry.start(chunk_of[q]), geometry.size(chunk_of[q])
        oldest = start - (geometry.window - geometry.sink - size)
        mask[q, k] = chunk_of[q] == chunk_of[k] or (
            k < start and (k < geometry.sink or k >= oldest)
        )
    mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    plain = F.scaled_dot_product_attention

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own = q.shape[-2] == k.shape[-2] == len(mask)  # not the text's cross-attention
        return plain(q, k, v, attn_mask=mask if own else None)

    return masked


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.8)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [dict(), dict(window=5), dict(window=13), dict(chunk=2, sink=3, window=8),
     dict(chunk=3, first=3, sink=0, window=9)],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_cached_chunks_equal_one_pass_over_the_noisy_clip(
    model: WanTransformer, shape: dict[str, int], sigmas: tuple[float, ...]
) -> None:
    """Every chunk reads K and V of the others' noisy inputs: so does a whole-clip pass over them,
    with the plan of the chunks' visible sets, or under one boolean mask."""
    for relative in (True, False):
        geometry = ChunkGeometry(**shape, relative=relative, single_pass=True)  # type: ignore[arg-type]
        recorded, text = clip(model, geometry, sigmas)
        x, level = as_one_pass(recorded, geometry.first)
        v = model(x, level, text, plan=block_causal(geometry, x.shape[2]))
        whole = x0_from_velocity(x, v, level)
        torch.testing.assert_close(whole, recorded.x0, atol=1e-5, rtol=1e-5)
        if not relative:  # positions that count from the video's start: one RoPE, one mask
            with pytest.MonkeyPatch.context() as patch:
                mask = masked_attention(geometry, x.shape[2], 2)
                patch.setattr(F, "scaled_dot_product_attention", mask)
                v = model(x, level, text)
            whole = x0_from_velocity(x, v, level)
            torch.testing.assert_close(whole, recorded.x0, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bug", ["clean pass", "noisy image", "first step's", "window"])
def test_planted_bugs_are_seen(
    model: WanTransformer, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigmas = (1.0, 0.8) if bug == "first step's" else (1.0,)
    if bug == "first step's":  # K and V of another step than the last
        with_keys = WanTransformer.with_keys_values

        def stale(self: WanTransformer, x: torch.Tensor, level: torch.Tensor, *args: Any,
                  **kw: Any) -> Any:  # fmt: skip
            v, _ = with_keys(self, x, level, *args, **kw)
            return v, with_keys(self, x, torch.ones_like(level), *args, **kw)[1]

        monkeypatch.setattr(WanTransformer, "with_keys_values", stale)
    geometry = replace(SINGLE, single_pass=bug != "clean pass")
    recorded, text = clip(model, geometry, sigmas)
    monkeypatch.undo()
    x, level = as_one_pass(recorded, 1, image_level=float(bug == "noisy image"))
    wrong = replace(geometry, window=8) if bug == "window" else geometry
    v = model(x, level, text, plan=block_causal(wrong, x.shape[2]))
    whole = x0_from_velocity(x, v, level)[:, :, 5:]  # chunk 1 sees the image alone
    assert float((whole - recorded.x0[:, :, 5:]).abs().max()) > 1e-3


def test_one_pass_a_chunk_and_level_and_one_for_the_image(
    model: WanTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("forward", "keys_values", "with_keys_values"):
        plain = getattr(WanTransformer, name)

        def note(
            self: WanTransformer, *args: Any, _p: Any = plain, _n: str = name, **kw: Any
        ) -> Any:
            calls.append(_n)
            return _p(self, *args, **kw)

        monkeypatch.setattr(WanTransformer, name, note)
    clip(model, SINGLE, (1.0, 0.8))
    assert calls == ["keys_values", *["forward", "with_keys_values"] * 3]


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.8)], ids=str)
def test_streaming_equals_the_training_rollout(
    model: WanTransformer, sigmas: tuple[float, ...]
) -> None:
    recorded, text = clip(model, SINGLE, sigmas)
    noise = seeded_noise([0, 1], SINGLE, (4, 2, 4), torch.device("cpu"))
    image = recorded.x0[:, :, :1]
    parts = Rollout(model, SINGLE, sigmas).stream(
        image, lambda i: text[:, SINGLE.start(i)], noise, 3
    )
    torch.testing.assert_close(torch.cat([image, *parts], 2), recorded.x0, atol=1e-5, rtol=1e-5)


# -- the stages -----------------------------------------------------------------------------------


class Words(torch.nn.Module):
    def forward(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((2, 8), len(p) / 4.0) for p in prompts])


CONDITIONER = Conditioner(Words(), SINGLE)


def batch(levels: int) -> Batch:
    torch.manual_seed(5)
    captions = [["a", "a", "bb", "a"], ["bb", "bb", "bb", "ccc"]]
    states = torch.randn(2, levels + 1, 4, FRAMES, 2, 4)
    return Batch(torch.randn(2, 4, FRAMES, 2, 4), captions, states)


def test_stage_one_at_one_level_is_the_error_of_the_students_own_stream(
    model: WanTransformer,
) -> None:
    """The context in training is the context when streaming: a rollout from the noise that the
    teacher began with, measured against where the teacher arrived, is the loss itself."""
    data = batch(1)
    assert data.trajectory is not None
    stage = OdeInit(model, CONDITIONER, SINGLE, (1.0,), OdeInitConfig())
    loss, _ = stage.generator_loss(data, torch.Generator().manual_seed(0))
    noise, end = data.trajectory.unbind(1)
    text = CONDITIONER(data.captions, FRAMES)
    made = record(
        Rollout(model, SINGLE), end[:, :, :1], text, noise_from(noise[None, :, :, 1:], SINGLE),
        FRAMES,
    ).x0  # fmt: skip
    want = ((made - end)[:, :, 1:] ** 2).mean()
    torch.testing.assert_close(loss.detach(), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stage_one_at_two_levels_has_the_last_level_behind_every_chunk(
    model: WanTransformer,
) -> None:
    data, sigmas = batch(2), (1.0, 0.8)
    states = data.trajectory
    assert states is not None
    stage = OdeInit(model, CONDITIONER, SINGLE, sigmas, OdeInitConfig())
    loss, _ = stage.generator_loss(data, torch.Generator().manual_seed(0))
    index = stage._levels(states, False, torch.Generator().manual_seed(0))
    assert set(index[:, 1:].flatten().tolist()) == {0, 1}
    text = CONDITIONER(data.captions, FRAMES)
    end, cache, errors = states[:, -1], KVCache(), []
    for i in range(4):
        start, size = SINGLE.start(i), SINGLE.size(i)
        at = slice(start, start + size)
        plan, past = plans.cached(SINGLE, cache.frames, start, size), cache.layers or None
        rows = text[:, start]
        if i:
            chosen = index[:, start]
            x_t = torch.stack([states[b, chosen[b], :, at] for b in range(2)])
            level = torch.tensor(sigmas)[chosen]
            x0 = x0_from_velocity(x_t, model(x_t, level, rows, plan=plan, past=past), level)
            errors.append((x0 - end[:, :, at]) ** 2)
        context, sigma = (states[:, 1, :, at], 0.8) if i else (end[:, :, at], 0.0)
        new = model.keys_values(context, torch.full((2,), sigma), rows, plan=plan, past=past)
        cache = cache.append(new, SINGLE, start)
    want = torch.cat(errors, 2).mean()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)


def test_stage_one_trains_the_pass_that_later_chunks_read() -> None:
    """The last chunk's error alone moves what earlier chunks leave in the cache."""
    net = network()
    seen: list[torch.Tensor] = []
    hook = net.blocks[-1].register_forward_hook(lambda *a: seen.append(a[-1][2]))
    data = batch(1)
    assert data.trajectory is not None
    text = CONDITIONER(data.captions, FRAMES)
    x, level = data.trajectory[:, 0], torch.ones(2, FRAMES)
    v = net(x, level, text, plan=block_causal(SINGLE, FRAMES))
    hook.remove()
    (g,) = torch.autograd.grad(v[:, :, -4:].square().sum(), seen[0])
    assert float(g[:, 5:9].abs().max()) > 0 == float(g[:, 1:5].abs().max())


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 5 / 6)], ids=str)
def test_all_three_stages_train_with_it(sigmas: tuple[float, ...]) -> None:
    data = batch(len(sigmas))
    rollout = Rollout(network(1), SINGLE, sigmas)
    torch.manual_seed(9)
    critic = Discriminator(network(4), DiscriminatorConfig(taps=(0, 2)), SINGLE)
    stages = [
        OdeInit(rollout.model, CONDITIONER, SINGLE, sigmas, OdeInitConfig()),
        DmdWarmup(rollout, network(2), network(3), CONDITIONER, DmdConfig()),
        Adversarial(rollout, critic, CONDITIONER, AdversarialConfig()),
    ]
    for stage in stages:
        rollout.model.zero_grad()
        loss, _ = stage.generator_loss(data, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
        loss.backward()
        grads = [p.grad for p in rollout.model.parameters() if p.grad is not None]
        assert bool(torch.isfinite(loss)) and max(float(g.abs().max()) for g in grads) > 0
        if not isinstance(stage, OdeInit):
            critic_loss, _ = stage.critic_loss(data, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
            critic_loss.backward()
            assert bool(torch.isfinite(critic_loss))


def test_stage_one_learns_with_it() -> None:
    net, data = network(), batch(1)
    stage = OdeInit(net, CONDITIONER, SINGLE, (1.0,), OdeInitConfig())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, _ = stage.generator_loss(data, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_a_clean_context_makes_no_sense_with_it(model: WanTransformer) -> None:
    with pytest.raises(UserError, match="geometry.single_pass never sees"):
        OdeInit(model, CONDITIONER, SINGLE, (1.0,), OdeInitConfig(context="teacher_forcing"))
