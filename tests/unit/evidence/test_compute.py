"""Equal compute: the count of operations against what torch itself counts in a training step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aad1.evidence.arms import plan
from aad1.evidence.compute import equal_updates, work
from aad1.presets import preset
from aad1.train.config import Experiment
from aad1.train.run import Run


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    for name in ("teacher", "ode"):
        e = preset(f"evidence-tiny-{name}")
        teacher = out / "evidence-tiny-teacher" / "final" if name == "ode" else None
        Run(replace(e, out=out, teacher=teacher, device="cpu")).train()
    return out


def counted(e: Experiment, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Operations of each update of a run."""
    from aad1.train.loop import Trainer

    found: list[float] = []
    step = Trainer.step

    def watched(self: Trainer, **given: object) -> object:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logs = step(self, **given)  # type: ignore[arg-type]
        found.append(float(counter.get_total_flops()))
        return logs

    monkeypatch.setattr(Trainer, "step", watched)
    folders = {"teacher": out / "evidence-tiny-teacher" / "final", "out": out, "device": "cpu"}
    init = out / "evidence-tiny-ode" / "final"
    Run(replace(e, init=init, **folders)).train()  # type: ignore[arg-type]
    monkeypatch.setattr(Trainer, "step", step)
    return found


@pytest.mark.parametrize("name", ["dmd", "aad", "aad-causal_frame", "joint"])
def test_work_is_what_torch_counts(
    name: str, stage1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = replace(preset(f"evidence-tiny-{name}"), name=f"count-{name}")
    first, second, *_ = counted(e, stage1, monkeypatch)
    each, before = work(e)
    # The formulas leave out what a backward pass does for the text and the noise level.
    assert second == pytest.approx(each, rel=0.08)
    assert first == pytest.approx(each + before, rel=0.08)
    assert (before > 0) == name.startswith("aad")


@pytest.mark.parametrize("prefix", ["evidence", "evidence-tiny"])
def test_arms_at_equal_compute_compute_as_much(prefix: str) -> None:
    arms = {arm.key: arm.experiment for arm in plan(prefix)}

    def total(key: str) -> float:
        each, before = work(arms[key])
        return arms[key].optim.updates * each + before

    staged = total("stage2") + total("C")
    for key in ("no_warmup_compute", "joint_compute"):
        each, _ = work(arms[key])
        assert abs(total(key) - staged) <= each / 2
    # An update of both at once costs more than one of either; one without warm-up less than two.
    assert arms["joint_compute"].optim.updates < arms["joint"].optim.updates
    assert arms["no_warmup_compute"].optim.updates > arms["no_warmup"].optim.updates


def test_a_run_equals_itself() -> None:
    e = preset("evidence-aad")
    assert equal_updates(e, [e]) == e.optim.updates
