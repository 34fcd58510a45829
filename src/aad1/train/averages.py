"""Exponential moving averages of weights, which are what a run ships."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from aad1.parallel.shard import local, on_device, reshard, synchronise, zeros_for

AT_ONCE = 2**26
"""Weights that are averaged in one call."""


class Averages:
    """e <- d e + (1 - d) w for all weights of some networks, sharded as these are.

    tensors: the averages, by role and name. on_cpu: keep them in the CPU's memory; they pass
    through the device part by part, so the numbers are the same.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], decay: float, *, on_cpu: bool = False
    ) -> None:
        self.modules, self.decay, self.on_cpu = dict(modules), decay, on_cpu
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        for role, module in self.modules.items():
            own = self.tensors[role] = {}
            for name, p in module.named_parameters():
                own[name] = zeros_for(p, on_cpu=on_cpu)
                local(own[name]).copy_(local(p.detach()))

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(average, weight) of every parameter: this process's part."""
        reshard(self.modules.values())
        for role, module in self.modules.items():
            own = self.tensors[role]
            yield from ((local(own[n]), local(p.detach())) for n, p in module.named_parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        part: list[tuple[torch.Tensor, torch.Tensor]] = []
        size = 0
        for pair in self._pairs():
            part.append(pair)
            size += pair[1].numel()
            if size >= AT_ONCE:
                self._take_in(part)
                part, size = [], 0
        self._take_in(part)
        if self.on_cpu:
            synchronise()

    def _take_in(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if pairs:
            weights = [w for _, w in pairs]
            with on_device([e for e, _ in pairs], weights[0].device) as averages:
                torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the networks have the averages for weights (and the averages are theirs)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
