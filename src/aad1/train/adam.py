"""AdamW without a first moment, for betas (0, b): 4 bytes less per weight.

torch's AdamW keeps the first moment even where it is the gradient itself. The update is the same (a
test holds the two against each other): v <- b v + (1 - b) g^2, w <- (1 - lr wd) w - lr g / (sqrt(v
/ (1 - b^t)) + eps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from aad1.parallel.shard import local

AT_ONCE = 2**26
"""Weights that are updated in one call; more would only need memory for what lies between."""


class MomentlessAdamW(torch.optim.Optimizer):
    """Decoupled weight decay, per-group lr and weight_decay; sharded weights are welcome."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        beta: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "beta": beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

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
                    state["square"] = torch.zeros_like(p)
                state["step"] += 1
                by_step.setdefault(int(state["step"]), []).append(p)
            for step, params in by_step.items():
                for part in _parts(params):
                    self._update(part, step, group)

    def _update(self, params: list[nn.Parameter], step: int, group: dict[str, Any]) -> None:
        weights = [local(p) for p in params]
        gradients = [local(p.grad) for p in params if p.grad is not None]
        squares = [local(self.state[p]["square"]) for p in params]
        lr, beta = group["lr"], group["beta"]
        torch._foreach_mul_(squares, beta)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta)
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, (1 - beta**step) ** 0.5)
        torch._foreach_add_(below, group["eps"])
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, gradients, below, -lr)


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
