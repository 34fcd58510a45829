"""Experiments on the drawn world.

`sprites-*` is the model that comes with the package (one shape, 32x32, 9 frames: what a 2-core CPU
learns in a quarter of an hour); `sprites-tiny-*` the same with fewer updates (the end-to-end test);
`sprites-gpu-*` (two shapes, 64x64, 21 frames) is meant for one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    MonitorConfig,
    OptimConfig,
    SpritesData,
    TrajectoryConfig,
)
from aad1.worlds.sprites import SpritesConfig


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the drawn-world chain: everything that differs between the three."""

    prefix: str
    data: SpritesData
    model: WanConfig
    taps: tuple[int, ...]
    trajectories: TrajectoryConfig
    teacher: OptimConfig
    ode: OptimConfig
    dmd: OptimConfig
    aad: OptimConfig
    adversarial: AdversarialConfig
    monitor: MonitorConfig
    teacher_stage: PretrainConfig = PretrainConfig(max_weight=10.0, shift=5.0, image_share=0.5)
    clean_image: bool = False
    """Of stage II's scores (`DmdConfig.clean_image`)."""
    compile: bool = False


def _model(width: int, layers: int, patch: int) -> WanConfig:
    return WanConfig(
        patch_size=(1, patch, patch),
        num_attention_heads=max(1, width // 64),
        attention_head_dim=64,
        text_dim=64,
        freq_dim=128,
        ffn_dim=4 * width,
        num_layers=layers,
        rope_theta=4.0,
        prediction="x0",
    )


# One shape on a smooth texture: what two CPU cores can learn in minutes.
_EASY = SpritesConfig(size=32, frames=9, num_sprites=1, texture_frequency=0.5, texture_contrast=0.7)

TINY = Scale(
    prefix="sprites-tiny",
    data=SpritesData(world=_EASY, stride=4),
    model=_model(128, 4, 2),
    taps=(1, 3),
    trajectories=TrajectoryConfig(
        clips=192, steps=12, guidance_scale=1.0, from_image=True, batch=32
    ),
    teacher=OptimConfig(
        updates=600, batch=8, optimizer="muon", lr=3e-3, warmup=30, ema=0.98, schedule="cosine"
    ),
    ode=OptimConfig(updates=80, batch=8, lr=3e-4, ema=0.9, schedule="cosine"),
    dmd=OptimConfig(updates=40, batch=8, lr=2e-4, critic_lr=4e-4, betas=(0.0, 0.99), ema=0.9),
    aad=OptimConfig(
        updates=20, batch=8, lr=1e-5, critic_lr=5e-5, heads_lr=1e-4, betas=(0.0, 0.99),
        warmup=10, ema=0.9,
    ),
    adversarial=AdversarialConfig(critic_warmup=10, penalty_weight=1000.0),
    monitor=MonitorConfig(every=10, clips=64),
)  # fmt: skip

SMALL = replace(
    TINY,
    prefix="sprites",
    teacher=replace(TINY.teacher, updates=2800, ema=0.99),
    dmd=replace(TINY.dmd, updates=80),
    trajectories=replace(TINY.trajectories, clips=384, steps=16),
    ode=replace(TINY.ode, updates=150),
    aad=replace(TINY.aad, updates=40),
)

GPU = replace(
    TINY,
    prefix="sprites-gpu",
    data=SpritesData(world=SpritesConfig(size=64, frames=21), stride=8),
    model=_model(256, 8, 1),
    taps=(3, 5, 7),
    trajectories=TrajectoryConfig(clips=1024, steps=24, guidance_scale=1.5, from_image=True),
    teacher=OptimConfig(
        updates=6000, batch=64, optimizer="muon", lr=2e-3, warmup=200, ema=0.999, schedule="cosine"
    ),
    ode=OptimConfig(updates=400, batch=32, lr=3e-4, schedule="cosine", ema=0.97),
    dmd=OptimConfig(updates=30, batch=32, lr=1e-4, critic_lr=2e-4, betas=(0.0, 0.99), ema=0.9),
    aad=OptimConfig(
        updates=200, batch=64, lr=2e-5, critic_lr=3e-5, heads_lr=1e-4, betas=(0.0, 0.99),
        warmup=30, ema=0.95,
    ),
    compile=True,
)  # fmt: skip


def chain(scale: Scale) -> dict[str, Experiment]:
    """teacher, ode, dmd, aad and the paper's ablations at one size."""
    p, out = scale.prefix, Path("out")
    teacher = Experiment(
        name=f"{p}-teacher",
        stage=scale.teacher_stage,
        data=scale.data, model=scale.model, optim=scale.teacher, trajectories=scale.trajectories,
        monitor=scale.monitor,
        discriminator=DiscriminatorConfig(taps=scale.taps), compile=scale.compile,
    )  # fmt: skip
    student = replace(teacher, teacher=out / f"{p}-teacher" / "final")
    ode = replace(student, name=f"{p}-ode", stage=OdeInitConfig(), optim=scale.ode)
    dmd = replace(
        student, name=f"{p}-dmd", optim=scale.dmd, init=out / f"{p}-ode" / "final",
        stage=DmdConfig(guidance_scale=scale.trajectories.guidance_scale, shift=3.0,
                        max_weight=10.0, clean_image=scale.clean_image),
        monitor=replace(scale.monitor, early_stop=True),
    )  # fmt: skip
    aad = replace(
        student, name=f"{p}-aad", stage=scale.adversarial, optim=scale.aad,
        init=out / f"{p}-dmd" / "final",
    )  # fmt: skip
    runs = {r.name: r for r in (teacher, ode, dmd, aad)}
    runs |= {r.name: r for r in ablations(ode, dmd, aad)}
    return runs


def experiments() -> dict[str, Experiment]:
    """All presets of the drawn world by name."""
    return chain(TINY) | chain(SMALL) | chain(GPU)
