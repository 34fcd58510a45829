"""A server with a fake model, ten times as fast as the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aad1.serve.facts import Facts
from aad1.serve.guard import Limits
from aad1.serve.run import background
from aad1.serve.server import create_app
from serve_fakes import CHUNK, FakeModel

FAST = 160.0


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "00.png")
    return folder


@pytest.fixture(scope="module")
def make_app(samples: Path) -> Callable[..., Any]:
    """make_app(model=None, token=None, sampled=True, **limits) -> the application with a fake
    model, with a sample picture or without."""

    def make(
        model: Any = None, token: str | None = None, sampled: bool = True, **limits: Any
    ) -> Any:
        model = model or FakeModel(fps=FAST)
        facts = Facts(
            name="fake", world="fake", width=16, height=16, fps=model.fps, chunk_frames=CHUNK,
            keys={"left": "turn left"}, samples={"00.png": "go"} if sampled else {},
            folder=samples if sampled else None,
        )  # fmt: skip
        return create_app(model, facts, Limits(**limits), token=token)

    return make


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Any], str]]:
    """serve(app) -> its address; all servers stop when the module's tests are done."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(background(app))
