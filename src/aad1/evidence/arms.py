"""Every run of the experiments, in the order in which they are done.

A run is an arm with a seed. Arms of one seed start from the same stage II model of that seed and
see the same clips in the same order, so they are compared in pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from aad1.evidence.compute import equal_updates
from aad1.presets import preset
from aad1.presets.ablations import PENALTIES
from aad1.stages.pretrain import PretrainConfig
from aad1.train.config import Experiment
from aad1.train.record import to_plain

GATE_SEED = 1000
"""Of the runs on which settings may be chosen; no arm has it."""
TEACHER = "teacher-s0"
GROUPS = (
    "teacher", "gate", "A and C", "2x2 and warm-up", "joint", "weights", "steps", "long", "doom"
)  # fmt: skip
"""In the order in which they are run; all after the gate need it passed."""

TITLES = {
    "teacher": "teacher, sampled in 24 steps from the real first frame",
    "stage1": "stage I",
    "stage2": "stage II",
    "gate-stage2": "stage II, on validation clips",
    "gate-C": "full method, on validation clips",
    "A": "causal, frame-wise discriminator",
    "B": "causal, video-wise",
    "C": "bidirectional, video-wise: the full method",
    "D": "bidirectional, frame-wise",
    "no_warmup": "no DMD warm-up, equal generator updates",
    "no_warmup_compute": "no DMD warm-up, equal compute",
    "joint": "DMD and GAN at once, equal generator updates",
    "joint_compute": "DMD and GAN at once, equal compute",
    **{f"weight_{w}": f"regulariser weight {w}, where C has 20" for w in PENALTIES},
    "stage1_two_steps": "stage I, 2 steps",
    "stage2_two_steps": "stage II, 2 steps",
    "two_steps": "full method, 2 steps",
    "stage1_four_steps": "stage I, 4 steps",
    "stage2_four_steps": "stage II, 4 steps",
    "four_steps": "full method, 4 steps",
    "doom_teacher": "doom: teacher, sampled in 24 steps from the real first frame",
    "doom_stage1": "doom: stage I",
    "doom_stage2": "doom: stage II",
    "doom_A": "doom: causal, frame-wise discriminator",
    "doom_C": "doom: the full method",
    "doom_no_warmup": "doom: no DMD warm-up, equal generator updates",
    "long_rollout": "trained on rollouts of twice the length (exploratory)",
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run: what is trained, from what, and which group it belongs to."""

    key: str
    seed: int
    group: str
    experiment: Experiment
    """Without folders; `placed` fills them in."""
    parent: str = ""
    """Name of the run that it starts from."""
    label: str = ""
    """Of a trial of other settings."""
    teacher: str = TEACHER
    """Name of the run whose model is its teacher."""

    @property
    def name(self) -> str:
        """What its folder and its results are called."""
        label = f"-{self.label}" if self.label else ""
        return f"{self.key}{label}-s{self.seed}"

    @property
    def title(self) -> str:
        return TITLES[self.key]

    @property
    def is_teacher(self) -> bool:
        """Whether it is trained from scratch."""
        return isinstance(self.experiment.stage, PretrainConfig)

    @property
    def updates(self) -> int:
        """Generator updates."""
        return self.experiment.optim.updates

    def placed(self, runs: Path, teacher: Path | None, init: Path | None) -> Experiment:
        """The experiment with its folders."""
        e = replace(self.experiment, name=self.name, out=runs, seed=self.seed)
        return replace(e, teacher=teacher, init=init)

    def settings(self) -> dict[str, Any]:
        """All that its numbers hang on, as plain data."""
        plain = to_plain(replace(self.experiment, name=self.key, seed=self.seed))
        for name in ("out", "teacher", "init", "device"):
            del plain[name]
        return {**plain, "parent": self.parent}


