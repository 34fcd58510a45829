"""The plan: every arm of the issue in its order, and what its hash sees."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass, replace

import pytest

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.evidence.arms import GROUPS, TITLES, given, hashes, plan, settings_hash
from aad1.evidence.gate import trial
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.joint import JointConfig


def test_the_plan_holds_every_arm_once_and_in_order() -> None:
    arms = plan()
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    assert {arm.key for arm in arms} == set(TITLES)
    order = [GROUPS.index(arm.group) for arm in arms]
    assert order == sorted(order)
    seeds = {key: [a.seed for a in arms if a.key == key] for key in TITLES}
    for key in ("A", "B", "C", "D", "no_warmup", "no_warmup_compute", "stage2"):
        assert seeds[key] == [0, 1, 2, 3]
    for key in ("joint", "joint_compute", "weight_0", "weight_200", "two_steps", "long_rollout"):
        assert seeds[key] == [0, 1, 2]
    assert not set(seeds["gate-C"]) & {0, 1, 2, 3}
    for number, arm in enumerate(arms):  # parents come first
        assert not arm.parent or arm.parent in names[:number], arm.name


@pytest.mark.parametrize("prefix", ["evidence", "evidence-tiny"])
def test_arms_differ_in_what_they_are_about_alone(prefix: str) -> None:
    arms = {arm.key: arm.experiment for arm in plan(prefix)}
    base = arms["C"]
    for key, causal, per_frame in (("A", True, True), ("B", True, False), ("D", False, True)):
        changed = replace(base.discriminator, causal=causal, per_frame=per_frame)
        assert replace(base, discriminator=changed, name=arms[key].name) == arms[key]
    updates = arms["stage2"].optim.updates + base.optim.updates
    for key in ("no_warmup", "joint"):
        assert arms[key].optim.updates == updates
        assert arms[key].optim.batch == base.optim.batch
    assert isinstance(arms["joint"].stage, JointConfig)
    assert arms["joint"].stage.score == arms["stage2"].stage
    recipe, rates = arms["joint"].stage, arms["joint"].optim
    assert (recipe.gan_weight, recipe.score.critic_updates) == (0.03, 5)
    assert (recipe.r1_weight, recipe.r1_sigma) == (1.0, 0.1)
    assert (recipe.r2_weight, recipe.r2_sigma) == (0.001, 0.01)
    assert rates.lr == rates.critic_lr == rates.heads_lr == arms["stage2"].optim.lr
    assert rates.betas == rates.critic_betas == (0.0, 0.999)
    # A head on the last block alone, as at chunks of several frames.
    assert arms["joint"].discriminator.taps == base.discriminator.taps[-1:]
    assert arms["joint"].discriminator.taps == (base.model.num_layers - 1,)
    assert isinstance(base.stage, AdversarialConfig)
    for weight in (0, 5, 50, 200):
        stage = arms[f"weight_{weight}"].stage
        assert isinstance(stage, AdversarialConfig)
        assert stage.penalty_weight == base.stage.penalty_weight * weight / 20
    assert [len(arms[k].sigmas) for k in ("C", "two_steps", "four_steps")] == [1, 2, 4]
    long = arms["long_rollout"].stage
    frames = base.data.world.frames  # type: ignore[union-attr]
    assert isinstance(long, AdversarialConfig) and long.rollout_frames == 2 * frames - 1
    base.geometry.chunks(long.rollout_frames)


def test_every_run_goes_to_its_last_update() -> None:
    for arm in (*plan(), *plan("evidence-tiny")):
        assert not arm.experiment.monitor.early_stop and not arm.experiment.max_minutes, arm.name


def test_the_hash_sees_settings_and_parents_and_no_folder() -> None:
    arms = plan()
    before = hashes(arms)
    by_name = {arm.name: arm for arm in arms}
    dmd = by_name["stage2-s1"]
    e = replace(dmd.experiment, optim=replace(dmd.experiment.optim, lr=1.0))
    after = hashes([replace(a, experiment=e) if a is dmd else a for a in arms])
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {a.name for a in arms if a.name == "stage2-s1" or a.parent == "stage2-s1"}
    moved = [replace(a, experiment=replace(a.experiment, device="cpu")) for a in arms]
    assert settings_hash(moved) == settings_hash(arms)
    assert before["A-s0"] != before["A-s1"]


def test_a_setting_that_is_added_later_changes_no_hash() -> None:
    @dataclass(frozen=True)
    class Before:
        rate: float
        steps: tuple[int, ...] = (1, 2)
        inner: ChunkGeometry = field(default_factory=ChunkGeometry)

    After = make_dataclass(
        "Before", [("added", bool, field(default=False))], bases=(Before,), frozen=True
    )
    assert given(Before(0.1)) == given(After(0.1)) == {"type": "Before", "rate": 0.1}
    changed = After(0.1, steps=(3,), inner=ChunkGeometry(window=13), added=True)
    assert given(changed) == {
        "type": "Before", "rate": 0.1, "steps": [3], "added": True,
        "inner": {"type": "ChunkGeometry", "window": 13},
    }  # fmt: skip


def test_a_trial_changes_what_it_names_and_what_comes_after() -> None:
    arms = trial(plan(), "low", ["aad.optim.lr=1e-5", "aad.stage.penalty_weight=500"])
    assert [a.name for a in arms] == [
        "teacher-s0", "stage1-s0", "gate-stage2-s1000", "gate-C-low-s1000",
    ]  # fmt: skip
    last = arms[-1].experiment
    assert last.optim.lr == 1e-5 and isinstance(last.stage, AdversarialConfig)
    assert last.stage.penalty_weight == 500.0
    arms = trial(plan(), "more", ["dmd.optim.updates=80"])
    assert [a.name for a in arms][2:] == ["gate-stage2-more-s1000", "gate-C-more-s1000"]
    assert arms[-1].parent == arms[-2].name and arms[-2].experiment.optim.updates == 80
    hashes(arms)


@pytest.mark.parametrize(
    ("label", "override", "says"),
    [
        ("a b", "aad.optim.lr=1", "--label"),
        ("a", "gan.optim.lr=1", "a stage of teacher"),
        ("a", "aad.optim.lr", "STAGE.FIELD=VALUE"),
        ("a", "aad.optim.rate=1", "no optim.rate"),
        ("a", "aad.nothing.rate=1", "no nothing.rate"),
        ("a", "aad.optim.lr=high", "must be float"),
        ("a", "aad.optim.lr=0.0", "learning rates"),
        ("a", "aad.optim.batch=64", "change nothing"),
    ],
)
def test_bad_trials(label: str, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        trial(plan(), label, [override])
