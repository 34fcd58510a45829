"""The training loop: it knows updates, optimisers and averages, and no stage.

A run's numbers hang on the config alone, not on how many processes share the work. An update's
global batch (optim.batch x optim.accumulate clips) is split over the data-parallel groups, and each
group's part into micro-batches. Noise belongs to a sample: it is keyed by seed, role, update, step
of the update and the sample's number in the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from aad1.parallel.mesh import Processes, SharedError, share
from aad1.parallel.shard import (
    distribute,
    fix_precision,
    gathered,
    local,
    reduce_over_replicas,
    reshard,
    whole,
)
from aad1.stages.base import Batch, InParts, Logs, Loss, SampleNoise, Stage
from aad1.train.adam import AdamW
from aad1.train.averages import Averages
from aad1.train.blocks import attention_by
from aad1.train.config import OptimConfig
from aad1.train.muon import Muon
from aad1.train.reader import Reader
from aad1.train.sources import Source, key


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number: the run stops and says where."""


class Trainer:
    """Updates of one stage: critic steps, then one generator step, then the averages.

    stage: the objective. modules: networks to checkpoint, by role; they are shared out over the
    processes here. averaged: roles of which an exponential moving average is kept (`averages`),
    which is what gets shipped. max_skipped: steps in a row that may be left out because a number in
    them is not finite. keep_gathered: hold the generator's weights whole for the length of a step.
    average_on_cpu, moments_on_cpu, prefetch, cudnn_attention: see the config's fields.
    Whoever makes a trainer closes its `reader`.
    """

    def __init__(
        self,
        stage: Stage,
        source: Source,
        modules: Mapping[str, nn.Module],
        averaged: tuple[str, ...],
        config: OptimConfig,
        *,
        seed: int,
        device: torch.device,
        bf16: bool,
        critic_warmup: int = 0,
        processes: Processes | None = None,
        max_skipped: int = 0,
        keep_gathered: bool = True,
        average_on_cpu: bool = False,
        moments_on_cpu: bool = False,
        device_noise: bool = False,
        prefetch: int = 2,
        cudnn_attention: bool = False,
    ) -> None:
        self.stage, self.source, self.config = stage, source, config
        self.reader = Reader(source, device, prefetch)
        self.modules, self.seed, self.device, self.bf16 = dict(modules), seed, device, bf16
        self.critic_warmup, self.max_skipped = critic_warmup, max_skipped
        self.processes = processes or Processes()
        self.keep_gathered, self.cudnn_attention = keep_gathered, cudnn_attention
        self.noise_device = device if device_noise else torch.device("cpu")
        self.announces = device.type == "cuda"
        """Whether the host waits for the device in a step: what comes next is then begun before."""
        self.samples, self.micro = share(
            config.batch * config.accumulate, config.batch, self.processes.shape.dp
        )
        """Clips of one update that this data-parallel group takes, and clips at a time."""
        for module in self.modules.values():
            distribute(module, self.processes)
            if self.processes.gather_bf16:
                fix_precision(module)
        self.averages = Averages(
            {name: self.modules[name] for name in averaged}, config.ema, on_cpu=average_on_cpu
        )
        self.moments_on_cpu = moments_on_cpu
        self.update = 0
        self.turn = 0
        """Steps of the running update that are done: critic steps, then the generator's."""
        self.position = 0
        """Samples of the stream that are used up."""
        self.skipped = self.skipped_in_a_row = 0
        self.spent = 0.0
        """Share of the run's time limit that has passed (0 without a limit)."""
        self.parameters = stage.trained()
        self.optimizers = self._optimizers()

    def _optimizers(self) -> dict[str, list[torch.optim.Optimizer]]:
        c = self.config
        groups: list[dict[str, Any]] = [{"params": self.parameters["generator"]}]
        out: dict[str, list[torch.optim.Optimizer]] = {"generator": []}
        if c.optimizer == "muon":
            if self.processes.size > 1:
                raise SharedError(
                    "optim.optimizer muon needs whole matrices, which are in parts in "
                    f"{self.processes.size} processes: use one process, or adamw"
                )
            matrices, groups = _matrices(self.modules["generator"], self.parameters["generator"])
            out["generator"].append(Muon(matrices, lr=c.lr, weight_decay=c.weight_decay))
        out["generator"].append(self._adam(groups, c.lr, c.betas))
        if "critic" in self.parameters:
            groups = [{"params": self.parameters["critic"], "lr": c.critic_lr}]
            if "critic_heads" in self.parameters:
                groups.append({"params": self.parameters["critic_heads"], "lr": c.heads_lr})
            out["critic"] = [self._adam(groups, c.critic_lr, c.critic_betas)]
        return out

    def _adam(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        decay = self.config.weight_decay
        if betas[0] == 0 or self.moments_on_cpu:
            return AdamW(groups, lr, betas, weight_decay=decay, on_cpu=self.moments_on_cpu)
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=decay, fused=fused)

    def rate(self) -> float:
        """Factor on the generator's learning rate at this update: ramp, then schedule."""
        c = self.config
        if self.update < c.warmup:
            return (self.update + 1) / c.warmup
        if c.schedule == "constant":
            return 1.0
        # A run that ends by the clock anneals by the clock.
        done = max(self.spent, (self.update - c.warmup) / max(1, c.updates - c.warmup))
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))

    def step(self, stop: Callable[[], bool] = lambda: False) -> Logs | None:
        """One update: critic steps, the generator step, the averages.

        An update that was left in the middle is gone on with. stop is asked before each step; None
        if it said yes, and `state` may be saved then. Returns the logs of the last critic step and
        of the generator step.
        """
        logs: Logs = {}
        extra = self.critic_warmup if self.update == 0 else 0
        critic_steps = self.stage.critic_updates + extra
        while self.turn < critic_steps:
            if stop():
                return None
            logs |= self._optimise("critic", self.turn)
            self.turn += 1
        if stop():
            return None
        for optimizer in self.optimizers["generator"]:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * self.rate()
        before = self.skipped
        logs |= self._optimise("generator", 0)
        self.update += 1
        self.turn = 0
        if self.skipped == before:
            self.averages.update()
        if self.skipped:
            logs["skipped"] = torch.tensor(float(self.skipped))
        return logs

    def _optimise(self, role: str, index: int) -> Logs:
        """Zero once, back-propagate every micro-batch, clip once, step once."""
        c = self.config
        for optimizer in self.optimizers[role]:
            optimizer.zero_grad(set_to_none=True)
        seen: list[Logs] = []
        offset = self.processes.dp_rank * self.samples
        start = self.position + offset
        self.position += c.batch * c.accumulate
        owned = [p for name, ps in self.parameters.items() if name.startswith(role) for p in ps]
        with ExitStack() as stack:
            stack.enter_context(_grad_only_for(self.parameters, role))
            if self.keep_gathered:
                stack.enter_context(gathered(self.modules["generator"]))
            for done in range(0, self.samples, self.micro):
                last = done + self.micro == self.samples
                reduce_over_replicas(self.modules.values(), last)
                batch = self.reader.batch(start + done, self.micro, self._following(start, done))
                with attention_by(cudnn=self.cudnn_attention):
                    seen.append(self._micro(role, index, batch, offset + done))
        reshard(self.modules.values())
        total = self._means(seen)
        limit = c.critic_clip if role == "critic" else c.clip
        norm = torch.nn.utils.get_total_norm([p.grad for p in owned if p.grad is not None])
        if self.announces:
            self.reader.announce(self.position + offset, self.micro)
        # Before clipping spreads one bad gradient to all.
        if not self._finite(role, start, seen, total, whole(norm)):
            for optimizer in self.optimizers[role]:
                optimizer.zero_grad(set_to_none=True)
            return {}
        torch.nn.utils.clip_grads_with_norm_(owned, limit, norm)
        for optimizer in self.optimizers[role]:
            optimizer.step()
        total[f"{role}_norm"] = whole(norm).detach()
        return total

    def _following(self, start: int, done: int) -> Iterator[int]:
        """Positions of this group's micro-batches after the one at start + done."""
        while True:
            done += self.micro
            if done == self.samples:
                start, done = start + self.config.batch * self.config.accumulate, 0
            yield start + done

    def _micro(self, role: str, index: int, batch: Batch, number: int) -> Logs:
        """Gradients of one micro-batch: samples from `number` on in the global batch."""
        parts = self._losses(role, batch, self._noise(role, index, number))
        logs: Logs = {}
        while True:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.bf16,
                cache_enabled=self.processes.size == 1,  # a cast copy of all weights is not wanted
            ):  # fmt: skip
                part = next(parts, None)
            if part is None:
                return logs
            self._backward(part[0])
            logs |= part[1]

    def _backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the update's gradients."""
        (loss * (self.micro / self.samples)).backward()  # type: ignore[no-untyped-call]

    def _losses(self, role: str, batch: Batch, noise: SampleNoise) -> Iterator[Loss]:
        """Losses to back-propagate one after the other; usually there is one."""
        if role != "critic":
            yield self.stage.generator_loss(batch, noise)
        elif isinstance(self.stage, InParts):
            yield from self.stage.critic_parts(batch, noise)
        else:
            yield self.stage.critic_loss(batch, noise)

    def _noise(self, role: str, index: int, number: int) -> SampleNoise:
        step = (self.seed, role, self.update, index)
        seeds = [key(*step, n) for n in range(number, number + self.micro)]
        return SampleNoise(seeds, shared=key(*step), device=self.noise_device)

    def _means(self, seen: list[Logs]) -> Logs:
        """Logs over the micro-batches of all processes."""
        names = list(seen[0])
        mine = torch.stack([torch.stack([logs[n].float() for n in names]) for logs in seen])
        return dict(zip(names, self.processes.mean(mine.mean(0)).unbind(), strict=True))

    def _finite(
        self, role: str, start: int, seen: list[Logs], total: Logs, norm: torch.Tensor
    ) -> bool:
        """Whether all is finite. If not, all processes know: they skip the step, or `NonFinite`."""
        values = torch.stack([*(v.float() for v in total.values()), norm.float()])
        if bool(torch.isfinite(values).all()):
            self.skipped_in_a_row = 0
            return True
        found = self.processes.gather(self._culprit(role, start, seen))
        # A bad loss spreads to all gradients, so what it began with is told first.
        told = [(not loss, rank, what) for rank, (loss, what) in enumerate(found) if what]
        _, rank, what = min(told, default=(True, 0, f"the {role}'s gradient norm is {float(norm)}"))
        where = f" in process {rank}" if self.processes.size > 1 else ""
        message = f"update {self.update}: {what}{where}"
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            if self.max_skipped:
                message += f"; {self.skipped_in_a_row} steps in a row could not be taken"
            raise NonFinite(message)
        if self.processes.main:
            print(f"skipped a step: {message}", flush=True)
        return False

    def _culprit(self, role: str, start: int, seen: list[Logs]) -> tuple[bool, str]:
        """What is not finite in this process, or nothing; and whether it is a loss."""
        for i, logs in enumerate(seen):
            first = start + i * self.micro
            for name, value in logs.items():
                if not bool(torch.isfinite(value)):
                    samples = f"samples {first} to {first + self.micro - 1}"
                    return True, f"{role} {name} is {float(value)} ({samples})"
        for module_name, module in self.modules.items():
            for name, p in module.named_parameters():
                if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all()):
                    return False, f"the gradient of {module_name}.{name} is not finite"
        return False, ""

    # -- resuming -------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Where the run stands, as plain numbers."""
        return {name: getattr(self, name) for name in COUNTERS}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights, averages and moments by name: the tensors themselves, sharded as they are.

        With `counters` all that a continued run needs. To be called in all processes.
        """
        reshard(self.modules.values())
        out: dict[str, torch.Tensor] = {}
        for role, module in self.modules.items():
            for name, value in module.state_dict().items():
                out[f"model.{role}.{name}"] = value.detach()
        for role, tensors in self.averages.tensors.items():
            out |= {f"ema.{role}.{name}": value for name, value in tensors.items()}
        for prefix, optimizer, p in self._optimised():
            for name, value in optimizer.state.get(p, {}).items():
                out[f"{prefix}.{name}"] = value
        return out

    def _optimised(self) -> list[tuple[str, torch.optim.Optimizer, nn.Parameter]]:
        """Every trained parameter with its optimiser, and the name of the state it keeps there."""
        names = {
            id(p): f"{role}.{name}"
            for role, module in self.modules.items()
            for name, p in module.named_parameters()
        }
        return [
            (f"optimizer.{role}.{i}.{names[id(p)]}", optimizer, p)
            for role, listed in self.optimizers.items()
            for i, optimizer in enumerate(listed)
            for group in optimizer.param_groups
            for p in group["params"]
        ]

    def restore(
        self,
        counters: Mapping[str, int],
        stored: Mapping[str, tuple[int, ...]],
        load: Callable[[dict[str, torch.Tensor]], None],
    ) -> None:
        """Continue from `counters()` and `tensors()` of another run.

        stored: shapes by name of what was saved; load fills tensors of these names in place.
        """
        for prefix, optimizer, p in self._optimised():
            for name in STATES:
                shape = stored.get(f"{prefix}.{name}")
                if shape is None:
                    continue
                # A count of steps is a number, on the CPU unless the optimiser is fused.
                count = torch.zeros((), device=self.device if self._fused(optimizer) else "cpu")
                blank = optimizer.blank if isinstance(optimizer, AdamW) else torch.zeros_like
                optimizer.state[p][name] = blank(p) if shape else count
        load(self.tensors())
        for name in COUNTERS:
            setattr(self, name, counters[name])

    @staticmethod
    def _fused(optimizer: torch.optim.Optimizer) -> bool:
        return bool(optimizer.defaults.get("fused"))


COUNTERS = ("update", "turn", "position", "skipped", "skipped_in_a_row")
STATES = ("step", "exp_avg", "exp_avg_sq", "square", "momentum_buffer")
"""What the optimisers keep of a parameter."""


class _grad_only_for:
    """Within, only this role's parameters ask for gradients (the other nets pass them through)."""

    def __init__(self, parameters: Mapping[str, list[nn.Parameter]], role: str) -> None:
        self.off = [p for n, ps in parameters.items() if not n.startswith(role) for p in ps]

    def __enter__(self) -> None:
        for p in self.off:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p in self.off:
            p.requires_grad_(True)


def _matrices(
    model: nn.Module, parameters: list[nn.Parameter]
) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """Weight matrices inside the blocks, for Muon, and a group of all other parameters."""
    inside = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")]
    numbers = {id(p) for p in inside}
    return inside, [{"params": [p for p in parameters if id(p) not in numbers]}]
