"""The collapse monitor: motion of fixed validation rollouts against real motion.

A generator that copies its first frame has perfect frames and no motion; losses do not see it.
So stages II and III roll out the same held-out first frames every few updates and compare the
optical flow with that of the real continuations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aad1.evaluate.motion import motion
from aad1.evaluate.report import evaluate_videos, measure_real
from aad1.parallel.mesh import Processes, split_evenly
from aad1.pipeline import Pipeline
from aad1.train.config import MonitorConfig
from aad1.train.sources import World

LEAST_FOR_DISTANCES = 32
FLOW_STRIDE = 3
"""Every third pair of frames is measured: a third of the time, the same mean. An even stride would
not see a video whose every frame comes twice."""


@dataclass
class CollapseMonitor:
    """Decides from the history of M whether the generator's motion has collapsed.

    The best M is the one nearest to 1 on a ratio scale. A *fall* is a check whose motion, capped at
    real motion, is below `config.fall` of it; `config.patience` falls in a row mean collapse.
    """

    config: MonitorConfig
    best: float = 0.0
    falls: int = 0
    history: list[list[float]] = field(default_factory=list)
    """[update, M] of every check."""
    kept: dict[str, Any] | None = None
    """Update and weights of the check with the best M (the latest of equals)."""

    def check(self, update: int, m: float, weights: Mapping[str, torch.Tensor]) -> None:
        """Record M at an update, and keep (a copy of) the weights if none had a better M."""
        self.history.append([update, m])
        self.falls = self.falls + 1 if min(m, 1.0) < self.config.fall * self.best else 0
        # A generator that has barely moved from a noisy start may flicker at M far above 1: as a
        # choice of weights, twice the motion is as far from real as half of it.
        near = min(m, 1.0 / max(m, 1e-6))
        if near >= self.best:
            self.best = near
            if self.config.early_stop:
                kept = {k: v.detach().clone() for k, v in weights.items()}
                self.kept = {"update": update, "weights": kept}

    @property
    def fallen(self) -> bool:
        """Whether the last check was a fall."""
        return self.falls > 0

    @property
    def collapsed(self) -> bool:
        """Whether the falls have lasted for `config.patience` checks."""
        return self.falls >= self.config.patience

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {k: getattr(self, k) for k in ("best", "falls", "history", "kept")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        for name, value in state.items():
            setattr(self, name, value)


class Validation:
    """Fixed held-out clips, and what a pipeline makes of their first frames."""

    def __init__(self, world: World, clips: int) -> None:
        self.codec = world.codec
        self.together = 1 if world.large else 32
        self.video, self.batch = world.heldout(clips)
        # Frechet distances need a covariance from each side; with fewer clips only motion is told.
        self.distances = clips >= LEAST_FOR_DISTANCES
        self.real = motion(self.video, stride=FLOW_STRIDE)
        if self.distances:
            self.statistics = measure_real(self.video, stride=FLOW_STRIDE)

    @torch.no_grad()
    def rollouts(self, pipeline: Pipeline, processes: Processes | None = None) -> torch.Tensor:
        """Latents [N, C, F, h, w] from the real clips' first frames, as long as those.

        Data-parallel groups make a part each; all get all.
        """
        processes = processes or Processes()
        geometry = pipeline.info.geometry
        latents = self.batch.latents
        chunks = geometry.chunks(latents.shape[2]) - 1
        made = []
        own = split_evenly(len(latents), processes.shape.dp, processes.dp_rank)
        for index in torch.tensor(own).split(self.together):
            numbers = index.tolist()
            captions = [self.batch.captions[i] for i in numbers]
            first = latents[numbers][:, :, : geometry.first]
            made.append(pipeline.generate_latents(first, captions, numbers, chunks))
        if processes.size == 1:
            return torch.cat(made)
        by_rank = processes.gather(torch.cat(made).cpu())[:: processes.shape.cp]
        return torch.cat(by_rank)[: len(latents)].to(latents.device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, F, h, w] -> uint8 [N, T, H, W, 3]."""
        return torch.cat([self.codec.decode(part) for part in latents.split(32)])

    def measure(self, video: torch.Tensor) -> dict[str, float]:
        """M and late M of generated clips, and with enough clips FDtd and FDnss."""
        if self.distances:
            figures = evaluate_videos(video, self.statistics)
            return {k: figures[k] for k in ("M", "late_M", "FDtd", "FDnss_early", "FDnss_late")}
        made = motion(video, stride=FLOW_STRIDE)
        return {
            "M": float(made.magnitude.mean() / self.real.magnitude.mean()),
            "late_M": float(made.late.mean() / self.real.late.mean()),
        }
