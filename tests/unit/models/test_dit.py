"""The transformer on its own: shapes, noise levels, prompts, gradients, errors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from aad1.core.chunks import ChunkGeometry, block_causal
from aad1.errors import UserError
from aad1.models.dit import MIN_SIGMA, WanConfig, WanTransformer, _rms, timestep_embedding

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=3, text_dim=8,
    freq_dim=16, in_channels=4, out_channels=4,
)  # fmt: skip


def build(config: WanConfig = TINY) -> WanTransformer:
    torch.manual_seed(0)
    net = WanTransformer(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def inputs(frames: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, frames, 4, 6), torch.rand(2), torch.randn(2, 3, 8)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (1, 4, 2)])
@torch.no_grad()
def test_the_velocity_has_the_latents_shape(patch: tuple[int, int, int]) -> None:
    x, sigma, text = inputs()
    out = build(replace(TINY, patch_size=patch))(x, sigma, text)
    assert out.shape == x.shape
    assert out.dtype == x.dtype


def test_qk_norms_under_autocast_are_torchs_and_take_its_kernel_for_one_type() -> None:
    """Master weights are float32, what is normed is bfloat16: torch then takes small steps."""
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(24, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 24).bfloat16()
    found = []
    for call in (norm, lambda x: _rms(norm, x)):
        y = x.clone().requires_grad_()
        norm.weight.grad = None
        out = call(y)
        out.backward(torch.arange(120.0).view(5, 24).bfloat16())
        found.append((out.detach(), y.grad, norm.weight.grad))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    net = build()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.filterwarnings("error", message="Mismatch dtype")
        net(*inputs())


@torch.no_grad()
def test_one_sigma_equals_the_same_sigma_for_every_frame() -> None:
    net, (x, sigma, text) = build(), inputs()
    per_frame = sigma[:, None].expand(2, 5)
    torch.testing.assert_close(net(x, sigma, text), net(x, per_frame, text), atol=1e-5, rtol=1e-5)
    other = per_frame.clone()
    other[:, 3] = 0.0
    assert float((net(x, other, text) - net(x, sigma, text)).abs().max()) > 1e-3


@torch.no_grad()
def test_one_prompt_equals_the_same_prompt_for_every_frame() -> None:
    net, (x, sigma, text) = build(), inputs()
    rows = text[:, None].expand(2, 5, 3, 8)
    torch.testing.assert_close(net(x, sigma, rows), net(x, sigma, text), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix() -> None:
    net, (x, sigma, text) = build(), inputs()
    both = net(x, sigma, text)
    for b in range(2):
        alone = net(x[b : b + 1], sigma[b : b + 1], text[b : b + 1])
        torch.testing.assert_close(both[b : b + 1], alone, atol=1e-5, rtol=1e-5)


def test_block_causal_output_ignores_later_chunks_bidirectional_does_not() -> None:
    net, (x, sigma, text) = build(), inputs(9)
    plan = block_causal(ChunkGeometry(), 9)
    for kwargs, causal in ((dict(plan=plan), True), ({}, False)):
        leaf = x.clone().requires_grad_()
        out = net(leaf, sigma, text, **kwargs)
        (g,) = torch.autograd.grad(out[:, :, :5].sum(), leaf)
        assert (float(g[:, :, 5:].abs().max()) == 0) == causal
        assert float(g[:, :, :5].abs().amax(dim=(0, 1, 3, 4)).min()) > 0


@torch.no_grad()
def test_x0_prediction_is_turned_into_a_velocity() -> None:
    x, sigma, text = inputs()
    sigma = torch.tensor([0.5, 0.01])
    net = build(replace(TINY, prediction="x0"))
    raw = build()
    raw.load_state_dict(net.state_dict())
    x0 = raw(x, sigma, text)
    divisor = torch.tensor([0.5, MIN_SIGMA]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(net(x, sigma, text), (x - x0) / divisor, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_pass_gives_the_keys_of_a_forward_pass() -> None:
    """keys_values stops after the last layer's K and V; they are those that attention used."""
    net, (x, sigma, text) = build(), inputs(3)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = type(net.blocks[0]).forward

    def noted(self: object, *args: object) -> object:
        out = plain(self, *args)  # type: ignore[arg-type]
        kept.append(out[1:])  # type: ignore[index, arg-type]
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(net.blocks[0]), "forward", noted)
        net(x, sigma, text)
    got = net.keys_values(x, sigma, text)
    assert len(got) == len(kept) == 3
    for (k, v), (wk, wv) in zip(got, kept, strict=True):
        torch.testing.assert_close(k, wk)
        torch.testing.assert_close(v, wv)


