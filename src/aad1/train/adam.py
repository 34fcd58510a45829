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
    numbers are the same. fused: one kernel for the whole update, which reads and writes each number
    once; rounding differs. None: where the weights are on CUDA.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        on_cpu: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.on_cpu, self.fused = on_cpu, fused

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
                by_step.setdefault(int(state["step"]) + 1, []).append(p)
            for step, params in by_step.items():
                torch._foreach_add_([self.state[p]["step"] for p in params], 1)
                for part in _parts(params):
                    self._update(part, step, group)
        if self.on_cpu:
            synchronise()

    def _update(self, params: list[nn.Parameter], step: int, group: dict[str, Any]) -> None:
        weights = [local(p) for p in params]
        gradients = [local(p.grad) for p in params if p.grad is not None]
        kept = [local(self.state[p][n]) for n in moments(group["betas"]) for p in params]
        a = group["betas"][0]
        with on_device(kept, weights[0].device) as here:
            squares = here[-len(params) :]
            # Where beta1 is 0 the first moment is the gradient itself.
            means = here[: len(params)] if a else gradients
            fused = weights[0].is_cuda if self.fused is None else self.fused
            (_fused if fused else _foreach)(weights, gradients, means, squares, step, group)


Tensors = list[torch.Tensor]


def _foreach(
    weights: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, step: int,
    group: dict[str, Any],
) -> None:  # fmt: skip
    """The update in operations on lists of tensors."""
    lr, (a, b) = group["lr"], group["betas"]
    if a:
        torch._foreach_lerp_(means, gradients, 1 - a)
    torch._foreach_mul_(squares, b)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - b)
    below = torch._foreach_sqrt(squares)
    torch._foreach_div_(below, (1 - b**step) ** 0.5)
    torch._foreach_add_(below, group["eps"])
    torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(weights, means, below, -lr / (1 - a**step))


def _fused(
    weights: Tensors, gradients: Tensors, means: Tensors, squares: Tensors, step: int,
    group: dict[str, Any],
) -> None:  # fmt: skip
    """The update in torch's own kernel. With beta1 = 0 it writes the gradient into the first
    moment, so it may be given the gradient for it."""
    (a, b), device = group["betas"], weights[0].device
    count = torch.full((), float(step), dtype=torch.float32, device=device)
    torch._fused_adamw_(
        weights, gradients, means, squares, [], [count] * len(weights), lr=group["lr"], beta1=a,
        beta2=b, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
        maximize=False,
    )  # fmt: skip


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
