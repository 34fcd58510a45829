"""The training loop on stages small enough to be computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from aad1.stages.base import Batch, Logs, Loss, Rng, SampleNoise, randn
from aad1.train import checkpoint
from aad1.train.config import OptimConfig
from aad1.train.loop import NonFinite, Trainer


class Numbers:
    """Sample n is a fixed vector drawn from seed n."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def batch(self, position: int, count: int) -> Batch:
        self.asked.append((position, count))
        rows = [
            torch.randn(3, generator=torch.Generator().manual_seed(n))
            for n in range(position, position + count)
        ]
        return Batch(torch.stack(rows), [["a"]] * count)


class Linear:
    """Mean squared output of a linear map, without noise; the critic is another such map."""

    def __init__(self, critic_updates: int = 0, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.net, self.critic, self.heads = nn.Linear(3, 2), nn.Linear(2, 1), nn.Linear(2, 1)
        self.critic_updates, self.scale = critic_updates, scale
        self.noisy = False
        self.calls: list[str] = []
        self.gradients: list[bool] = []
        self.hook: Callable[[int], float] = lambda call: 1.0

    def modules(self) -> dict[str, nn.Module]:
        names = {"generator": self.net}
        if self.critic_updates:
            names |= {"critic": self.critic, "heads": self.heads}
        return dict(names)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        roles = {"generator": list(self.net.parameters())}
        if self.critic_updates:
            roles["critic"] = list(self.critic.parameters())
            roles["critic_heads"] = list(self.heads.parameters())
        return roles

    def _loss(self, batch: Batch, rng: Rng, role: str) -> Loss:
        self.calls.append(role)
        self.gradients.append(self.net.weight.requires_grad)
        x = batch.latents
        if self.noisy:
            x = x + randn(x.shape, x, rng)
        h = self.net(x)
        judged = self.critic(h) + self.heads(h) if self.critic_updates else h
        loss = self.scale * (judged**2).mean() * self.hook(len(self.calls))
        logs: Logs = {"loss": loss.detach()}
        return loss, logs

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        return self._loss(batch, rng, "generator")

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        return self._loss(batch, rng, "critic")


def trainer(
    stage: Linear, critic_warmup: int = 0, max_skipped: int = 0, **optim: object
) -> Trainer:
    config = OptimConfig(**(dict(updates=100, batch=4, lr=0.01) | optim))  # type: ignore[arg-type]
    return Trainer(
        stage, Numbers(), stage.modules(), ("generator",), config,
        seed=0, device=torch.device("cpu"), bf16=False, critic_warmup=critic_warmup,
        max_skipped=max_skipped,
    )  # fmt: skip


def weights(stage: Linear) -> list[torch.Tensor]:
    return [p.detach().clone() for m in stage.modules().values() for p in m.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("asked", [False, True])
def test_cudnns_attention_comes_first_while_training_if_asked_for(asked: bool) -> None:
    """In the backward pass too, where checkpointed blocks run again."""
    order, cudnn = torch._C._get_sdp_priority_order, int(SDPBackend.CUDNN_ATTENTION)
    before, firsts = order(), []

    def spy(*_: object) -> None:
        firsts.append(order()[0])

    stage = Linear(critic_updates=1)
    stage.net.weight.register_hook(spy)
    run = trainer(stage)
    run.cudnn_attention = asked
    stage.hook = lambda call: spy() or 1.0  # type: ignore[func-returns-value]
    assert before[0] != cudnn
    run.step()
    assert len(firsts) == 3 and (set(firsts) == {cudnn}) == asked
    assert order() == before


def test_accumulating_4_by_8_gives_the_gradient_of_a_batch_of_32() -> None:
    grads, logs = [], []
    for batch, accumulate in ((32, 1), (8, 4)):
        stage = Linear()
        run = trainer(stage, batch=batch, accumulate=accumulate, clip=1e9)
        logs.append(float((run.step() or {})["loss"]))
        grads.append([p.grad.clone() for p in stage.net.parameters() if p.grad is not None])
        assert run.position == 32
    assert len(grads[0]) == 2
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def count_clips(patch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """(number of parameters, limit) of every clipping from now on."""
    calls: list[tuple[int, float]] = []
    plain = torch.nn.utils.clip_grads_with_norm_

    def counted(parameters: list[nn.Parameter], limit: float, norm: torch.Tensor) -> None:
        calls.append((len(parameters), limit))
        plain(parameters, limit, norm)

    patch.setattr(torch.nn.utils, "clip_grads_with_norm_", counted)
    return calls


def test_gradients_are_clipped_once_per_update_after_accumulation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Linear(scale=1000.0)
    calls = count_clips(monkeypatch)
    logs = trainer(stage, accumulate=4, clip=0.5).step() or {}
    assert calls == [(2, 0.5)]
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in stage.net.parameters()
                         if p.grad is not None))  # fmt: skip
    assert norm == pytest.approx(0.5, rel=1e-3)
    assert float(logs["generator_norm"]) > 10  # the log tells the norm before clipping


def test_critic_and_generator_have_limits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_clips(monkeypatch)
    trainer(Linear(critic_updates=2), clip=0.5, critic_clip=7.0).step()
    assert calls == [(4, 7.0), (4, 7.0), (2, 0.5)]


def test_the_average_has_its_closed_form() -> None:
    """e_n = d^n w_0 + (1 - d) sum_k d^(n-k) w_k"""
    stage, decay, updates = Linear(), 0.8, 6
    run = trainer(stage, ema=decay)
    want = decay**updates * stage.net.weight.detach().double()
    for k in range(1, updates + 1):
        run.step()
        want = want + (1 - decay) * decay ** (updates - k) * stage.net.weight.detach().double()
    average = run.averages.tensors["generator"]["weight"]
    torch.testing.assert_close(average.double(), want, atol=1e-6, rtol=1e-5)
    assert not torch.equal(average, stage.net.weight)
    assert not average.requires_grad


def test_critic_updates_come_first_and_the_warmup_once() -> None:
    stage = Linear(critic_updates=3)
    run = trainer(stage, critic_warmup=4)
    run.step()
    assert stage.calls == ["critic"] * 7 + ["generator"]
    run.step()
    assert stage.calls[8:] == ["critic"] * 3 + ["generator"]
    source = run.source
    assert isinstance(source, Numbers)
    assert source.asked == [(4 * i, 4) for i in range(12)]  # no sample is seen twice


def test_only_the_role_that_steps_gets_gradients_and_moves() -> None:
    stage = Linear(critic_updates=1)
    run = trainer(stage)
    before = weights(stage)
    run._optimise("critic", 0)
    after = weights(stage)
    assert equal(before[:2], after[:2])
    assert not any(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))
    assert stage.gradients == [False]
    assert all(p.grad is None for p in stage.net.parameters())
    assert all(p.requires_grad for m in stage.modules().values() for p in m.parameters())
    critic = [p.grad.clone() for p in stage.critic.parameters() if p.grad is not None]
    run._optimise("generator", 0)
    assert stage.gradients == [False, True]
    assert equal(weights(stage)[2:], after[2:])
    assert not equal(weights(stage)[:2], after[:2])
    for p, g in zip(stage.critic.parameters(), critic, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)


