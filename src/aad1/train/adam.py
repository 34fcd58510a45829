"""AdamW that keeps little: no first moment where beta1 is 0, and moments on the CPU if asked for.

torch's AdamW keeps the first moment even where it is the gradient itself: 4 bytes a weight. The
update is the same (a test holds the two against each other):

    m <- a m + (1 - a) g,  v <- b v + (1 - b) g^2
    w <- (1 - lr wd) w - lr m / (1 - a^t) / (sqrt(v / (1 - b^t)) + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from aad1.parallel.shard import local, on_device, synchronise, zeros_for

AT_ONCE = 2**26
"""Weights that are updated in one call; more would only need memory for what lies between."""


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay, per-group lr and weight_decay; sharded weights are welcome.

    on_cpu: keep the moments in the CPU's memory. They pass through the device part by part, so the
    numbers are the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        on_cpu: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.on_cpu = on_cpu

    def blank(self, p: nn.Parameter) -> torch.Tensor:
        """A moment of a weight before the first step."""
        return zeros_for(p, on_cpu=self.on_cpu)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_step: dict[int, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in moments(group["betas"]):
                        state[name] = self.blank(p)
                state["step"] += 1
                by_step.setdefault(int(state["step"]), []).append(p)
            for step, params in by_step.items():
                for part in _parts(params):
                    self._update(part, step, group)
        if self.on_cpu:
            synchronise()

    def _update(self, params: list[nn.Parameter], step: int, group: dict[str, Any]) -> None:
        weights = [local(p) for p in params]
        gradients = [local(p.grad) for p in params if p.grad is not None]
        kept = [local(self.state[p][n]) for n in moments(group["betas"]) for p in params]
        lr, (a, b) = group["lr"], group["betas"]
        with on_device(kept, weights[0].device) as here:
            squares = here[-len(params) :]
            means = gradients
            if a:
                means = here[: len(params)]
                torch._foreach_lerp_(means, gradients, 1 - a)
            torch._foreach_mul_(squares, b)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - b)
            below = torch._foreach_sqrt(squares)
            torch._foreach_div_(below, (1 - b**step) ** 0.5)
            torch._foreach_add_(below, group["eps"])
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_addcdiv_(weights, means, below, -lr / (1 - a**step))


def moments(betas: tuple[float, float]) -> tuple[str, ...]:
    """Names of what is kept of a weight; torch's own where both moments are."""
    return ("exp_avg", "exp_avg_sq") if betas[0] else ("square",)


def _parts(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    part: list[nn.Parameter] = []
    size = 0
    for p in params:
        part.append(p)
        size += local(p).numel()
        if size >= AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part
