"""Both losses at once, and stretches of longer rollouts: gradients against the plain graph."""

from __future__ import annotations

import copy

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.flow import add_noise, velocity
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Rollout, replay
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner, SampleNoise, SelfRollout, choose, randn, uniform
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.joint import Joint, JointConfig
from aad1.stages.losses import generator_adversarial_loss

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=2, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip
GEOMETRY = ChunkGeometry()


class Words(torch.nn.Module):
    def forward(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((2, 8), len(p) / 4.0) for p in prompts])


def network(seed: int) -> WanTransformer:
    torch.manual_seed(seed)
    net = WanTransformer(TINY).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def batch(frames: int = 9) -> Batch:
    torch.manual_seed(5)
    chunks = GEOMETRY.chunks(frames)
    captions = [[("a", "bb", "ccc")[(i + k) % 3] for k in range(chunks)] for i in range(3)]
    return Batch(torch.randn(3, 4, frames, 2, 4), captions)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def conditioner() -> Conditioner:
    return Conditioner(Words(), GEOMETRY)


def judge() -> Discriminator:
    backbone = network(4)
    torch.manual_seed(9)
    return Discriminator(backbone, DiscriminatorConfig(taps=(0, 1)), GEOMETRY)


def joint(clean_image: bool = False, **changes: float) -> Joint:
    config = JointConfig(score=DmdConfig(clean_image=clean_image), **changes)
    return Joint(Rollout(network(1), GEOMETRY), network(2), judge(), conditioner(), config)


