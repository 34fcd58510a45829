"""The stages on tiny networks: gradients, roles, and the planted bugs of the design notes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.flow import add_noise
from aad1.core.kv_cache import KVCache, Piece
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Recorded, Rollout
from aad1.rollout.teacher import sample
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner, SelfRollout, noise_from, randn, roll_out, uniform
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.losses import discriminator_loss, generator_adversarial_loss
from aad1.stages.ode_init import OdeInit, OdeInitConfig
from aad1.stages.pretrain import Pretrain, PretrainConfig

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=2, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip
FRAMES = 9
GEOMETRY = ChunkGeometry()


class Words(torch.nn.Module):
    """A stand-in prompt encoder: rows seeded by the prompt's length."""

    def forward(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((2, 8), len(p) / 4.0) for p in prompts])


def network(seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    net = WanTransformer(TINY).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def batch(trajectory_levels: int = 0) -> Batch:
    torch.manual_seed(5)
    latents = torch.randn(3, 4, FRAMES, 2, 4)
    captions = [["a", "a", "bb"], ["bb", "bb", "bb"], ["ccc", "ccc", "a"]]
    states = None
    if trajectory_levels:
        states = torch.randn(3, trajectory_levels + 1, 4, FRAMES, 2, 4)
    return Batch(latents, captions, states)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def conditioner() -> Conditioner:
    return Conditioner(Words(), GEOMETRY)


def test_every_frame_gets_its_chunks_prompt() -> None:
    text = conditioner()(batch().captions, FRAMES)
    assert text.shape == (3, FRAMES, 2, 8)
    assert (text[0, :, 0, 0] * 4).tolist() == [1.0] * 5 + [2.0] * 4
    assert (text[2, :, 0, 0] * 4).tolist() == [3.0] * 5 + [1.0] * 4


def test_pretraining_loss_is_zero_for_the_true_velocity() -> None:
    class Oracle(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor
                    ) -> torch.Tensor:  # fmt: skip
            s = sigma[:, None, :, None, None]
            return (x_t - data.latents) / s  # v = (x_t - x0) / sigma

    data = batch()
    stage = Pretrain(Oracle(), conditioner(), Words(), PretrainConfig())  # type: ignore[arg-type]
    loss, _ = stage.generator_loss(data, rng())
    assert float(loss) < 1e-6


def test_ode_init_regresses_on_the_end_point_of_noisy_chunks_only() -> None:
    """The end point itself as the student's answer gives 0; the image never counts."""

    class Answer(torch.nn.Module):
        def __init__(self, x0: torch.Tensor) -> None:
            super().__init__()
            self.x0 = x0

        def forward(self, x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor,
                    plan: object = None) -> torch.Tensor:  # fmt: skip
            s = sigma[:, None, :, None, None]
            return (x_t - self.x0) / s.clamp_min(1e-3)

    data = batch(1)
    assert data.trajectory is not None
    end = data.trajectory[:, -1]
    for x0, zero in ((end, True), (end + 1, False)):
        stage = OdeInit(Answer(x0), conditioner(), GEOMETRY, (1.0,), OdeInitConfig())  # type: ignore[arg-type]
        loss, _ = stage.generator_loss(data, rng())
        assert (float(loss) < 1e-5) == zero
        if not zero:
            # Clips whose chunks are all clean have nothing to learn from.
            levels = stage._levels(data.trajectory, True, rng())
            share = float((levels == 0).any(1).float().mean())
            assert share > 0
            torch.testing.assert_close(float(loss), share, atol=1e-3, rtol=0)
    wrong_image = end.clone()
    wrong_image[:, :, 0] += 5
    stage = OdeInit(Answer(wrong_image), conditioner(), GEOMETRY, (1.0,), OdeInitConfig())  # type: ignore[arg-type]
    assert float(stage.generator_loss(data, rng())[0]) < 1e-5


@pytest.mark.parametrize("context", ["diffusion_forcing", "teacher_forcing"])
def test_ode_init_learns(context: str) -> None:
    net, data = network(), batch(2)
    stage = OdeInit(net, conditioner(), GEOMETRY, (1.0, 0.8), OdeInitConfig(context=context))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(40):
        loss, _ = stage.generator_loss(data, rng())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (float(loss) if step == 0 else first), float(loss)
    assert last < 0.8 * first


def test_ode_init_wants_trajectories_of_its_own_levels() -> None:
    stage = OdeInit(network(), conditioner(), GEOMETRY, (1.0,), OdeInitConfig())
    with pytest.raises(UserError, match="1 level"):
        stage.generator_loss(batch(2), rng())


def dmd(sigmas: tuple[float, ...] = (1.0,), **config: Any) -> DmdWarmup:
    return DmdWarmup(
        Rollout(network(1), GEOMETRY, sigmas), network(2), network(3), conditioner(),
        DmdConfig(**config),
    )  # fmt: skip


def test_dmd_gradient_is_that_of_the_retained_graph() -> None:
    """The two-phase step against back-propagation through every exit pass of the rollout."""
    stage, data = dmd(), batch()
    loss, _ = stage.generator_loss(data, rng())
    loss.backward()
    got = {n: p.grad for n, p in stage.rollout.model.named_parameters()}

    other = dmd()
    generator = rng()
    text = conditioner()(data.captions, FRAMES)
    image = data.latents[:, :, :1]
    noise = noise_from(randn((1, 3, 4, FRAMES - 1, 2, 4), image, generator), GEOMETRY)
    state = other.rollout.prefill(image, text[:, 0])
    xs = [image]
    for i in (1, 2):
        context = text[:, GEOMETRY.start(i)]
        layers = tuple((k.detach(), v.detach()) for k, v in state.cache.layers)
        cache = KVCache((Piece(state.cache.frames, layers),))
        state = type(state)(state.chunk, state.start, cache)
        x0 = other.rollout.generate(state, context, noise).x0
        xs.append(x0)
        state = other.rollout.commit(state, x0.detach(), context)
    x = torch.cat(xs, 2)
    g = other.direction(x.detach(), text, generator)
    (x * g.detach() / x.numel()).sum().backward()
    want = {n: p.grad for n, p in other.rollout.model.named_parameters()}
    largest = max(float(g.abs().max()) for g in want.values() if g is not None)
    for name, grad in want.items():
        if grad is not None:
            torch.testing.assert_close(got[name], grad, atol=1e-5 * largest, rtol=1e-3)


def test_dmd_leaves_the_scores_alone_and_the_fake_step_the_generator() -> None:
    stage, data = dmd(), batch()
    stage.generator_loss(data, rng())[0].backward()
    assert all(p.grad is None for p in stage.real_score.parameters())
    assert all(p.grad is None for p in stage.fake_score.parameters())
    generator = {n: p.grad.clone() for n, p in stage.rollout.model.named_parameters()
                 if p.grad is not None}  # fmt: skip
    stage.critic_loss(data, rng())[0].backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0
               for p in stage.fake_score.parameters())  # fmt: skip
    for name, p in stage.rollout.model.named_parameters():
        if name in generator:
            torch.testing.assert_close(p.grad, generator[name], atol=0, rtol=0)


