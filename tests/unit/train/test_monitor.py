"""The collapse monitor: the decision, and the measurement on real clips."""

from __future__ import annotations

import pytest
import torch

from aad1.train.config import MonitorConfig, SpritesData
from aad1.train.monitor import CollapseMonitor, Validation
from aad1.train.sources import SpritesWorld
from aad1.worlds.sprites import SpritesConfig


def follow(values: list[float], **config: float) -> tuple[CollapseMonitor, list[bool], list[bool]]:
    """The monitor after these checks, which of them were falls, and when it was a collapse.

    The model's one weight is the number of the check.
    """
    monitor = CollapseMonitor(MonitorConfig(early_stop=True, **config))  # type: ignore[arg-type]
    model = torch.nn.Linear(1, 1, bias=False)
    fallen, collapsed = [], []
    for update, m in enumerate(values):
        torch.nn.init.constant_(model.weight, float(update))
        monitor.check(update, m, model.state_dict())
        fallen.append(monitor.fallen)
        collapsed.append(monitor.collapsed)
    return monitor, fallen, collapsed


def test_three_falls_in_a_row_are_a_collapse() -> None:
    monitor, fallen, collapsed = follow([0.5, 0.9, 0.7, 0.6, 0.5])
    assert fallen == [False, False, True, True, True]
    assert collapsed == [False, False, False, False, True]
    assert monitor.kept is not None
    assert monitor.kept["update"] == 1


def test_a_recovery_starts_the_count_anew() -> None:
    _, fallen, collapsed = follow([1.0, 0.7, 0.7, 0.85, 0.7, 0.7, 0.7])
    assert fallen == [False, True, True, False, True, True, True]
    assert collapsed == [False] * 6 + [True]


def test_motion_above_one_is_no_better_than_below() -> None:
    """A wild start (M = 3) must not make a healthy M = 0.9 look like a fall, nor be kept."""
    monitor, fallen, collapsed = follow([3.0, 0.9, 0.85, 0.81])
    assert monitor.best == 0.9
    assert monitor.kept is not None
    assert monitor.kept["update"] == 1
    assert not any(fallen)
    assert not any(collapsed)
    assert follow([3.0, 0.9, 0.7])[1] == [False, False, True]
    assert follow([1.0, 2.0, 2.0, 2.0])[1] == [False] * 4  # too much motion is no collapse


def test_the_bound_is_a_share_of_the_best_so_far() -> None:
    values = [0.2, 0.15, 0.17, 0.5, 0.39, 0.41]
    monitor, fallen, _ = follow(values)
    assert fallen == [False, True, False, False, True, False]
    assert monitor.best == 0.5
    assert monitor.history == [list(pair) for pair in enumerate(values)]


def test_the_weights_of_the_best_motion_are_kept_the_latest_of_equals() -> None:
    monitor, _, _ = follow([1.2, 0.95, 0.95, 1.1])
    assert monitor.kept is not None
    assert monitor.kept["update"] == 2
    assert float(monitor.kept["weights"]["weight"]) == 2.0


def test_patience_and_fall_are_settings() -> None:
    assert follow([1.0, 0.7], patience=1)[2] == [False, True]
    assert follow([1.0, 0.7], fall=0.6)[1] == [False, False]


def test_a_restored_monitor_goes_on_as_before() -> None:
    monitor, _, _ = follow([1.0, 0.7, 0.7])
    other = CollapseMonitor(monitor.config)
    other.restore(monitor.state())
    other.check(3, 0.7, torch.nn.Linear(1, 1))
    assert other.collapsed


@pytest.fixture(scope="module")
def validation() -> Validation:
    data = SpritesData(world=SpritesConfig(size=32, frames=9), stride=4)
    return Validation(SpritesWorld(data, 0, torch.device("cpu")), 8)


def test_real_clips_have_all_the_motion_and_frozen_ones_none(validation: Validation) -> None:
    values = validation.measure(validation.video)
    assert values["M"] == pytest.approx(1.0)
    assert values["late_M"] == pytest.approx(1.0)
    frozen = validation.video[:, :1].expand_as(validation.video).contiguous()
    assert validation.measure(frozen)["M"] < 0.05
    slow = validation.video[:, [0, 0, 0, 0, 1, 1, 1, 1, 2]]
    assert 0.05 < validation.measure(slow)["M"] < 0.9


@pytest.mark.filterwarnings("ignore:left out of the prompt", "ignore:a prompt has")
def test_rollouts_begin_with_the_real_frame_and_are_as_long(
    validation: Validation, tiny_pipeline: object
) -> None:
    pipe = tiny_pipeline(codec=validation.codec, size=32)  # type: ignore[operator]
    made = validation.decode(validation.rollouts(pipe))
    assert made.shape == validation.video.shape
    assert made.dtype == torch.uint8
    assert torch.equal(made[:, 0], validation.video[:, 0])
    # Fixed noise: checks are comparable.
    assert torch.equal(validation.decode(validation.rollouts(pipe)), made)
