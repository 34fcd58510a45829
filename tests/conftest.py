"""What every test shares: one thread, fixed seeds, no hub, no CUDA tests without CUDA."""

from __future__ import annotations

import os

# Before anything imports these libraries. A test that needed a hub would fail on another machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import random

import numpy as np
import pytest
import torch

# Tests run side by side, and the networks are too small to share out among threads.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Each test starts from the same random state, alone or in a whole run, in any order."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global state
    torch.manual_seed(0)
