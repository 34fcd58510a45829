"""The training loop: it knows updates, optimisers and averages, and no stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aad1.stages.base import Logs, Stage
from aad1.train.config import OptimConfig
from aad1.train.muon import Muon
from aad1.train.sources import Source, key


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number: the run stops and says where."""


class Trainer:
    """Updates of one stage: critic steps, then one generator step, then the averages.

    stage: the objective. modules: networks to checkpoint, by role. averaged: roles of which an
    exponential moving average is kept (`ema`), which is what gets shipped.
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
    ) -> None:
        self.stage, self.source, self.config = stage, source, config
        self.modules, self.seed, self.device, self.bf16 = dict(modules), seed, device, bf16
        self.critic_warmup = critic_warmup
        self.ema = {name: copy.deepcopy(modules[name]).eval() for name in averaged}
        for module in self.ema.values():
            module.requires_grad_(False)
        self.update = 0
        self.position = 0
        self.spent = 0.0
        """Share of the run's time limit that has passed (0 without a limit)."""
        self.parameters = stage.trained()
        self.optimizers = self._optimizers()

    def _optimizers(self) -> dict[str, list[torch.optim.Optimizer]]:
        c = self.config
        fused = self.device.type == "cuda"
        groups: list[dict[str, Any]] = [{"params": self.parameters["generator"]}]
        out: dict[str, list[torch.optim.Optimizer]] = {"generator": []}
        if c.optimizer == "muon":
            matrices, groups = _matrices(self.modules["generator"], self.parameters["generator"])
            out["generator"].append(Muon(matrices, lr=c.lr, weight_decay=c.weight_decay))
        out["generator"].append(
            torch.optim.AdamW(
                groups, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=fused
            )
        )
        if "critic" in self.parameters:
            groups = [{"params": self.parameters["critic"], "lr": c.critic_lr}]
            if "critic_heads" in self.parameters:
                groups.append({"params": self.parameters["critic_heads"], "lr": c.heads_lr})
            out["critic"] = [
                torch.optim.AdamW(
                    groups,
                    lr=c.critic_lr,
                    betas=c.critic_betas,
                    weight_decay=c.weight_decay,
                    fused=fused,
                )
            ]
        return out

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

    def step(self) -> Logs:
        """One update: critic steps, the generator step, the averages.

        Returns the logs of the last critic step and of the generator step.
        """
        logs: Logs = {}
        extra = self.critic_warmup if self.update == 0 else 0
        for i in range(self.stage.critic_updates + extra):
            logs |= self._optimise("critic", i)
        for optimizer in self.optimizers["generator"]:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * self.rate()
        logs |= self._optimise("generator", 0)
        self.update += 1
        self._average()
        return logs

    def _optimise(self, role: str, index: int) -> Logs:
        """Zero once, back-propagate every micro-batch, clip once, step once."""
        c = self.config
        for optimizer in self.optimizers[role]:
            optimizer.zero_grad(set_to_none=True)
        with _grad_only_for(self.parameters, role):
            total: Logs = {}
            for micro in range(c.accumulate):
                batch = self.source.batch(self.position, c.batch)
                self.position += c.batch
                rng = torch.Generator(device=self.device)
                rng.manual_seed(key(self.seed, role, self.update, index, micro))
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    if role == "critic":
                        loss, logs = self.stage.critic_loss(batch, rng)
                    else:
                        loss, logs = self.stage.generator_loss(batch, rng)
                (loss / c.accumulate).backward()
                for name, value in logs.items():
                    total[name] = total.get(name, torch.zeros_like(value)) + value / c.accumulate
        owned = [p for name, ps in self.parameters.items() if name.startswith(role) for p in ps]
        limit = c.critic_clip if role == "critic" else c.clip
        norm = torch.nn.utils.get_total_norm([p.grad for p in owned if p.grad is not None])
        self._check(role, total, norm)  # before clipping spreads one bad gradient to all
        torch.nn.utils.clip_grads_with_norm_(owned, limit, norm)
        for optimizer in self.optimizers[role]:
            optimizer.step()
        total[f"{role}_norm"] = norm.detach()
        return total

    def _check(self, role: str, logs: Logs, norm: torch.Tensor) -> None:
        values = torch.stack([*(v.float() for v in logs.values()), norm.float()])
        if bool(torch.isfinite(values).all()):
            return
        for name, value in logs.items():
            if not bool(torch.isfinite(value)):
                raise NonFinite(f"update {self.update}: {role} {name} is {float(value)}")
        for module_name, module in self.modules.items():
            for name, p in module.named_parameters():
                if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                    raise NonFinite(
                        f"update {self.update}: the gradient of {module_name}.{name} is not finite"
                    )
        raise NonFinite(f"update {self.update}: the {role}'s gradient norm is {float(norm)}")

    @torch.no_grad()
    def _average(self) -> None:
        for name, ema in self.ema.items():
            average: list[torch.Tensor] = list(ema.parameters())
            live: list[torch.Tensor] = list(self.modules[name].parameters())
            torch._foreach_lerp_(average, live, 1 - self.config.ema)

    # -- resuming -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a continued run needs."""
        return {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "ema": {k: m.state_dict() for k, m in self.ema.items()},
            "optimizers": {
                k: [o.state_dict() for o in listed] for k, listed in self.optimizers.items()
            },
            "update": self.update,
            "position": self.position,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, module in self.ema.items():
            module.load_state_dict(state["ema"][name])
        for name, listed in self.optimizers.items():
            for optimizer, saved in zip(listed, state["optimizers"][name], strict=True):
                optimizer.load_state_dict(saved)
        self.update, self.position = state["update"], state["position"]


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
