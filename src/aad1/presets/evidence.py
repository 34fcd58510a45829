"""The experiments that test the paper's claims at small scale; `aad1.evidence` runs them.

`evidence-*`: two shapes, 32x32 in patches of 4, 21 frames, for one GPU, one to two minutes a run
and seven for the teacher. A first teacher on 64x64 in patches of 8 lost the shapes from the second
frame on (docs/log.md). The settings may be changed only by what teacher and full method show on
validation clips, and are frozen once an ablation has run (docs/evidence.md). `evidence-tiny-*`: the
same arms with a few updates each, to test the machinery on a CPU; its figures mean nothing.
"""

from __future__ import annotations

from dataclasses import replace

from aad1.models.dit import WanConfig
from aad1.presets.sprites import GPU, Scale, chain
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.pretrain import PretrainConfig
from aad1.train.config import (
    Experiment,
    MonitorConfig,
    OptimConfig,
    SpritesData,
    TrajectoryConfig,
)
from aad1.worlds.sprites import SpritesConfig

FULL = replace(
    GPU,
    prefix="evidence",
    data=SpritesData(world=SpritesConfig(size=32, frames=21, texture_frequency=0.5), stride=4),
    model=WanConfig(
        patch_size=(1, 1, 1), num_attention_heads=4, attention_head_dim=64, text_dim=64,
        freq_dim=128, ffn_dim=1024, num_layers=8, rope_theta=4.0, prediction="x0",
    ),
    teacher=replace(GPU.teacher, updates=5000),
    teacher_stage=PretrainConfig(max_weight=25.0, shift=3.0, image_share=0.5),
    trajectories=replace(GPU.trajectories, batch=64, shift=3.0),
    ode=OptimConfig(updates=400, batch=64, lr=3e-4, schedule="cosine", ema=0.98),
    dmd=OptimConfig(
        updates=60, batch=64, lr=1e-4, critic_lr=2e-4, betas=(0.0, 0.99), ema=0.9
    ),
    aad=OptimConfig(
        updates=80, batch=64, lr=1e-5, critic_lr=1e-4, heads_lr=2e-4, betas=(0.0, 0.99),
        warmup=30, schedule="cosine", ema=0.98,
    ),
    adversarial=AdversarialConfig(critic_warmup=30, penalty_weight=3000.0),
    monitor=MonitorConfig(every=20, clips=64),
    clean_image=True,
)  # fmt: skip

TINY = Scale(
    prefix="evidence-tiny",
    data=SpritesData(world=SpritesConfig(size=16, frames=9), stride=4),
    model=WanConfig(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_theta=4.0, prediction="x0",
    ),
    taps=(0, 1),
    trajectories=TrajectoryConfig(clips=8, steps=4, guidance_scale=1.5, from_image=True, batch=8),
    teacher=OptimConfig(updates=4, batch=4, lr=1e-3),
    ode=OptimConfig(updates=2, batch=4, lr=1e-3),
    dmd=OptimConfig(updates=2, batch=2, lr=1e-4, critic_lr=2e-4, betas=(0.0, 0.99), ema=0.9),
    aad=OptimConfig(updates=2, batch=2, lr=1e-4, critic_lr=1e-4, betas=(0.0, 0.99), ema=0.9),
    adversarial=AdversarialConfig(critic_warmup=1, penalty_weight=300.0),
    monitor=MonitorConfig(every=1, clips=2),
    clean_image=True,
)  # fmt: skip


def experiments() -> dict[str, Experiment]:
    """teacher, ode, dmd, aad and all ablations at both sizes."""
    full = {
        name: replace(e, device_noise=True, checkpoint_every=100_000, log_every=10)
        for name, e in chain(FULL).items()
    }
    return full | chain(TINY)
