"""Experiments on the game world: the model that comes with the package.

Latents of 81 frames at 128x96: 21 latent frames of 16 x 12 x 16, 48 tokens a frame. The whole
chain is `runs/doom.sh`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.presets.ablations import ablations
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.ode_init import OdeInitConfig
from aad1.stages.pretrain import PretrainConfig
from aad1.train.config import (
    Experiment,
    LatentData,
    MonitorConfig,
    OptimConfig,
    TrajectoryConfig,
)

MODEL = WanConfig(
    num_attention_heads=3,
    attention_head_dim=64,
    text_dim=64,
    freq_dim=128,
    ffn_dim=768,
    num_layers=10,
    rope_theta=10.0,
    prediction="x0",
)


def experiments() -> dict[str, Experiment]:
    """teacher, ode, dmd and aad on doom, and the paper's ablations."""
    out = Path("out")
    taps = DiscriminatorConfig(taps=(4, 6, 9))
    teacher = Experiment(
        name="doom-teacher",
        stage=PretrainConfig(shift=3.0, max_weight=10.0, image_share=0.5),
        data=LatentData(),
        model=MODEL,
        text_length=8,
        discriminator=taps,
        trajectories=TrajectoryConfig(
            clips=1024, steps=24, guidance_scale=1.5, from_image=True, batch=64
        ),
        optim=OptimConfig(
            updates=12000,
            batch=64,
            optimizer="muon",
            lr=2e-3,
            warmup=200,
            schedule="cosine",
            ema=0.999,
        ),
        monitor=MonitorConfig(every=10, clips=64),
        checkpoint_every=2000,
        log_every=100,
        compile=True,
    )
    student = replace(
        teacher, teacher=out / "doom-teacher" / "final", log_every=10, sample_every=0,
        compile=False, checkpoint_every=100,
    )  # fmt: skip
    ode = replace(
        student, name="doom-ode", stage=OdeInitConfig(), log_every=50,
        optim=OptimConfig(updates=400, batch=64, lr=3e-4, schedule="cosine", ema=0.98),
    )  # fmt: skip
    dmd = replace(
        student, name="doom-dmd", init=out / "doom-ode" / "final",
        stage=DmdConfig(guidance_scale=2.0, shift=3.0, max_weight=10.0),
        monitor=replace(student.monitor, early_stop=True),
        optim=OptimConfig(
            updates=80, batch=64, lr=1e-4, critic_lr=2e-4, betas=(0.0, 0.99), ema=0.9
        ),
    )  # fmt: skip
    aad = replace(
        student, name="doom-aad", init=out / "doom-dmd" / "final",
        stage=AdversarialConfig(critic_warmup=30, penalty_weight=300.0),
        monitor=replace(student.monitor, every=25), log_every=25,
        optim=OptimConfig(
            updates=250, batch=64, lr=2e-5, critic_lr=3e-5, heads_lr=1e-4, betas=(0.0, 0.99),
            warmup=30, schedule="cosine", ema=0.98,
        ),
    )  # fmt: skip
    return {r.name: r for r in (teacher, ode, dmd, aad, *ablations(ode, dmd, aad))}
