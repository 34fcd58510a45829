"""The paper's ablations of a chain of stages and a variant, the same for every small world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aad1.stages.adversarial import AdversarialConfig
from aad1.train.config import Experiment

PENALTIES = (0, 5, 20, 50, 200)
TWO_STEPS = (1.0, 0.8333333333333334)
"""1 and 1/2, shifted by 5."""


def ablations(ode: Experiment, dmd: Experiment, aad: Experiment) -> list[Experiment]:
    """Discriminator (causal or not, per frame or video), no warm-up, penalty weights; and all three
    stages with two steps, and for a single pass per chunk.

    Named after the stage: <world>-aad-causal_frame, <world>-dmd-two_steps, <world>-ode-single, ...
    """
    assert isinstance(aad.stage, AdversarialConfig)
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
        stage = replace(aad.stage, penalty_weight=float(weight))
        runs.append(replace(aad, name=f"{aad.name}-penalty_{weight}", stage=stage))
    for run in (ode, dmd, aad):
        two = replace(run, name=f"{run.name}-two_steps", sigmas=TWO_STEPS)
        geometry = replace(run.geometry, single_pass=True)
        single = replace(run, name=f"{run.name}-single", geometry=geometry)
        for variant, suffix in ((two, "two_steps"), (single, "single")):
            if run.init:  # each stage goes on from the one before it of its own kind
                init = Path(f"{run.init.parent}-{suffix}") / run.init.name
                variant = replace(variant, init=init)
            runs.append(variant)
    return runs
