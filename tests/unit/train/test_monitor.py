"""The collapse monitor: the decision, and the measurement on real clips."""

from __future__ import annotations

import pytest
import torch

from aad1.train.config import MonitorConfig, SpritesData
from aad1.train.monitor import CollapseMonitor, Validation
from aad1.train.sources import SpritesWorld
from aad1.worlds.sprites import SpritesConfig


def follow(values: list[float], **config: float) -> tuple[CollapseMonitor, list[bool], list[bool]]:
    monitor = CollapseMonitor(MonitorConfig(**config))  # type: ignore[arg-type]
    kept, collapsed = [], []
    for update, m in enumerate(values):
        kept.append(monitor.check(update, m))
        collapsed.append(monitor.collapsed)
    return monitor, kept, collapsed


def test_three_falls_in_a_row_are_a_collapse() -> None:
    _, kept, collapsed = follow([0.5, 0.9, 0.7, 0.6, 0.5])
    assert kept == [True, True, False, False, False]
    assert collapsed == [False, False, False, False, True]


def test_a_recovery_starts_the_count_anew() -> None:
    _, kept, collapsed = follow([1.0, 0.7, 0.7, 0.85, 0.7, 0.7, 0.7])
    assert kept == [True, False, False, True, False, False, False]
    assert collapsed == [False] * 6 + [True]


def test_motion_above_one_counts_as_one() -> None:
    """A wild start (M = 3) must not make a healthy M = 0.9 look like a fall."""
    monitor, kept, collapsed = follow([3.0, 0.9, 0.85, 0.81])
    assert monitor.best == 1.0
    assert all(kept)
    assert not any(collapsed)
    _, kept, _ = follow([3.0, 0.79])
    assert kept == [True, False]


def test_the_bound_is_a_share_of_the_best_so_far() -> None:
    monitor, kept, _ = follow([0.2, 0.15, 0.17, 0.5, 0.39, 0.41])
    assert kept == [True, False, True, True, False, True]
    assert monitor.best == 0.5
    assert monitor.history == list(enumerate([0.2, 0.15, 0.17, 0.5, 0.39, 0.41]))


def test_patience_and_fall_are_settings() -> None:
    assert follow([1.0, 0.7], patience=1)[2] == [False, True]
    assert follow([1.0, 0.7], fall=0.6)[1] == [True, True]


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
    made = validation.rollouts(pipe)
    assert made.shape == validation.video.shape
    assert made.dtype == torch.uint8
    assert torch.equal(made[:, 0], validation.video[:, 0])
    assert torch.equal(validation.rollouts(pipe), made)  # fixed noise: checks are comparable