def gradients(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_the_generators_gradient_is_that_of_both_losses() -> None:
    """With one seed: joint = matching alone + w times the adversarial part alone, and the first
    equals stage II's."""
    totals = {}
    for weight in (0.0, 0.5, 1.0):
        stage = joint(gan_weight=weight)
        loss, _ = stage.generator_loss(batch(), rng())
        loss.backward()
        totals[weight] = gradients(stage.rollout.model)
        assert all(p.grad is None for p in stage.discriminator.parameters())
    adversarial = totals[1.0] - totals[0.0]
    assert float(adversarial.norm()) > 1e-3 * float(totals[0.0].norm())
    torch.testing.assert_close(totals[0.5], totals[0.0] + 0.5 * adversarial, rtol=1e-3, atol=1e-6)

    alone = DmdWarmup(
        Rollout(network(1), GEOMETRY), network(2), network(4), conditioner(), DmdConfig()
    )
    alone.generator_loss(batch(), rng())[0].backward()
    torch.testing.assert_close(totals[0.0], gradients(alone.rollout.model))

    # The adversarial part by itself, with the draws that precede it.
    stage, data, generator = joint(), batch(), rng()
    text = conditioner()(data.captions, 9)
    recorded, _ = SelfRollout(stage.rollout)(data.latents, text, generator)
    stage.score.direction(recorded.x0, text, generator)
    tau = stage.score.tau(3, data.latents, generator)
    noise = randn(data.latents.shape, data.latents, generator)
    x = torch.cat([recorded.x0[:, :, :1], replay(stage.rollout, recorded, text)], 2)
    logits = stage.discriminator(add_noise(x, noise, tau), tau, text)
    generator_adversarial_loss(logits).backward()
    torch.testing.assert_close(adversarial, gradients(stage.rollout.model), rtol=1e-2, atol=1e-5)


def test_the_critic_learns_the_students_clips_and_tells_them_apart() -> None:
    stage, data = joint(gan_weight=1.0, r1_weight=0.0, r2_weight=0.0), batch()
    optimizer = torch.optim.Adam(stage.discriminator.parameters(), lr=1e-3)
    seen = []
    for _ in range(25):
        loss, logs = stage.critic_loss(data, rng())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((float(logs["fake"]), float(logs["gap"])))
    assert seen[-1][0] < 0.9 * seen[0][0]
    assert seen[-1][1] > seen[0][1] + 0.3
    assert all(p.grad is None for p in stage.rollout.model.parameters())
    assert stage.critic_updates == DmdConfig().critic_updates


def test_the_matching_half_of_the_critic_is_flow_matching_on_generated_clips() -> None:
    stage, data, generator = joint(gan_weight=0.0), batch(), rng()
    loss, logs = stage.critic_loss(data, rng())
    text = conditioner()(data.captions, 9)
    recorded, _ = SelfRollout(stage.rollout)(data.latents, text, generator)
    tau = stage.score.tau(3, data.latents, generator)
    noise = randn(data.latents.shape, data.latents, generator)
    v = stage.discriminator.backbone(add_noise(recorded.x0, noise, tau), tau, text)
    want = ((v - velocity(recorded.x0, noise)) ** 2).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(logs["fake"], want.detach())


def test_with_a_clean_image_every_network_sees_it_so() -> None:
    """Scores and discriminator, in both steps and on held-out clips."""
    # Without penalties, which perturb the image too.
    stage, data = joint(clean_image=True, r1_weight=0.0, r2_weight=0.0), batch()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    nets = (stage.discriminator, stage.discriminator.backbone, stage.score.real_score)
    for net in nets:
        net.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    stage.generator_loss(data, rng())
    assert len(seen) == 4  # fake and real score, the latter twice for guidance, and the judge
    stage.critic_loss(data, rng())
    stage.heldout_gap(data.latents, data.latents, data.captions)
    assert len(seen) == 7
    image = data.latents[:, :, 0]
    for x, sigma in seen:
        assert not sigma[:, 0].any() and bool((sigma[:, 1:] > 0).all())
        for part in x[:, :, 0].split(3):
            assert torch.equal(part, image)


def test_penalties_have_their_own_weights() -> None:
    def penalty(**weights: float) -> float:
        return float(joint(**weights).critic_loss(batch(), rng())[1]["penalty"])

    one, two = penalty(r1_weight=1.0, r2_weight=0.0), penalty(r1_weight=0.0, r2_weight=1.0)
    assert one > 0 and two > 0 and one > two  # r1's delta is ten times as wide
    assert penalty(r1_weight=2.0, r2_weight=3.0) == pytest.approx(2 * one + 3 * two, rel=1e-4)
    assert penalty(r1_weight=0.0, r2_weight=0.0) == 0
    with pytest.raises(UserError, match="gan_weight must be at least 0, got -1"):
        JointConfig(gan_weight=-1)
    with pytest.raises(UserError, match="r2_sigma must be above 0, got 0"):
        JointConfig(r2_sigma=0)


# ---- stretches of longer rollouts ---------------------------------------------------------------


def adversarial(stretch: int | None) -> Adversarial:
    return Adversarial(
        Rollout(network(1), GEOMETRY), judge(), conditioner(), AdversarialConfig(),
        stretch=stretch,
    )  # fmt: skip


def test_a_stretch_is_replayed_as_in_the_whole() -> None:
    data = batch(21)
    rollout = Rollout(network(1), GEOMETRY)
    text = conditioner()(data.captions, 21)
    recorded, _ = SelfRollout(rollout)(data.latents, text, rng())
    whole = replay(rollout, recorded, text)
    for skip, stop in ((1, 9), (2, 13), (4, 21), (5, 21)):
        begin = GEOMETRY.start(skip)
        part = replay(rollout, recorded, text, skip, stop)
        torch.testing.assert_close(part, whole[:, :, begin - 1 : stop - 1], atol=1e-5, rtol=1e-4)


def test_the_gradient_of_a_stretch_is_its_chunks_own() -> None:
    """Against the plain graph: the discriminator on the stretch, all chunks replayed."""
    data, frames, stretch = batch(21), 21, 9
    skips = set()
    for seed in range(6):
        stage = adversarial(stretch)
        loss, _ = stage.generator_loss(data, torch.Generator().manual_seed(seed))
        loss.backward()
        got = gradients(stage.rollout.model)

        other, generator = adversarial(stretch), torch.Generator().manual_seed(seed)
        text = conditioner()(data.captions, frames)
        recorded, _ = SelfRollout(other.rollout)(data.latents, text, generator)
        skip = 1 + choose(4, generator)  # 5 chunks of 4, 2 of which are seen
        skips.add(skip)
        begin = GEOMETRY.start(skip) - 1
        x = torch.cat([recorded.x0[:, :, :1], replay(other.rollout, recorded, text)], 2)
        x = torch.cat([recorded.x0[:, :, begin : begin + 1], x[:, :, begin + 1 : begin + 9]], 2)
        tau = uniform(3, x, generator)
        noise = randn(x.shape, x, generator)
        logits = other.discriminator(add_noise(x, noise, tau), tau, text[:, begin : begin + 9])
        want_loss = generator_adversarial_loss(logits)
        torch.testing.assert_close(loss.detach(), want_loss.detach())
        want_loss.backward()
        torch.testing.assert_close(got, gradients(other.rollout.model), rtol=1e-2, atol=1e-5)
    assert len(skips) > 2


def test_without_a_stretch_nothing_changes() -> None:
    for loss in ("generator_loss", "critic_loss"):
        one, _ = getattr(adversarial(None), loss)(batch(), rng())
        two, _ = getattr(adversarial(9), loss)(batch(), rng())
        torch.testing.assert_close(one, two, atol=0, rtol=0)


def test_the_discriminator_is_shown_the_stretch_of_real_clips_too() -> None:
    stage, data = adversarial(9), batch(21)
    seen: list[torch.Size] = []
    stage.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    stage.critic_loss(data, rng())
    assert {shape[2] for shape in seen} == {9}
    with pytest.raises(UserError, match="rollout_frames must be at least 0, got -1"):
        AdversarialConfig(rollout_frames=-1)


def test_noise_on_another_device_hangs_on_the_sample_alone_too() -> None:
    """On the CPU as a device it is the same stream; a sample's numbers do not see its batch."""
    like = torch.zeros(1)
    plain, placed = SampleNoise([3, 4], 5), SampleNoise([3, 4], 5, "cpu")
    assert torch.equal(randn((2, 3), like, plain), randn((2, 3), like, placed))
    alone = SampleNoise([4], 5, torch.device("cpu"))
    pair = SampleNoise([3, 4], 5, torch.device("cpu"))
    assert torch.equal(randn((1, 3), like, alone)[0], randn((2, 3), like, pair)[1])
    assert torch.equal(uniform(1, like, alone)[0], uniform(2, like, pair)[1])


@pytest.mark.gpu
def test_noise_is_drawn_on_the_device() -> None:
    like = torch.zeros(1, device="cuda")
    noise = SampleNoise([3, 4], 5, "cuda")
    assert randn((2, 3), like, noise).device.type == "cuda"
    assert copy.copy(noise).shared.device.type == "cpu"
