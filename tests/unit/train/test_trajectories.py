"""Teacher trajectories: what they hold, and how an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.pipeline import Pipeline
from aad1.rollout.teacher import sample
from aad1.stages.base import Batch, Conditioner
from aad1.train.config import TrajectoryConfig
from aad1.train.log import RunLog
from aad1.train.trajectories import trajectories

Build = Callable[..., Pipeline]
CONFIG = TrajectoryConfig(clips=5, steps=4, shift=5.0, guidance_scale=2.0, batch=2)
TWO = (1.0, 0.8333333333333334)


class Captions:
    """Clip n wants to go left if n is even."""

    def batch(self, position: int, count: int) -> Batch:
        numbers = range(position, position + count)
        return Batch(torch.zeros(count, 48, 5, 4, 4), [["right" if n % 2 else "left"] * 2
                                                       for n in numbers])  # fmt: skip


def make(teacher: Pipeline, folder: Path, config: TrajectoryConfig = CONFIG,
         sigmas: tuple[float, ...] = TWO) -> tuple[torch.Tensor, list[list[str]]]:  # fmt: skip
    conditioner = Conditioner(teacher.text, ChunkGeometry())
    with RunLog(folder / "log", "test", 1) as log:
        return trajectories(teacher, conditioner, Captions(), sigmas, config, folder, log,
                            bf16=False)  # fmt: skip


@pytest.fixture
def teacher(tiny_pipeline: Build) -> Pipeline:
    pipe = tiny_pipeline("teacher")
    pipe.transformer.requires_grad_(False)
    pipe.text.requires_grad_(False)
    return pipe


def test_states_are_those_of_one_euler_path(teacher: Pipeline, tmp_path: Path) -> None:
    states, captions = make(teacher, tmp_path)
    assert states.shape == (5, 3, 48, 5, 4, 4)
    assert states.dtype == torch.float16
    assert captions == [["left"] * 2, ["right"] * 2] * 2 + [["left"] * 2]
    text = Conditioner(teacher.text, ChunkGeometry())(captions[:2], 5)
    noise = states[:2, 0].float()  # the state at sigma 1 is the noise itself
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)
    x0, kept = sample(teacher.transformer, noise, text, torch.zeros_like(text),
                      steps=4, shift=5.0, guidance_scale=2.0, keep=TWO)  # fmt: skip
    torch.testing.assert_close(states[:2, 1].float(), kept[:, 1], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(states[:2, 2].float(), x0, atol=5e-2, rtol=2e-2)


def test_clips_differ_and_a_second_run_reads_what_the_first_wrote(
    teacher: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, _ = make(teacher, tmp_path)
    flat = states[:, 0].flatten(1)
    assert len({tuple(row[:8].tolist()) for row in flat}) == 5
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    files[1].unlink()
    calls = []
    plain = sample

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("aad1.train.trajectories.sample", counted)
    again, _ = make(teacher, tmp_path)
    assert len(calls) == 1  # only the missing file is made anew ...
    assert torch.equal(again, states)  # ... and it comes out the same


def test_other_settings_or_another_teacher_never_share_files(
    teacher: Pipeline, tiny_pipeline: Build, tmp_path: Path
) -> None:
    make(teacher, tmp_path)
    before = set(tmp_path.glob("*.safetensors"))
    make(teacher, tmp_path, TrajectoryConfig(clips=2, steps=8, batch=2))
    assert len(set(tmp_path.glob("*.safetensors")) - before) == 1
    before = set(tmp_path.glob("*.safetensors"))
    other = tiny_pipeline("teacher")
    other.info = type(other.info)(**{**vars(other.info), "sha256": "other"})
    make(other, tmp_path)
    assert len(set(tmp_path.glob("*.safetensors")) - before) == 3


def test_a_level_off_the_grid_is_refused(teacher: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sigma 0\.9 is not on the teacher's grid of 4 steps"):
        make(teacher, tmp_path, sigmas=(1.0, 0.9))
    assert list(tmp_path.glob("*.safetensors")) == []