def critic(per_frame: bool = False) -> Discriminator:
    torch.manual_seed(9)
    config = DiscriminatorConfig(taps=(0, 1), per_frame=per_frame)
    return Discriminator(network(4), config, GEOMETRY)


def adversarial(config: AdversarialConfig, sigmas: tuple[float, ...] = (1.0,)) -> Adversarial:
    return Adversarial(Rollout(network(1), GEOMETRY, sigmas), critic(), conditioner(), config)


def test_adversarial_gradient_equals_finite_differences_of_its_loss() -> None:
    """d L_G / d theta along a random direction, clip by clip: the context is held fixed, as the
    cache is detached, so the directional derivative is taken with recorded contexts."""
    stage, data = adversarial(AdversarialConfig()), batch()
    model = stage.rollout.model
    loss, logs = stage.generator_loss(data, rng())
    torch.testing.assert_close(loss.detach(), logs["loss"])
    loss.backward()
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(
        float((p.grad * d).sum())
        for p, d in zip(model.parameters(), direction, strict=True)
        if p.grad is not None
    )

    from aad1.rollout.stream import replay

    generator = rng()
    text = conditioner()(data.captions, FRAMES)
    recorded, _ = SelfRollout(stage.rollout)(data.latents, text, generator)
    tau = uniform(3, data.latents, generator)
    noise = randn(data.latents.shape, data.latents, generator)

    @torch.no_grad()
    def value(step: float) -> float:
        for p, d in zip(model.parameters(), direction, strict=True):
            p.add_(step * d)
        x = torch.cat([recorded.x0[:, :, :1], replay(stage.rollout, recorded, text)], 2)
        out = generator_adversarial_loss(stage.discriminator(add_noise(x, noise, tau), tau, text))
        for p, d in zip(model.parameters(), direction, strict=True):
            p.sub_(step * d)
        return float(out)

    h = 1e-4
    numeric = (value(h) - value(-h)) / (2 * h)
    assert abs(slope - numeric) < 0.05 * abs(numeric) + 1e-3