def test_roles_have_learning_rates_of_their_own() -> None:
    run = trainer(Linear(critic_updates=1), lr=0.01, critic_lr=0.02, heads_lr=0.03,
                  critic_betas=(0.0, 0.9))  # fmt: skip
    groups = run.optimizers["critic"][0].param_groups
    assert [g["lr"] for g in groups] == [0.02, 0.03]
    assert [g["betas"] for g in groups] == [(0.0, 0.9)] * 2
    assert [g["lr"] for g in run.optimizers["generator"][0].param_groups] == [0.01]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_its_name_and_update(value: float) -> None:
    stage = Linear()
    stage.hook = lambda call: value if call == 3 else 1.0
    run = trainer(stage)
    run.step()
    run.step()
    before = weights(stage)
    with pytest.raises(NonFinite, match=f"update 2: generator loss is {value}"):
        run.step()
    assert equal(weights(stage), before)  # the bad step was not taken


def test_a_gradient_that_is_not_finite_names_the_tensor() -> None:
    stage = Linear()
    run = trainer(stage)
    stage.net.bias.register_hook(lambda g: g * math.nan)
    with pytest.raises(NonFinite, match=r"update 0: the gradient of generator\.bias is not finite"):
        run.step()


def test_the_critics_loss_is_checked_too() -> None:
    stage = Linear(critic_updates=1)
    stage.hook = lambda call: math.nan
    with pytest.raises(NonFinite, match="update 0: critic loss is nan"):
        trainer(stage).step()


def test_the_learning_rate_ramps_up_and_falls_as_a_cosine() -> None:
    run = trainer(Linear(), updates=100, warmup=20, schedule="cosine", lr=0.01)
    rates = []
    for update in range(100):
        run.update = update
        rates.append(run.rate())
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert all(a >= b for a, b in pairwise(rates[20:]))
    run.update = 100
    assert run.rate() == pytest.approx(0.1)
    run.update = 10
    run.step()
    assert run.optimizers["generator"][0].param_groups[0]["lr"] == pytest.approx(0.01 * 11 / 20)
    constant = trainer(Linear(), warmup=0)
    constant.update = 77
    assert constant.rate() == 1.0


