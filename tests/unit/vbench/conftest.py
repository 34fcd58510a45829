"""A stand-in checkout with a complete set of small videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from vbench_standin import Bench, make_bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)