def test_discriminator_step_moves_no_generator_weight_and_separates() -> None:
    stage, data = adversarial(AdversarialConfig(penalty_weight=0.0)), batch()
    optimizer = torch.optim.Adam(stage.discriminator.parameters(), lr=1e-3)
    gaps = []
    for _ in range(30):
        loss, logs = stage.critic_loss(data, rng())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append(float(logs["gap"]))
    assert gaps[-1] > gaps[0] + 0.5
    assert all(p.grad is None for p in stage.rollout.model.parameters())


def test_heldout_gap_grows_as_the_discriminator_learns_and_has_a_sign() -> None:
    stage, data = adversarial(AdversarialConfig(penalty_weight=0.0)), batch()
    fake = 0.5 * data.latents.flip(0)

    def gap(together: int = 32) -> float:
        return float(stage.heldout_gap(data.latents, fake, data.captions, together))

    before = gap()
    assert gap() == before  # checks are comparable
    optimizer = torch.optim.Adam(stage.discriminator.parameters(), lr=1e-3)
    for _ in range(20):
        tau = uniform(3, fake, rng())
        text = conditioner()(data.captions, FRAMES)
        real, made = (
            stage.discriminator(add_noise(x, randn(x.shape, x, rng()), tau), tau, text)
            for x in (data.latents, fake)
        )
        optimizer.zero_grad()
        discriminator_loss(real, made).backward()
        optimizer.step()
    assert gap() > before + 0.3
    swapped = stage.heldout_gap(fake, data.latents, data.captions)
    assert float(swapped) == pytest.approx(-gap(), abs=1e-5)
    whole = [float(stage.heldout_gap(data.latents[:1], fake[:1], data.captions[:1], n))
             for n in (1, 32)]  # fmt: skip
    assert whole[0] == whole[1]


def test_penalty_weight_scales_the_penalty() -> None:
    data = batch()
    values = {}
    for weight in (0.0, 20.0, 40.0):
        stage = adversarial(AdversarialConfig(penalty_weight=weight))
        loss, logs = stage.critic_loss(data, rng())
        values[weight] = float(loss) - float(logs["critic"])
        torch.testing.assert_close(
            values[weight], weight * float(logs["penalty"]), rtol=1e-4, atol=1e-6
        )
    assert values[40.0] > values[20.0] > values[0.0] == 0.0


def test_noise_interval_belongs_to_the_exit_step() -> None:
    one = adversarial(AdversarialConfig())
    assert one.interval(0) == (0.0, 1.0)
    two = adversarial(AdversarialConfig(), (1.0, 5 / 6))
    assert two.interval(0) == (5 / 6, 1.0)
    assert two.interval(1) == (0.0, 5 / 6)


def test_two_step_stages_run_from_both_exits() -> None:
    data = batch()
    stage = adversarial(AdversarialConfig(), (1.0, 5 / 6))
    seen = set()
    for seed in range(12):
        _, step = stage.self_rollout(
            data.latents, conditioner()(data.captions, FRAMES), torch.Generator().manual_seed(seed)
        )
        seen.add(step)
    assert seen == {0, 1}


def test_the_rollouts_keys_and_values_are_gone_when_the_discriminator_runs() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def run(*args: Any) -> Recorded:
        recorded = roll_out(*args)
        held.extend(weakref.ref(x) for kv in recorded.past for x in kv)
        return recorded

    stage = adversarial(AdversarialConfig())
    stage.self_rollout.run = run
    stage.discriminator.register_forward_pre_hook(
        lambda *_: alive.append(any(ref() is not None for ref in held))
    )
    stage.critic_loss(batch(), rng())
    assert held and alive == [False, False]


