"""runs/measure_live.py: its exit code tells whether the goals were met."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def measure() -> Any:
    path = Path(__file__).parents[3] / "runs" / "measure_live.py"
    spec = importlib.util.spec_from_file_location("measure_live", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_live"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


GOOD: dict[str, Any] = dict(frames=9600, seconds=600.0, latencies=[0.8, 0.9, 1.3])
FLAT = [(float(t), 550.0) for t in range(600)]


def test_a_good_run_meets_all_goals(measure: Any) -> None:
    assert measure.goals([measure.Seen(**GOOD)], FLAT) == []


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(frames=9500), "15.83 frames/s, the goal is 15.84"),
        (dict(latencies=[1.6, 1.6, 1.7]), "median 1.60 chunks, the goal is 1.5"),
        (dict(latencies=[0.8, 0.8, 2.3]), "worst 2.30 chunks, the goal is 2.2"),
        (dict(latencies=[1.0] * 3, chunk=0.5), "median 2.00 chunks"),
        (dict(latencies=[]), "no switch was seen"),
        (dict(missing=1), "1 frames missing"),
        (dict(doubled=1), "1 doubled"),
        (dict(error="the connection has ended"), "session 0 failed: the connection has ended"),
    ],
)
def test_each_goal_can_be_missed(measure: Any, change: dict[str, Any], words: str) -> None:
    (line,) = measure.goals([measure.Seen(**GOOD | change)], FLAT)
    assert words in line


def test_memory_is_compared_from_two_minutes_on(measure: Any) -> None:
    grown = [(t, m + (30 if t > 300 else 0)) for t, m in FLAT]
    assert measure.goals([measure.Seen(**GOOD)], grown) == ["memory grew from 550 to 580 MiB"]
    assert measure.memory_windows(grown[:110]) is None


def test_a_doubled_frame_does_not_hide_a_missing_one(measure: Any) -> None:
    seen = measure.Seen()
    for number, previous in ((1, 0), (3, 1), (3, 3), (4, 3)):
        seen.step(number, previous)
    assert (seen.frames, seen.missing, seen.doubled) == (4, 1, 1)


def test_many_sessions_have_no_goal_of_rate(measure: Any) -> None:
    slow = measure.Seen(frames=100, seconds=60.0, latencies=[5.0])
    assert measure.goals([slow, slow], FLAT) == []
