"""Propositions A.2 and A.3 of the paper on the real discriminator."""

from __future__ import annotations

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=3, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip
FRAMES = 13


def build(**kwargs: bool) -> Discriminator:
    torch.manual_seed(0)
    backbone = WanTransformer(TINY)
    for p in backbone.parameters():
        torch.nn.init.normal_(p, std=0.2)
    config = DiscriminatorConfig(taps=(0, 2), **kwargs)
    return Discriminator(backbone, config, ChunkGeometry()).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, FRAMES, 2, 4), torch.rand(2), torch.randn(2, 3, 8)


def frame_gradient(critic: Discriminator, frame: int) -> torch.Tensor:
    """|d logit of `frame` / d x| per input frame, for a frame-wise critic."""
    x, sigma, text = inputs()
    x.requires_grad_()
    logits = critic(x, sigma, text)
    assert logits.shape == (2, FRAMES - 1)
    (g,) = torch.autograd.grad(logits[:, frame - 1].sum(), x)
    return g.abs().amax(dim=(0, 1, 3, 4))


def test_a2_a_causal_backbone_cannot_let_the_future_judge_the_past() -> None:
    """d s_t / d x_{later chunks} = 0 if causal (inside a chunk attention is bidirectional)."""
    g = frame_gradient(build(causal=True, per_frame=True), 5)  # frame 5 is in chunk 2: 5..8
    assert float(g[9:].max()) == 0
    assert float(g[:9].min()) > 0  # the window of 9 holds them all


def test_a2_a_bidirectional_backbone_does() -> None:
    g = frame_gradient(build(causal=False, per_frame=True), 5)
    assert float(g.min()) > 0


def test_a3_a_video_head_contains_every_frame_head() -> None:
    """Its attention restricted to one frame's tokens, the same head gives the frame's logit."""
    video, frame = build(), build(per_frame=True)
    frame.load_state_dict(video.state_dict())
    x, sigma, text = inputs()
    with torch.no_grad():
        tokens = video.backbone.features(
            x, sigma, text, layers=video.config.taps, plan=video.plan(FRAMES)
        )
        per_frame = frame(x, sigma, text)
        for f in range(1, FRAMES):
            one = video.read([t[:, f : f + 1] for t in tokens])
            torch.testing.assert_close(one, per_frame[:, f - 1], atol=1e-5, rtol=1e-5)


def test_the_video_head_reads_every_frame() -> None:
    """A head that sees one frame only would leave the others without gradient."""
    critic = build()
    x, sigma, text = inputs()
    with torch.no_grad():
        tokens = critic.backbone.features(x, sigma, text, layers=critic.config.taps)
    tokens = [t.requires_grad_() for t in tokens]
    logits = critic.read(tokens)
    assert logits.shape == (2,)
    for g in torch.autograd.grad(logits.sum(), tokens):
        assert float(g.abs().amax(dim=(0, 2, 3)).min()) > 0


def test_the_logit_depends_on_noise_level_and_text() -> None:
    critic = build()
    x, sigma, text = inputs()
    with torch.no_grad():
        base = critic(x, sigma, text)
        assert not torch.allclose(base, critic(x, sigma * 0.5, text))
        assert not torch.allclose(base, critic(x, sigma, -text))


def test_heads_and_queries_are_a_group_of_their_own() -> None:
    critic = build()
    heads = {id(p) for p in critic.head_parameters()}
    backbone = {id(p) for p in critic.backbone.parameters()}
    assert not heads & backbone
    assert heads | backbone == {id(p) for p in critic.parameters()}
    assert all(id(h.query) in heads for h in critic.heads)


def test_bad_taps_name_the_range() -> None:
    backbone = WanTransformer(TINY)
    with pytest.raises(UserError, match=r"0\.\.2, got \(1, 3\)"):
        Discriminator(backbone, DiscriminatorConfig(taps=(1, 3)), ChunkGeometry())
    with pytest.raises(UserError, match="ascending"):
        DiscriminatorConfig(taps=(3, 1))
