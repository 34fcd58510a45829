"""Every preset is consistent with itself and with the stages it builds on."""

from __future__ import annotations

import pytest

from aad1.core.flow import sigma_grid
from aad1.errors import UserError
from aad1.presets import preset, presets
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.ode_init import OdeInitConfig
from aad1.stages.pretrain import PretrainConfig
from aad1.train.config import SpritesData, WanData

NAMES = sorted(presets())


def test_every_stage_and_ablation_has_a_preset() -> None:
    for world in ("sprites", "sprites-tiny", "sprites-gpu", "doom"):
        for stage in ("teacher", "ode", "dmd", "aad", "aad-no_warmup", "aad-causal_frame",
                      "aad-causal_video", "aad-bidirectional_frame"):  # fmt: skip
            assert f"{world}-{stage}" in presets()
    for rest in ("penalty_0", "penalty_200", "two_steps"):
        assert f"sprites-gpu-aad-{rest}" in presets()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_together(name: str) -> None:
    e = preset(name)
    assert e.name == name
    assert e.discriminator.taps[-1] < e.model.num_layers
    if isinstance(e.data, SpritesData):
        e.geometry.chunks(e.data.world.frames)  # whole chunks
        side = e.data.world.size / e.data.stride
        assert side == int(side) and int(side) % e.model.patch_size[1] == 0
        assert (side / e.model.patch_size[1]) ** 2 <= 64  # tokens a frame
    if isinstance(e.data, WanData):
        e.geometry.chunks(e.data.frames)
        assert e.teacher == e.data.base  # the public weights, which no preset makes
    if not isinstance(e.stage, PretrainConfig):
        assert e.teacher is not None
        grid = sigma_grid(e.trajectories.steps, e.trajectories.shift).tolist()
        for sigma in e.sigmas:  # stage I needs the teacher's state at each of the student's levels
            assert min(abs(sigma - g) for g in grid) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_parents_are_presets_of_the_same_world_that_write_there(name: str) -> None:
    e = preset(name)
    for parent in (e.teacher, e.init):
        if parent is not None and not (isinstance(e.data, WanData) and parent == e.data.base):
            source = preset(parent.parent.name)
            assert source.folder / "final" == parent
            assert source.data == e.data
            assert source.model == e.model
    if e.init is not None:
        assert preset(e.init.parent.name).sigmas == e.sigmas
        assert preset(e.init.parent.name).geometry == e.geometry
    before = {"dmd": "ode", "aad": "ode" if "no_warmup" in name else "dmd"}
    stage = next((s for s in name.split("-") if s in before), None)
    if stage:
        assert e.init is not None and before[stage] in e.init.parent.name


@pytest.mark.parametrize("name", NAMES)
def test_only_the_warm_up_stops_early(name: str) -> None:
    e = preset(name)
    assert e.monitor.early_stop == isinstance(e.stage, DmdConfig)
    if isinstance(e.stage, DmdConfig | AdversarialConfig):
        assert e.monitor.every > 0


@pytest.mark.parametrize("size,taps", [("1.3b", (13, 21, 29)), ("14b", (19, 29, 39))])
def test_wan_presets_have_the_paper_s_settings(size: str, taps: tuple[int, ...]) -> None:
    ode, dmd, aad = (preset(f"wan{size}-{stage}") for stage in ("ode", "dmd", "aad"))
    assert isinstance(ode.stage, OdeInitConfig)
    assert (ode.optim.updates, ode.optim.lr, ode.optim.betas) == (2000, 2e-6, (0.9, 0.999))
    t = ode.trajectories
    assert (t.steps, t.shift, t.guidance_scale, t.from_image) == (48, 5.0, 6.0, False)
    assert isinstance(dmd.stage, DmdConfig)
    d = dmd.stage
    assert (d.critic_updates, d.guidance_scale, d.shift) == (5, 4.0, 5.0)
    assert (d.min_sigma, d.max_sigma, dmd.sigmas) == (0.02, 0.98, (1.0,))
    assert (dmd.optim.updates, dmd.optim.lr, dmd.optim.critic_lr) == (100, 2e-6, 4e-7)
    assert dmd.optim.betas == dmd.optim.critic_betas == (0.0, 0.999) and dmd.optim.ema == 0.99
    assert isinstance(aad.stage, AdversarialConfig)
    a, o = aad.stage, aad.optim
    assert (a.critic_updates, a.penalty_weight, a.penalty_sigma) == (1, 20.0, 0.05)
    assert (a.min_sigma, a.max_sigma, a.loss) == (0.0, 1.0, "logistic")
    assert (o.updates, o.lr, o.critic_lr, o.heads_lr, o.ema) == (200, 4e-7, 1e-6, 2e-6, 0.98)
    assert o.batch * o.accumulate == 256
    assert aad.discriminator.taps == taps
    assert not aad.discriminator.causal and not aad.discriminator.per_frame
    for e in (ode, dmd, aad):
        g = e.geometry
        assert (g.chunk, g.sink, g.window, g.first, g.relative) == (4, 1, 9, 1, True)
        assert isinstance(e.data, WanData)
        assert (e.data.width, e.data.height, e.data.frames) == (832, 480, 21)
        assert e.model.num_layers == taps[-1] + 1
        assert e.checkpoint_blocks and e.optim.batch == 1
    assert len(preset(f"wan{size}-aad-two_steps").sigmas) == 2


def test_an_ablation_differs_in_what_its_name_says() -> None:
    base = preset("sprites-aad")
    frame = preset("sprites-aad-causal_frame")
    assert frame.discriminator.causal and frame.discriminator.per_frame
    assert not base.discriminator.causal and not base.discriminator.per_frame
    stage = preset("sprites-aad-penalty_5").stage
    assert isinstance(stage, AdversarialConfig) and stage.penalty_weight == 250  # of 1,000
    assert len(preset("sprites-aad-two_steps").sigmas) == 2
    assert preset("sprites-aad-no_warmup").init == preset("sprites-dmd").init


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'sprites-gpu-dmd'"):
        preset("sprites-gpu-dmdd")
    with pytest.raises(UserError, match=r"no preset 'zzz'; `aad1 train --show`"):
        preset("zzz")
