"""Sampling the bidirectional teacher, and its trajectories for stage I."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aad1.core.flow import guide
from aad1.errors import UserError
from aad1.models.dit import WanTransformer
from aad1.rollout.solvers import SolverName, grid, solver


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a teacher is sampled unless one says otherwise."""

    steps: int = 50
    guidance: float = 5.0
    """uncond + guidance (cond - uncond); 1 is no guidance."""
    shift: float = 5.0
    solver: SolverName = "unipc"
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        grid(self.solver, self.steps, self.shift)  # refuses what cannot be
        if not self.guidance >= 0:
            raise UserError(f"guidance must be at least 0, got {self.guidance}")


@torch.no_grad()
def sample(
    teacher: WanTransformer,
    noise: torch.Tensor,
    text: torch.Tensor,
    null: torch.Tensor | None,
    *,
    steps: int,
    shift: float,
    guidance_scale: float,
    keep: Sequence[float] = (),
    image: torch.Tensor | None = None,
    solver_name: SolverName = "exact",
    on_step: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip per row of noise; Euler on dx/dsigma = v over the exact grid unless told otherwise.

    noise [B, C, F, H, W]; text and null as the transformer takes them (null None: no guidance).
    keep: noise levels whose states are wanted; each must lie on the grid.
    image: clean first frames [B, C, f, H, W] that stay as they are, at sigma 0, for a teacher
        that was trained with clean first frames among others.
    solver_name: "exact", "euler" or "unipc"; see `aad1.rollout.solvers`.
    on_step: called with the number of steps done, after each.
    Returns (x0, states [B, len(keep), C, F, H, W]).
    """
    levels = grid(solver_name, steps, shift)
    index = on_grid(keep, levels.sigmas, shift)
    given = 0 if image is None else image.shape[2]
    x, states = noise, {}
    if image is not None:
        x = torch.cat([image, noise[:, :, given:]], 2)
    take = solver(solver_name, levels.sigmas)
    # Whole timesteps (UniPC's) survive the way to sigma and back in float64 only.
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    for i in range(steps):
        if i in index:
            states[i] = x
        sigma = torch.full((len(x),), levels.shown[i], device=x.device, dtype=exact)
        if given:
            sigma = sigma[:, None].repeat(1, x.shape[2])
            sigma[:, :given] = 0
        v = teacher(x, sigma, text)
        if null is not None and guidance_scale != 1:
            v = guide(v, teacher(x, sigma, null), guidance_scale)
        moved = take.step(x[:, :, given:], v[:, :, given:].to(x.dtype))
        x = torch.cat([x[:, :, :given], moved], 2)
        if on_step is not None:
            on_step(i + 1)
    states[steps] = x
    kept = torch.stack([states[i] for i in index], 1) if index else x[:, None][:, :0]
    return x, kept


@torch.no_grad()
def sample_prompts(
    teacher: WanTransformer,
    encode: Callable[[Sequence[str]], torch.Tensor],
    prompts: Sequence[str],
    noise: torch.Tensor,
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """`sample` as `sampling` says: clean latents for noise [B, C, F, H, W], of one prompt each.

    encode: prompts -> rows [B, S, D]; called once, the negative prompt last where it is needed.
    """
    null = None
    if sampling.guidance != 1:
        rows = encode([*prompts, sampling.negative_prompt])
        text, null = rows[:-1], rows[-1:].expand_as(rows[:-1])
    else:
        text = encode(prompts)
    x0, _ = sample(
        teacher, noise, text, null, steps=sampling.steps, shift=sampling.shift,
        guidance_scale=sampling.guidance, solver_name=sampling.solver, on_step=on_step,
    )  # fmt: skip
    return x0


def on_grid(levels: Sequence[float], sigmas: Sequence[float], shift: float) -> list[int]:
    """Where noise levels stand among `sigmas` of a grid; UserError if one is not there."""
    found = []
    for level in levels:
        nearest = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level))
        if abs(sigmas[nearest] - level) > 1e-6:
            raise UserError(
                f"sigma {level} is not on the teacher's grid of {len(sigmas) - 1} steps with shift "
                f"{shift}; the nearest is {sigmas[nearest]:.6f}"
            )
        found.append(nearest)
    return found
