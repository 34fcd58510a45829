"""Experiments on Wan 2.1 T2V, 1.3B and 14B: the paper's three stages at 832x480, 81 frames.

    aad1 data videos CLIPS --model BASE --out out/data/wan      # and others: out/data/wan-heldout
    aad1 data trajectories --teacher BASE --data out/data/wan --out out/data/wan1.3b-trajectories
    aad1 train wan1.3b-ode                                      # then wan1.3b-dmd, wan1.3b-aad

BASE is the folder of the public weights, models/Wan2.1-T2V-1.3B-Diffusers unless `--teacher` and
`--data.base` name another. `aad1 train wan14b-aad --dry-run --gpus 64` says what a run costs.

The real score of stage II and the discriminator's backbone of stage III are the model itself
(`--teacher`). For a 1.3B student under a 14B one, give `--teacher` the 14B folder, `--init` the
1.3B one (or its earlier stage), and stage III `--discriminator.taps 19 29 39`; the fake score then
is 14B as well.

The paper gives updates, learning rates of stage III, EMA, batch and lambda; the rest is what the
code that it grew from uses: learning rates of stages I and II, the fake score's, AdamW's betas and
weight decay, gradient clipping at 10, and a batch of 64 before stage III.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aad1.core.chunks import ChunkGeometry
from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.ode_init import OdeInitConfig
from aad1.train.config import (
    Experiment,
    MonitorConfig,
    OptimConfig,
    TrajectoryConfig,
    WanData,
)

SMALL = WanConfig()
LARGE = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)


def chain(prefix: str, model: WanConfig, taps: tuple[int, ...], base: Path) -> list[Experiment]:
    """ode, dmd and aad at one size, with the paper's ablations and two steps."""
    out = Path("out")
    # One clip at a time: batches are accumulated.
    optim = OptimConfig(
        updates=2000, batch=1, accumulate=64, lr=2e-6, critic_lr=4e-7, betas=(0.9, 0.999),
        critic_betas=(0.0, 0.999), weight_decay=0.01, clip=10.0, critic_clip=10.0, ema=0.99,
    )  # fmt: skip
    ode = Experiment(
        name=f"{prefix}-ode",
        stage=OdeInitConfig(),
        data=WanData(trajectories=out / "data" / f"{prefix}-trajectories", base=base),
        model=model,
        text_length=512,
        geometry=ChunkGeometry(chunk=4, sink=1, window=9),
        discriminator=DiscriminatorConfig(taps=taps),
        trajectories=TrajectoryConfig(steps=48, shift=5.0, guidance_scale=6.0, batch=4),
        optim=optim,
        monitor=MonitorConfig(every=10, clips=8),
        teacher=base,
        checkpoint_blocks=True,
        keep_gathered=model is SMALL,  # 14B is 53 GiB in float32
        checkpoint_every=100,
    )
    dmd = replace(
        ode, name=f"{prefix}-dmd", init=out / ode.name / "final",
        stage=DmdConfig(critic_updates=5, guidance_scale=4.0, shift=5.0, min_sigma=0.02,
                        max_sigma=0.98),
        optim=replace(optim, updates=100, betas=(0.0, 0.999)),
        monitor=replace(ode.monitor, early_stop=True), log_every=1, checkpoint_every=10,
    )  # fmt: skip
    aad = replace(
        dmd, name=f"{prefix}-aad", init=out / dmd.name / "final",
        stage=AdversarialConfig(critic_updates=1, penalty_weight=20.0, penalty_sigma=0.05),
        optim=replace(
            dmd.optim, updates=200, accumulate=256, lr=4e-7, critic_lr=1e-6, heads_lr=2e-6, ema=0.98
        ),
        monitor=ode.monitor,
    )  # fmt: skip
    runs = [ode, dmd, aad]
    for name, change in {
        "causal_frame": DiscriminatorConfig(taps=taps, causal=True, per_frame=True),
        "causal_video": DiscriminatorConfig(taps=taps, causal=True),
        "bidirectional_frame": DiscriminatorConfig(taps=taps, per_frame=True),
    }.items():
        runs.append(replace(aad, name=f"{aad.name}-{name}", discriminator=change))
    runs.append(replace(aad, name=f"{aad.name}-no_warmup", init=out / ode.name / "final"))
    for run in (ode, dmd, aad):
        steps = replace(run, name=f"{run.name}-two_steps", sigmas=(1.0, 0.8333333333333334))
        if run.init:
            steps = replace(steps, init=Path(f"{run.init.parent}-two_steps") / "final")
        runs.append(steps)
    return runs


def experiments() -> dict[str, Experiment]:
    """All presets of Wan 2.1 by name."""
    models = Path("models")
    runs = [
        *chain("wan1.3b", SMALL, (13, 21, 29), models / "Wan2.1-T2V-1.3B-Diffusers"),
        *chain("wan14b", LARGE, (19, 29, 39), models / "Wan2.1-T2V-14B-Diffusers"),
    ]
    return {run.name: run for run in runs}
