"""Whether a model may stream in float8: the same videos in both precisions, measured side by side.

Every first frame, prompt and seed is rolled out twice, by the plain rollout and by the fast path
with float8 linears. Each chunk builds on the one before it, so the two videos drift apart; what
counts is whether they are as good: motion and both Fréchet distances to real videos may get worse
by a tenth of what the plain path gets, no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from aad1.errors import UserError
from aad1.evaluate.compare import METRICS, Figure, compare
from aad1.evaluate.frechet import LEAST_VIDEOS
from aad1.evaluate.measure import Measured, join, measure_all, stride_for
from aad1.evaluation.model import chunks_for
from aad1.evaluation.worlds import RealWorld
from aad1.fast.config import default_config, fp8_fails
from aad1.fast.rollout import FastRollout
from aad1.pipeline import Pipeline
from aad1.rollout.stream import Rollout

TOLERANCE = 0.1
GATED = ("M", "FDtd", "FDnss_early", "FDnss_late")
_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What both precisions get, and whether float8 passes.

    latents: relative L2 difference of the latents, chunk by chunk, over all videos.
    """

    plain: dict[str, Figure]
    float8: dict[str, Figure]
    latents: tuple[float, ...]

    def change(self, name: str) -> float:
        """Of float8 relative to the plain path; UserError where one could not be computed."""
        one, other = self.plain[name], self.float8[name]
        if one.value is None or other.value is None:
            raise UserError(f"{name} cannot be gated: {one.reason or other.reason}")
        return (other.value - one.value) / one.value

    def failures(self) -> list[str]:
        """Figures that are worse by more than `TOLERANCE`: M either way, distances if larger."""
        changes = {name: self.change(name) for name in GATED}
        return [
            name
            for name, change in changes.items()
            if (abs(change) if name == "M" else change) > TOLERANCE
        ]

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "passed": not self.failures(),
            "tolerance": TOLERANCE,
            "changes": {name: self.change(name) for name in GATED},
            "latents": list(self.latents),
            "plain": {name: asdict(figure) for name, figure in self.plain.items()},
            "float8": {name: asdict(figure) for name, figure in self.float8.items()},
        }

    def lines(self) -> list[str]:
        """The same as text."""
        bad = self.failures()
        out = []
        for name in GATED:
            cells = [_cell(figures[name]) for figures in (self.plain, self.float8)]
            mark = "  FAILS" if name in bad else ""
            floor = self.plain[name].floor
            real = "" if floor is None else f"  real {floor:.3g}"
            out.append(
                f"{name:12} plain {cells[0]:24} float8 {cells[1]:24} "
                f"{self.change(name):+.1%}{real}{mark}"
            )
        chunks = ", ".join(f"{value:.2%}" for value in self.latents)
        out.append(f"latents differ by {chunks} (relative L2, chunk by chunk)")
        verdict = f"fails: {', '.join(bad)}" if bad else "passes"
        out.append(f"float8 {verdict} (each within {TOLERANCE:.0%} of the plain path)")
        return out


def _cell(figure: Figure) -> str:
    interval = figure.interval
    ends = "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    return f"{figure.value:.4g}{ends}"


@torch.no_grad()
def fp8_gate(
    pipe: Pipeline, world: RealWorld, *, clips: int, seed: int, tell: Callable[[str], None]
) -> Gate:
    """Roll out `clips` videos twice and compare.

    More videos than the world has first frames take them again with other seeds. Off CUDA float8
    products are computed by their reference formula, so the verdict is that of the numbers, not of
    a device's kernels.

    UserError, before anything is rolled out, for fewer than 16 videos, real ones that cannot be set
    beside them, or where float8 cannot be computed.
    """
    if clips < LEAST_VIDEOS:
        raise UserError(f"the gate needs at least {LEAST_VIDEOS} videos, got {clips}")
    width = pipe.transformer.config.width
    reason = fp8_fails(pipe.device, width, pipe.transformer.config.ffn_dim)
    if reason:
        raise UserError(f"float8 cannot be tried: {reason}")
    real = world.short.reference.videos
    own = (pipe.info.width, pipe.info.height, stride_for(real.frames))
    if own != (real.width, real.height, real.stride):
        raise UserError(
            f"the model's videos have {own[0]}x{own[1]} pixels and every {own[2]}. pair of frames "
            f"measured, the real ones {real.width}x{real.height} and every {real.stride}.: give "
            "others (--world, --data; not --quick)"
        )
    plain = pipe.rollout
    config = replace(default_config(pipe.device, width), fp8=True)
    arms: tuple[Rollout | FastRollout, ...] = (
        plain,
        FastRollout(pipe.transformer, plain.geometry, plain.sigmas, config),
    )
    chunks = chunks_for(pipe, real.frames)
    measured: tuple[list[Measured], list[Measured]] = ([], [])
    difference, size = torch.zeros(chunks), torch.zeros(chunks)
    for rows in torch.arange(clips).split(_TOGETHER):
        tell(f"videos {int(rows[0]) + 1} to {int(rows[-1]) + 1} of {clips}, twice")
        starts = [world.starts[i % len(world.starts)] for i in rows.tolist()]
        images = torch.stack([start.image for start in starts])[:, None].to(pipe.device)
        both = []
        for arm, parts in zip(arms, measured, strict=True):
            latents = pipe.generate_latents(
                pipe.codec.encode(images), [start.captions for start in starts],
                [seed + i for i in rows.tolist()], chunks, rollout=arm,
            )  # fmt: skip
            both.append(latents[:, :, plain.geometry.first :].float().cpu())
            for start, some in zip(starts, latents.split(1), strict=True):
                video = pipe.codec.decode(some)[0].cpu()
                parts.append(
                    measure_all(
                        [(start.key, start.prompt, video)], fps=world.fps, device=pipe.device
                    )
                )
        for i, (a, b) in enumerate(zip(*(x.chunk(chunks, 2) for x in both), strict=True)):
            difference[i] += (a - b).square().sum()
            size[i] += a.square().sum()
    short, metrics = world.short, [METRICS[name] for name in GATED]
    one, other = (
        compare(
            join(parts), short.reference, short.other, metrics,
            floor_reference=short.floor_reference,
        )
        for parts in measured
    )  # fmt: skip
    return Gate(plain=one, float8=other, latents=tuple((difference / size).sqrt().tolist()))
