"""The paper's ablations of a chain of stages, the same for every small world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aad1.core.flow import sigma_grid
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.joint import JointConfig
from aad1.train.config import Experiment, SpritesData

PENALTIES = (0, 5, 50, 200)
"""On the paper's scale, where 20 is the full method's own weight, whatever that is at this size."""
FEW_STEPS = {"two_steps": 2, "four_steps": 4}
"""Levels evenly spaced and shifted as the trajectories are: with a shift of 5 they are the
paper's 1, 0.9375, 0.8333 and 0.625."""


def ablations(ode: Experiment, dmd: Experiment, aad: Experiment) -> list[Experiment]:
    """Discriminator (causal or not, per frame or video), no warm-up, penalty weights, both losses
    at once, two and four steps; on the drawn world also longer self-rollouts.

    Named after the stage: <world>-aad-causal_frame, <world>-dmd-two_steps, <world>-joint, ...
    """
    assert isinstance(aad.stage, AdversarialConfig) and isinstance(dmd.stage, DmdConfig)
    runs = []
    for name, causal, per_frame in (
        ("causal_frame", True, True),
        ("causal_video", True, False),
        ("bidirectional_frame", False, True),
    ):
        discriminator = replace(aad.discriminator, causal=causal, per_frame=per_frame)
        runs.append(replace(aad, name=f"{aad.name}-{name}", discriminator=discriminator))
    runs.append(replace(aad, name=f"{aad.name}-no_warmup", init=dmd.init))
    for weight in PENALTIES:
        stage = replace(aad.stage, penalty_weight=aad.stage.penalty_weight * weight / 20)
        runs.append(replace(aad, name=f"{aad.name}-penalty_{weight}", stage=stage))
    # One-Forcing at chunks of several frames: a head on the last tapped block alone, one learning
    # rate for all networks (here the warm-up's), betas (0, 0.999). Updates, batch, schedule and
    # average are those of warm-up and refinement together, clips the same real ones.
    rate = dmd.optim.lr
    optim = replace(
        aad.optim, updates=dmd.optim.updates + aad.optim.updates, warmup=dmd.optim.warmup,
        lr=rate, critic_lr=rate, heads_lr=rate, betas=(0.0, 0.999), critic_betas=(0.0, 0.999),
    )  # fmt: skip
    runs.append(
        replace(
            aad, name=f"{aad.name.removesuffix('-aad')}-joint", init=dmd.init, optim=optim,
            stage=JointConfig(score=dmd.stage),
            discriminator=replace(
                aad.discriminator, taps=aad.discriminator.taps[-1:], causal=False, per_frame=False
            ),
        )
    )  # fmt: skip
    if isinstance(aad.data, SpritesData):  # other worlds' clips have an end
        longer = replace(aad.stage, rollout_frames=2 * aad.data.world.frames - 1)
        runs.append(replace(aad, name=f"{aad.name}-long_rollout", stage=longer))
    for name, steps in FEW_STEPS.items():
        sigmas = tuple(sigma_grid(steps, ode.trajectories.shift).tolist()[:-1])
        for run in (ode, dmd, aad):
            variant = replace(run, name=f"{run.name}-{name}", sigmas=sigmas)
            if run.init:  # each stage goes on from the one before it of its own kind
                init = Path(f"{run.init.parent}-{name}") / run.init.name
                variant = replace(variant, init=init)
            runs.append(variant)
    return runs