def given(value: Any) -> Any:
    """A config as plain data, without what has its default value."""
    if is_dataclass(value) and not isinstance(value, type):
        out = {"type": type(value).__name__}
        for f in fields(value):
            own = getattr(value, f.name)
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if own != default:
                out[f.name] = given(own)
        return out
    if isinstance(value, tuple):
        return [given(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def hashes(arms: list[Arm]) -> dict[str, str]:
    """Name -> a hash of its settings and of all that it starts from; tells results apart.

    Settings at their default are not in it, so one that is added to the code later changes no hash.
    """
    by_name = {arm.name: arm for arm in arms}
    found: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in found:
            arm = by_name[name]
            e = replace(
                arm.experiment, name=arm.key, seed=arm.seed, out=Path("out"), device="auto",
                teacher=None, init=None,
            )  # fmt: skip
            facts = [given(e), arm.parent]
            text = json.dumps(facts, sort_keys=True)
            if not arm.is_teacher:
                text += of(arm.teacher) + of(arm.parent)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found[name]

    for arm in arms:
        of(arm.name)
    return found


DOOM_UPDATES = 120
"""Of stage III on doom: an earlier run was best between 100 and 150 (docs/log.md)."""
DOOM_SEEDS = 2


def plan(prefix: str = "evidence", first: int = 4, rest: int = 3) -> list[Arm]:
    """All runs in order. first: seeds of A to D and no warm-up; rest: seeds of all others.

    The external check on the game world comes last, and is not part of the tiny plan.
    """
    return [*_plan(prefix, first, rest), *(_doom() if prefix == "evidence" else ())]


def _to_the_end(e: Experiment) -> Experiment:
    """What is judged is the average at a fixed last update: nothing is picked on the way."""
    return replace(e, monitor=replace(e.monitor, early_stop=False))


def _doom() -> Iterator[Arm]:
    """The headline arms on recorded clips, at settings found before any of them was run."""

    def arm(key: str, seed: int, run: str, parent: str = "", updates: int = 0) -> Arm:
        e = _to_the_end(replace(preset(f"doom-{run}"), checkpoint_every=100_000))
        if updates:
            e = replace(e, optim=replace(e.optim, updates=updates))
        return Arm(key=f"doom_{key}", seed=seed, group="doom", experiment=e, parent=parent,
                   teacher="doom_teacher-s0")  # fmt: skip

    warmup = preset("doom-dmd").optim.updates
    yield arm("teacher", 0, "teacher")
    yield arm("stage1", 0, "ode", "doom_teacher-s0")
    for seed in range(DOOM_SEEDS):
        yield arm("stage2", seed, "dmd", "doom_stage1-s0")
        yield arm("A", seed, "aad-causal_frame", f"doom_stage2-s{seed}", DOOM_UPDATES)
        yield arm("C", seed, "aad", f"doom_stage2-s{seed}", DOOM_UPDATES)
        yield arm("no_warmup", seed, "aad-no_warmup", "doom_stage1-s0", DOOM_UPDATES + warmup)


def _plan(prefix: str, first: int, rest: int) -> Iterator[Arm]:
    def arm(key: str, seed: int, group: str, run: str, parent: str = "", **more: Any) -> Arm:
        e = _to_the_end(preset(f"{prefix}-{run}"))
        updates = more.pop("updates", None)
        if updates:
            e = replace(e, optim=replace(e.optim, updates=updates))
        return Arm(key=key, seed=seed, group=group, experiment=e, parent=parent, **more)

    staged = [preset(f"{prefix}-{run}") for run in ("dmd", "aad")]
    both = sum(e.optim.updates for e in staged)
    no_warmup, joint = "aad-no_warmup", "joint"
    as_much = {run: equal_updates(preset(f"{prefix}-{run}"), staged) for run in (no_warmup, joint)}
    yield arm("teacher", 0, "teacher", "teacher")
    yield arm("stage1", 0, "teacher", "ode", "teacher-s0")
    yield arm("gate-stage2", GATE_SEED, "gate", "dmd", "stage1-s0")
    yield arm("gate-C", GATE_SEED, "gate", "aad", f"gate-stage2-s{GATE_SEED}")
    for seed in range(first):
        yield arm("stage2", seed, "A and C", "dmd", "stage1-s0")
        yield arm("A", seed, "A and C", "aad-causal_frame", f"stage2-s{seed}")
        yield arm("C", seed, "A and C", "aad", f"stage2-s{seed}")
    for seed in range(first):
        group, parent = "2x2 and warm-up", f"stage2-s{seed}"
        yield arm("B", seed, group, "aad-causal_video", parent)
        yield arm("D", seed, group, "aad-bidirectional_frame", parent)
        for key, updates in (("no_warmup", both), ("no_warmup_compute", as_much[no_warmup])):
            yield arm(key, seed, group, no_warmup, "stage1-s0", updates=updates)
    for seed in range(rest):
        for key, updates in (("joint", both), ("joint_compute", as_much[joint])):
            yield arm(key, seed, "joint", joint, "stage1-s0", updates=updates)
    for seed in range(rest):
        for weight in PENALTIES:
            run = f"aad-penalty_{weight}"
            yield arm(f"weight_{weight}", seed, "weights", run, f"stage2-s{seed}")
    for steps in ("four_steps", "two_steps"):
        yield arm(f"stage1_{steps}", 0, "steps", f"ode-{steps}", "teacher-s0")
        for seed in range(rest):
            yield arm(f"stage2_{steps}", seed, "steps", f"dmd-{steps}", f"stage1_{steps}-s0")
            yield arm(steps, seed, "steps", f"aad-{steps}", f"stage2_{steps}-s{seed}")
    for seed in range(rest):
        yield arm("long_rollout", seed, "long", "aad-long_rollout", f"stage2-s{seed}")


def settings_hash(arms: list[Arm]) -> str:
    """Of all runs together: what the gate was passed with."""
    found = hashes(arms)
    text = " ".join(found[arm.name] for arm in arms)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