@pytest.mark.parametrize("critic_updates,stops", [(0, range(1, 5)), (2, range(1, 15))])
def test_a_run_resumed_at_any_step_equals_a_straight_one_bit_for_bit(
    critic_updates: int, stops: range, tmp_path: Path
) -> None:
    """Stopped before each step of the first updates in turn: critic, critic, generator, ..."""
    optim = dict(warmup=4, schedule="cosine", ema=0.9, accumulate=2)

    def fresh() -> tuple[Linear, Trainer]:
        stage = Linear(critic_updates)
        stage.noisy = True
        return stage, Trainer(
            stage, Numbers(), stage.modules(), ("generator",),
            OptimConfig(updates=10, batch=4, lr=0.01, critic_betas=(0.5, 0.9), **optim),  # type: ignore[arg-type]
            seed=5, device=torch.device("cpu"), bf16=False,
            critic_warmup=3 if critic_updates else 0,
        )  # fmt: skip

    straight, run = fresh()
    for _ in range(5):
        run.step()

    turns = set()
    for stop in stops:
        _, part = fresh()
        asked = iter([False] * stop + [True])
        while part.step(lambda asked=asked: next(asked)) is not None:  # type: ignore[misc]
            pass
        turns.add((part.update, part.turn))
        folder = checkpoint.step_folder(tmp_path, part.update, part.turn)
        checkpoint.save(folder, part.tensors(), {"counters": part.counters()})
        assert checkpoint.steps(tmp_path) == [folder]
        torch.manual_seed(99)  # nothing may hang on the global generator
        second, rest = fresh()
        with torch.no_grad():
            for module in second.modules().values():
                for p in module.parameters():
                    p.zero_()
        meta = checkpoint.read_meta(folder)
        rest.restore(
            meta["counters"], checkpoint.shapes(folder),
            lambda tensors, folder=folder: checkpoint.load(folder, tensors),
        )  # fmt: skip
        while rest.update < 5:
            rest.step()
        assert rest.counters() == run.counters()
        assert equal(weights(second), weights(straight))
        ema = [list(r.averages.tensors["generator"].values()) for r in (run, rest)]
        assert equal(*ema)
    assert len(turns) == len(stops)


def seeds_of(stage: Linear, run: Trainer, updates: int) -> list[list[int]]:
    """Seeds of the samples of each micro-batch, and the shared one last."""
    seen: list[list[int]] = []
    plain = stage._loss

    def spying(batch: Batch, rng: Rng, role: str) -> Loss:
        assert isinstance(rng, SampleNoise)
        seen.append([g.initial_seed() for g in (*rng.samples, rng.shared)])
        return plain(batch, rng, role)

    stage._loss = spying  # type: ignore[method-assign]
    for _ in range(updates):
        run.step()
    return seen


def test_noise_hangs_on_update_role_step_and_sample_but_not_on_the_split() -> None:
    stage = Linear(critic_updates=2)
    whole = seeds_of(stage, trainer(stage), 2)
    assert len(whole) == 6
    assert len({seed for micro in whole for seed in micro}) == 6 * 5
    stage = Linear(critic_updates=2)
    split = seeds_of(stage, trainer(stage, batch=1, accumulate=4), 2)
    assert len(split) == 24
    joined = [
        [*[micro[0] for micro in split[4 * i : 4 * i + 4]], split[4 * i][1]] for i in range(6)
    ]
    assert joined == whole


def test_a_step_that_is_not_finite_may_be_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Linear()
    stage.hook = lambda call: math.nan if call in (2, 3, 5, 6, 7) else 1.0
    run = trainer(stage, max_skipped=2)
    run.step()
    before, average = weights(stage), run.averages.tensors["generator"]["weight"].clone()
    for _ in range(2):
        assert "loss" not in (run.step() or {})
    assert equal(weights(stage), before)
    assert torch.equal(run.averages.tensors["generator"]["weight"], average)
    assert (run.update, run.position, run.skipped) == (3, 12, 2)
    assert "skipped a step: update 1: generator loss is nan (samples 4 to 7)" in (
        capsys.readouterr().out
    )
    assert float((run.step() or {})["skipped"]) == 2  # a good one ends the row
    assert run.skipped_in_a_row == 0
    with pytest.raises(NonFinite, match="update 6: .* nan .*; 3 steps in a row"):
        for _ in range(3):
            run.step()


def test_states_on_the_cpu_change_no_number(tmp_path: Path) -> None:
    """Also continued with them elsewhere than before."""

    def fresh(on_cpu: bool) -> tuple[Linear, Trainer]:
        stage = Linear(critic_updates=1)
        return stage, Trainer(
            stage, Numbers(), stage.modules(), ("generator",),
            OptimConfig(batch=4, lr=0.01, ema=0.9), seed=5, device=torch.device("cpu"), bf16=False,
            average_on_cpu=on_cpu, moments_on_cpu=on_cpu,
        )  # fmt: skip

    ends = []
    for first, then in ((False, False), (True, True), (False, True), (True, False)):
        _, run = fresh(first)
        run.step()
        folder = checkpoint.step_folder(tmp_path / f"{first}-{then}", 1)
        checkpoint.save(folder, run.tensors(), {"counters": run.counters()})
        stage, run = fresh(then)
        run.restore(
            checkpoint.read_meta(folder)["counters"], checkpoint.shapes(folder),
            lambda tensors, folder=folder: checkpoint.load(folder, tensors),
        )  # fmt: skip
        run.step()
        ends.append([*weights(stage), *run.averages.tensors["generator"].values()])
    for end in ends[1:]:  # torch's AdamW rounds differently from the one that can stay on the CPU
        for mine, theirs in zip(end, ends[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
