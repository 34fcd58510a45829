"""However the work is split, gradients are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import launch

STAGES = ["ode", "dmd", "aad"]


@pytest.fixture(scope="module")
def alone() -> Any:
    return launch(1, "all_gradients", stages=STAGES)[0]


def compare(got: Any, want: Any) -> None:
    for name in STAGES:
        for mine, theirs in zip(got[name], want[name], strict=True):
            assert mine.keys() == theirs.keys()
            most = max(float(g.abs().max()) for n, g in theirs.items() if n[:3] != "log")
            assert most > 1e-3
            for key, value in theirs.items():
                if key.startswith("log"):
                    torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-6)
                else:
                    error = float((mine[key] - value).abs().max())
                    assert error <= 1e-6 * most, f"{name} {key}: {error} of {most}"


@pytest.mark.parametrize(
    "size,options",
    [
        (1, dict(batch=1, accumulate=4)),
        (1, dict(batch=2, accumulate=2, checkpointed=True)),
        (2, dict(mesh="dp=2")),
        (2, dict(mesh="cp=2", checkpointed=True)),
        (2, dict(mesh="dp=2", batch=1, accumulate=4, keep_gathered=False)),
        (4, dict(mesh="dp=2,cp=2", batch=1, accumulate=4, checkpointed=True)),
        (4, dict(mesh="dp=4,replicas=2", batch=2, accumulate=2)),
        (4, dict(mesh="dp=1,cp=4")),
    ],
)
def test_gradients_equal_those_of_one_process(
    alone: Any, size: int, options: dict[str, Any]
) -> None:
    results = launch(size, "all_gradients", stages=STAGES, **options)
    for result in results:
        compare(result, alone)