@torch.no_grad()
def test_features_are_the_outputs_of_the_blocks() -> None:
    net, (x, sigma, text) = build(), inputs(3)
    one, two = net.features(x, sigma, text, layers=(0, 2))
    assert one.shape == two.shape == (2, 3, 6, 24)
    (last,) = net.features(x, sigma, text, layers=(2,))
    torch.testing.assert_close(last, two)
    assert not torch.allclose(one, two)


@torch.no_grad()
def test_fresh_weights_give_zero_output_and_gates() -> None:
    torch.manual_seed(0)
    net = WanTransformer(TINY)
    net.init_weights()
    x, sigma, text = inputs()
    assert float(net(x, sigma, text).abs().max()) == 0
    a, b = WanTransformer(TINY), WanTransformer(TINY)
    a.init_weights(torch.Generator().manual_seed(3))
    b.init_weights(torch.Generator().manual_seed(3))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if "scale_shift_table" not in name and "norm" not in name:
            assert torch.equal(p, q), name


def test_every_parameter_gets_a_gradient() -> None:
    net, (x, sigma, text) = build(), inputs()
    (net(x, sigma, text) ** 2).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name


def test_timesteps_are_a_thousand_sigma_cosines_first() -> None:
    e = timestep_embedding(torch.tensor([0.0, 500.0]), 8)
    assert e[0].tolist() == [1.0] * 4 + [0.0] * 4
    torch.testing.assert_close(e[1, 0], torch.tensor(500.0).cos())
    net = build()
    seen = {}
    net.condition_embedder.time_embedder.register_forward_pre_hook(
        lambda module, args: seen.update(t=args[0])
    )
    net.condition_embedder.time(torch.tensor([0.5]))
    torch.testing.assert_close(seen["t"][0, 0], timestep_embedding(torch.tensor(500.0), 16))


def test_wrong_inputs_name_value_and_want() -> None:
    net, (x, sigma, text) = build(), inputs()
    with pytest.raises(UserError, match="latents have 3 channels, the model takes 4"):
        net(x[:, :3], sigma, text)
    with pytest.raises(UserError, match="3x6, not a multiple of the patch 2x2"):
        net(x[:, :, :, :3], sigma, text)
    with pytest.raises(ValueError, match=r"\[2\] or \[2, 5\], got \[2, 4\]"):
        net(x, sigma[:, None].expand(2, 4), text)


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(patch_size=(2, 2, 2)), r"\(1, h, w\), got \(2, 2, 2\)"),
        (dict(patch_size=(1, 2)), r"\(1, h, w\), got \(1, 2\)"),
        (dict(patch_size=(1, 0, 2)), r"\(1, h, w\), got \(1, 0, 2\)"),
        (dict(attention_head_dim=4), "even and >= 6, got 4"),
        (dict(attention_head_dim=13), "even and >= 6, got 13"),
        (dict(freq_dim=5), "freq_dim must be even, got 5"),
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(num_attention_heads=-2), "num_attention_heads must be at least 1, got -2"),
        (dict(prediction="noise"), "\"x0\", got 'noise'"),
    ],
)
def test_impossible_configs_name_the_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WanConfig(**values)  # type: ignore[arg-type]