def test_relativistic_and_frame_wise_switches_run() -> None:
    data = batch()
    stage = Adversarial(
        Rollout(network(1), GEOMETRY), critic(per_frame=True), conditioner(),
        AdversarialConfig(loss="relativistic"),
    )  # fmt: skip
    for loss, _ in (stage.critic_loss(data, rng()), stage.generator_loss(data, rng())):
        assert bool(torch.isfinite(loss))
        loss.backward()


@pytest.mark.parametrize("loss", ["logistic", "relativistic"])
@pytest.mark.parametrize("weight", [20.0, 0.0])
@pytest.mark.parametrize("graph,share,extra", [("pairs", 2, (0, 1)), ("single", 4, (2, 3))])
def test_the_critics_loss_in_parts_has_the_gradient_of_the_whole(
    loss: str, weight: float, graph: str, share: int, extra: tuple[int, int]
) -> None:
    """Same gradients and logs; a part keeps its share of the activations, and passes that are run
    twice are as few as the loss's coupling demands."""

    def run(graph: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[int], int]:
        config = AdversarialConfig(loss=loss, penalty_weight=weight, graph=graph)
        stage, logs, kept = adversarial(config), {}, [0]
        passes: list[int] = []
        stage.discriminator.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))

        weights = {p.data_ptr() for p in stage.discriminator.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[-1] += x.numel() * (x.data_ptr() not in weights)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            for part, found in stage.critic_parts(batch(), rng()):
                part.backward()
                kept.append(0)
                logs |= found
        grads = {n: p.grad for n, p in stage.discriminator.named_parameters() if p.grad is not None}
        return grads, logs, kept[:-1], sum(passes) // 3

    want, wanted_logs, (all_kept,), once = run("whole")
    got, logs, kept, passes = run(graph)
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 1e-2 and got.keys() == want.keys()
    for name, grad in want.items():
        assert float((got[name] - grad).abs().max()) <= 1e-6 * largest, name
    torch.testing.assert_close(logs, wanted_logs, rtol=1e-5, atol=1e-6)
    parts = share if weight else 2
    assert len(kept) == parts
    assert max(kept) < 1.02 * all_kept / parts
    again = extra[loss == "relativistic"] if weight else int(loss == "relativistic")
    assert passes == once + again


def test_passes_run_ahead_take_no_gradient_away_under_autocast() -> None:
    """Autocast keeps cast weights for later passes, also for those that want a gradient."""
    grads = []
    for graph in ("whole", "single"):
        stage = adversarial(AdversarialConfig(loss="relativistic", graph=graph))
        with torch.autocast("cpu", torch.bfloat16):
            for part, _ in stage.critic_parts(batch(), rng()):
                part.backward()
        grads.append({n: p.grad for n, p in stage.discriminator.named_parameters()})
    flat = [torch.cat([g.flatten() for g in one.values() if g is not None]) for one in grads]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.99
    assert [n for n, g in grads[0].items() if g is None] == [
        n for n, g in grads[1].items() if g is None
    ]


def test_a_part_without_the_others_logits_is_noticed() -> None:
    """The comparison above can tell: the pairs' loss with unknown logits is not the whole's."""
    config = AdversarialConfig(loss="relativistic", graph="pairs")
    stage = adversarial(config)
    groups, ahead = config.turns()
    assert (groups, ahead) == ([(0, 2), (1, 3)], {1})
    whole, grads = adversarial(replace(config, graph="whole")), []
    for s, known in ((whole, True), (stage, False)):
        if not known:
            s.config = _Forgetful(config)  # type: ignore[assignment]
        for part, _ in s.critic_parts(batch(), rng()):
            part.backward()
        grads.append([p.grad for p in s.discriminator.parameters() if p.grad is not None])
    assert max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True)) > 1e-4


class _Forgetful:
    """A config whose passes are never run ahead."""

    def __init__(self, config: AdversarialConfig) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def turns(self) -> tuple[list[tuple[int, ...]], set[int]]:
        return self.config.turns()[0], set()


