"""Muon for many small matrices: torch.optim.Muon's update, all matrices of one shape at once.

torch's own Muon takes one matrix after another, some 25 kernels each. A network of a hundred small
matrices then spends more time on launching than on arithmetic; stacked by shape it is a few dozen
launches in all. The update is the same (a test holds the two against each other).

Muon (Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix by a quintic
Newton-Schulz iteration, scaled by 0.2 sqrt(max(rows, columns)) so that learning rates suited to
AdamW carry over (Liu et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the iteration: steep at 0 and not quite convergent at 1, which does no harm.
_A, _B, _C = 3.4445, -4.775, 2.0315
_EPS = 1e-7


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T of each matrix U S V^T; [N, rows, columns], computed in bfloat16.

    Singular values come out between about 0.7 and 1.2.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; for matrices only."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon is for matrices, got a parameter of {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                self._update(params, shape, group)

    def _update(self, params: list[nn.Parameter], shape: torch.Size, group: dict[str, Any]) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        momentum = group["momentum"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)
        change = orthogonalise(torch.stack(list(ahead))).to(params[0].dtype)
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        weights: list[Tensor] = list(params)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(change.unbind()), alpha=-rate)
