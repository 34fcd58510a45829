"""Samplers of the probability-flow ODE dx/dsigma = v: where they step, and how.

Three grids: "exact" is our own, shift(i / steps), for trajectories (algorithm.md, section 2);
"euler" and "unipc" are those of diffusers' FlowMatchEulerDiscreteScheduler and
UniPCMultistepScheduler (flow mode) with the same shift, so that a teacher sampled here is the one
of diffusers' WanPipeline. They begin below or end above the exact grid and, for UniPC, show the
network whole timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch

from aad1.core.flow import sigma_grid
from aad1.errors import UserError

SolverName = Literal["exact", "euler", "unipc"]
TIMESTEPS = 1000
"""Noise levels that Wan was trained on; both of diffusers' grids are cut from them."""


@dataclass(frozen=True)
class Grid:
    """sigmas: noise levels of the states, steps + 1 of them, falling to 0. shown: what the network
    is told at each of the steps."""

    sigmas: tuple[float, ...]
    shown: tuple[float, ...]


def grid(solver: SolverName, steps: int, shift: float) -> Grid:
    """The grid of a sampler. UserError for an unknown one, steps < 1 or shift <= 0."""
    if solver not in get_args(SolverName):
        raise UserError(f"solver must be one of {', '.join(get_args(SolverName))}, got {solver!r}")
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise UserError(f"shift must be above 0, got {shift}")
    if solver == "exact":
        sigmas = sigma_grid(steps, shift).numpy()
        return Grid(tuple(sigmas.tolist()), tuple(sigmas[:-1].tolist()))
    if solver == "euler":
        last = _shift(np.float64(1 / TIMESTEPS), shift)  # shifted once here and once more below
        levels = np.linspace(1, last, steps)
        shown = _shift(levels, shift).astype(np.float32)
    else:
        levels = np.linspace(1, 1 / TIMESTEPS, steps + 1)[:-1]
        levels = _shift(levels, shift)
        levels[0] -= 1e-6  # lambda = log((1 - sigma) / sigma) must be finite
        shown = np.floor(levels * TIMESTEPS) / TIMESTEPS
        levels = levels.astype(np.float32)
    sigmas = shown if solver == "euler" else levels
    return Grid((*sigmas.astype(np.float64).tolist(), 0.0), tuple(shown.astype(float).tolist()))


def _shift(u: np.typing.NDArray[np.float64] | np.float64, k: float) -> np.ndarray:
    return np.asarray(k * u / (1 + (k - 1) * u))


class Solver(Protocol):
    """Takes one sample from noise level to noise level along a grid; used once."""

    def step(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The state at the next level, from the state x at this one and the velocity there."""
        ...


class Euler:
    """x + (sigma' - sigma) v."""

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        self._sigmas, self._at = sigmas, 0

    def step(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sigma, after = self._sigmas[self._at : self._at + 2]
        self._at += 1
        return x + (after - sigma) * v


class UniPC:
    """UniPC of order 2 with B(h) = e^h - 1 on x0 (arXiv 2302.04867), first order at both ends.

    Each step first corrects the state that it is given, with the velocity found there, and then
    predicts the next one. With lambda = log((1 - sigma) / sigma), h the step in it and m the
    estimates of x0, both are

        x' = sigma'/sigma x + (1 - sigma') (1 - e^-h) (m + sum of weighted differences of m).
    """

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        self._sigmas, self._at = sigmas, 0
        self._lambdas = [_log_ratio(s) for s in sigmas]
        self._m: list[torch.Tensor] = []  # estimates of x0 at the steps done, the latest last
        self._x = torch.empty(0)  # the corrected state before the last prediction
        self._order = 0  # of the last prediction

    def step(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i = self._at
        m = x - self._sigmas[i] * v
        if i:
            x = self._correct(i, m)
        self._m = [*self._m[-1:], m]
        self._order = min(2, len(self._sigmas) - 1 - i, i + 1)
        self._x, self._at = x, i + 1
        difference = torch.zeros_like(m)
        if self._order == 2:
            difference = 0.5 * (self._m[0] - m) / self._ratio(i, i + 1)
        return self._move(x, i, i + 1, m + difference)

    def _correct(self, i: int, m: torch.Tensor) -> torch.Tensor:
        """The state at level i again, now that the estimate m of x0 there is known."""
        before = self._m[-1]
        if self._order == 1:
            return self._move(self._x, i - 1, i, before + 0.5 * (m - before))
        h = self._lambdas[i] - self._lambdas[i - 1]
        r = self._ratio(i - 1, i)
        # The two moments that the weights must meet: phi_2 and 2 phi_3 of -h, over phi_1.
        scale = math.expm1(-h)
        phi_2 = scale / -h - 1
        b1, b2 = phi_2 / scale, 2 * (phi_2 / -h - 0.5) / scale
        older = (b1 - b2) / (1 - r)
        newer = b1 - older
        difference = older * (self._m[0] - before) / r + newer * (m - before)
        return self._move(self._x, i - 1, i, before + difference)

    def _ratio(self, i: int, j: int) -> float:
        """(lambda of the step before i - lambda of i) / (lambda of j - lambda of i)."""
        at = self._lambdas
        return (at[i - 1] - at[i]) / (at[j] - at[i])

    def _move(self, x: torch.Tensor, i: int, j: int, m: torch.Tensor) -> torch.Tensor:
        s, t = self._sigmas[i], self._sigmas[j]
        h = self._lambdas[j] - self._lambdas[i]
        return (t / s) * x - (1 - t) * math.expm1(-h) * m


def _log_ratio(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def solver(name: SolverName, sigmas: tuple[float, ...]) -> Solver:
    """A fresh sampler for one sample along `sigmas`."""
    return UniPC(sigmas) if name == "unipc" else Euler(sigmas)