def test_the_graph_is_split_where_blocks_are_checkpointed() -> None:
    auto = AdversarialConfig()
    assert [auto.settled(c).graph for c in (False, True)] == ["whole", "pairs"]
    assert AdversarialConfig(graph="single").settled(True).graph == "single"
    with pytest.raises(UserError, match="graph must be auto, whole, pairs, single, got 'halves'"):
        AdversarialConfig(graph="halves")


def test_bad_configs_name_the_value() -> None:
    with pytest.raises(UserError, match="hinge"):
        AdversarialConfig(loss="hinge")
    with pytest.raises(UserError, match="-1"):
        AdversarialConfig(penalty_weight=-1)
    with pytest.raises(UserError, match=r"1\.5"):
        DmdConfig(max_sigma=1.5)
    with pytest.raises(UserError, match="mixed"):
        OdeInitConfig(context="mixed")


def test_euler_sampling_of_a_straight_flow_is_exact() -> None:
    """For data that is one point, v = (x - x0) / sigma leads every start to x0."""
    x0 = torch.randn(1, 4, 3, 2, 2)

    class Point(torch.nn.Module):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return (x - x0) / sigma.view(-1, 1, 1, 1, 1)

    noise = torch.randn(2, 4, 3, 2, 2)
    out, states = sample(Point(), noise, torch.zeros(2, 1, 1), None, steps=8, shift=5.0,  # type: ignore[arg-type]
                         guidance_scale=1.0, keep=(1.0, 5 / 6))  # fmt: skip
    torch.testing.assert_close(out, x0.expand_as(out), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[:, 0], noise)
    torch.testing.assert_close(
        states[:, 1],
        add_noise(x0.expand_as(noise), noise, torch.full((2,), 5 / 6)),
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(UserError, match="grid"):
        sample(Point(), noise, torch.zeros(2, 1, 1), None, steps=8, shift=5.0, guidance_scale=1.0,  # type: ignore[arg-type]
               keep=(0.9,))  # fmt: skip


def test_copying_roles_keeps_them_apart() -> None:
    teacher = network()
    fake = copy.deepcopy(teacher)
    next(iter(fake.parameters())).data.add_(1.0)
    assert not torch.equal(next(iter(fake.parameters())), next(iter(teacher.parameters())))


def test_the_dmd_direction_guides_the_real_score_alone() -> None:
    """g = (fake - guided real) / mean |x - guided real|, both at the same noised clip."""
    stage, data = dmd(), batch()
    text = conditioner()(data.captions, FRAMES)
    got = stage.direction(data.latents, text, rng())

    generator, x = rng(), data.latents
    tau = stage.tau(3, x, generator)
    s = tau.view(3, 1, 1, 1, 1)
    x_tau = (1 - s) * x + s * randn(x.shape, x, generator)
    with torch.no_grad():
        cond = stage.real_score(x_tau, tau, text)
        uncond = stage.real_score(x_tau, tau, torch.zeros_like(text))
        fake = x_tau - s * stage.fake_score(x_tau, tau, text)
    real = x_tau - s * (uncond + stage.config.guidance_scale * (cond - uncond))
    weight = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(got, (fake - real) / weight, atol=1e-5, rtol=1e-4)


def test_with_a_clean_image_the_direction_is_of_what_follows() -> None:
    """The image is shown at sigma 0, has no direction, and does not count in the weight."""
    stage, data = dmd(clean_image=True, guidance_scale=1.0), batch()
    text = conditioner()(data.captions, FRAMES)
    got = stage.direction(data.latents, text, rng())

    generator, x = rng(), data.latents
    tau = stage.tau(3, x, generator)
    sigma = torch.stack([torch.zeros_like(tau), *[tau] * (FRAMES - 1)], 1)
    s = sigma.view(3, 1, FRAMES, 1, 1)
    x_tau = (1 - s) * x + s * randn(x.shape, x, generator)
    assert torch.equal(x_tau[:, :, 0], x[:, :, 0])
    with torch.no_grad():
        real = (x_tau - s * stage.real_score(x_tau, sigma, text))[:, :, 1:]
        fake = (x_tau - s * stage.fake_score(x_tau, sigma, text))[:, :, 1:]
    weight = (x[:, :, 1:] - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(got[:, :, 1:], (fake - real) / weight, atol=1e-5, rtol=1e-4)
    assert not got[:, :, 0].any()


class Spy(torch.nn.Module):
    """Notes what a network is called with, and answers by a function of it."""

    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.detach(), sigma.detach()))
        return self.answer(x, sigma)


