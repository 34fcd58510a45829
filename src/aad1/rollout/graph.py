"""A whole training rollout as one CUDA graph: small models are bound by kernel launches.

A rollout of 5 chunks is some thousand small kernels, each launched from Python; a graph launches
them all at once. Weights are read at replay, so optimiser steps count.
"""

from __future__ import annotations

import torch

from aad1.rollout.stream import Recorded, Rollout, RolloutFn


class GraphedRollout:
    """Drop-in for `roll_out` on CUDA: captures once per (rollout, shapes, exit step).

    The recorded clip is overwritten by the next call: use it before, or clone what must stay.
    """

    def __init__(self, run: RolloutFn) -> None:
        self.run = run
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Recorded]] = {}

    def __call__(
        self,
        rollout: Rollout,
        image: torch.Tensor,
        text: torch.Tensor,
        noise: torch.Tensor,
        exit_step: int | None = None,
    ) -> Recorded:
        shapes = (image.shape, text.shape, noise.shape)
        name = (id(rollout.model), rollout.geometry, rollout.sigmas, shapes, exit_step)
        if name not in self._graphs:
            self._graphs[name] = self._capture(rollout, image, text, noise, exit_step)
        graph, inputs, recorded = self._graphs[name]
        with torch.no_grad():
            for static, value in zip(inputs, (image, text, noise), strict=True):
                static.copy_(value)
        graph.replay()
        return recorded

    @torch.no_grad()
    def _capture(
        self,
        rollout: Rollout,
        image: torch.Tensor,
        text: torch.Tensor,
        noise: torch.Tensor,
        exit_step: int | None,
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Recorded]:
        inputs = [x.detach().clone() for x in (image, text, noise)]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        dtype = torch.get_autocast_dtype("cuda")
        enabled = torch.is_autocast_enabled("cuda")

        def call() -> Recorded:
            # Autocast keeps casted weights until its context ends; one made outside the graph
            # would freeze the weights in it, so the graph opens its own without a cache.
            with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
                return self.run(rollout, inputs[0], inputs[1], inputs[2], exit_step)

        with torch.cuda.stream(stream):
            for _ in range(2):  # warm-up builds RoPE tables and library plans outside the graph
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = call()
        return graph, inputs, recorded