def test_the_fake_score_learns_the_students_clips() -> None:
    """The velocity towards the student's own rollout gives no loss, that to the data does."""
    stage, data = dmd(), batch()
    text = conditioner()(data.captions, FRAMES)
    own = stage.self_rollout(data.latents, text, rng())[0].x0
    for target, least in ((own, True), (data.latents, False)):
        oracle = Spy(lambda x, s, t=target: (x - t) / s.view(-1, 1, 1, 1, 1))  # type: ignore[misc]
        stage.fake_score = oracle  # type: ignore[assignment]
        assert (float(stage.critic_loss(data, rng())[0]) < 1e-6) == least
        stage.fake_score = network(3)


def test_with_a_clean_image_the_fake_score_learns_what_follows() -> None:
    """It is given the image at sigma 0, and what it says of that counts for nothing."""
    stage, data = dmd(clean_image=True), batch()
    text = conditioner()(data.captions, FRAMES)
    own = stage.self_rollout(data.latents, text, rng())[0].x0

    def answer(x: torch.Tensor, sigma: torch.Tensor, image: float) -> torch.Tensor:
        v = (x - own) / sigma.view(3, 1, FRAMES, 1, 1).clamp_min(1e-3)
        v[:, :, 0] = image
        return v

    for image in (0.0, 9.0):
        spy = Spy(partial(answer, image=image))
        stage.fake_score = spy  # type: ignore[assignment]
        loss, _ = stage.critic_loss(data, rng())
        assert float(loss) < 1e-6
        ((x, sigma),) = spy.seen
        assert not sigma[:, 0].any() and bool((sigma[:, 1:] > 0).all())
        assert torch.equal(x[:, :, 0], data.latents[:, :, 0])
    stage.fake_score = Spy(lambda x, _: torch.zeros_like(x))  # type: ignore[assignment]
    assert float(stage.critic_loss(data, rng())[0]) > 0.1


def test_real_and_generated_clips_are_judged_at_the_same_noise() -> None:
    """Same tau and same eps for a clip and its partner, R1 and R2 about each of them."""
    config = AdversarialConfig(penalty_weight=3.0, penalty_sigma=0.1)
    stage, data = adversarial(config), batch()
    text = conditioner()(data.captions, FRAMES)
    own = stage.self_rollout(data.latents, text, rng())[0].x0
    spy = Spy(lambda x, s: x.flatten(1).sum(1))
    stage.discriminator = spy  # type: ignore[assignment]
    _, logs = stage.critic_loss(data, rng())
    (x, sigma), (near, _) = spy.seen
    assert torch.equal(sigma[:3], sigma[3:])
    s = sigma[:3].view(3, 1, 1, 1, 1)
    eps = [(half - (1 - s) * x0) / s for half, x0 in zip(x.chunk(2), (data.latents, own),
                                                         strict=True)]  # fmt: skip
    torch.testing.assert_close(eps[0], eps[1], atol=1e-3, rtol=1e-3)
    assert abs(float((near - x).std()) - 0.1) < 0.01
    moved = ((near - x).flatten(1).sum(1)) ** 2
    want = moved[:3].mean() + moved[3:].mean()
    torch.testing.assert_close(logs["penalty"], want, atol=1e-3, rtol=1e-3)


def test_teacher_forcing_reads_the_clean_end_point_as_context() -> None:
    data, calls = batch(1), []
    assert data.trajectory is not None
    net = network()
    plain = net.keys_values

    def noted(latents: torch.Tensor, sigma: torch.Tensor, *args: object, **kw: object) -> object:
        calls.append((latents, sigma))
        return plain(latents, sigma, *args, **kw)  # type: ignore[arg-type]

    net.keys_values = noted  # type: ignore[method-assign, assignment]
    config = OdeInitConfig(context="teacher_forcing")
    OdeInit(net, conditioner(), GEOMETRY, (1.0,), config).generator_loss(data, rng())
    ((latents, sigma),) = calls
    assert torch.equal(latents, data.trajectory[:, -1])
    assert float(sigma.abs().max()) == 0
