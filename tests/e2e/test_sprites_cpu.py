"""The three stages end to end on the drawn world, by the script that a user runs.

`runs/sprites_cpu.sh sprites-tiny` trains teacher, stage I, II and III on the CPU; here what comes
out is judged. A few minutes of training do not reach the goal set for the whole script (M in
0.6 .. 1.4, FDtd at most half of each baseline), so the bounds are wider for this chain; the model
in the package, which the whole script made, is held to the goal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.evaluate.report import (
    RealStatistics,
    evaluate_videos,
    measure_real,
    motion_check,
    moving_noise,
)
from aad1.model_info import INDEX
from aad1.pipeline import Pipeline
from aad1.presets import preset
from aad1.train.config import SpritesData
from aad1.train.sources import SpritesWorld

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STAGES = ("teacher", "ode", "dmd", "aad")
CLIPS = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the script has trained the smallest chain."""
    folder = tmp_path_factory.mktemp("sprites")
    (folder / "bin").mkdir()
    aad1 = folder / "bin" / "aad1"
    aad1.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m aad1.cli "$@"\n')
    aad1.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = ["bash", str(ROOT / "runs" / "sprites_cpu.sh"), "sprites-tiny"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "out"


def model(runs: Path, stage: str) -> Pipeline:
    return Pipeline.from_pretrained(runs / f"sprites-tiny-{stage}" / "final")


@pytest.fixture(scope="module")
def world() -> SpritesWorld:
    data = preset("sprites-tiny-teacher").data
    assert isinstance(data, SpritesData)
    return SpritesWorld(data, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def real(world: SpritesWorld) -> RealStatistics:
    """Statistics of held-out clips: not those that the runs' monitor sees (the first ones), and
    not those of the rollouts."""
    video, _ = world.heldout(3 * CLIPS)
    return measure_real(video[2 * CLIPS :], video[CLIPS : 2 * CLIPS], cheats=True)


def rollouts(pipe: Pipeline, world: SpritesWorld) -> torch.Tensor:
    """One-step rollouts from the first frames of held-out clips."""
    _, batch = world.heldout(2 * CLIPS)
    latents, captions = batch.latents[CLIPS:], batch.captions[CLIPS:]
    chunks = pipe.info.geometry.chunks(latents.shape[2]) - 1
    made = pipe.generate_latents(latents[:, :, :1], captions, range(CLIPS), chunks)
    return world.codec.decode(made)


@pytest.fixture(scope="module")
def figures(
    runs: Path, world: SpritesWorld, real: RealStatistics
) -> dict[str, Mapping[str, float]]:
    out = {}
    for stage in STAGES:
        pipe = model(runs, stage)
        if stage == "teacher":  # as a one-step causal generator: what stage I starts from
            pipe.info = replace(pipe.info, stage="ode", geometry=ChunkGeometry())
        out[stage] = evaluate_videos(rollouts(pipe, world), real)
    print(json.dumps(out, indent=1))
    return out


def test_a_few_minutes_bring_motion_nearer_to_real(
    figures: dict[str, Mapping[str, float]], real: RealStatistics
) -> None:
    """Not frozen, well better than a frozen frame and than the untrained one-step generator, and
    not worse than stage I. Two runs of other random numbers gave M 1.4 and 2.1 (docs/log.md)."""
    (frozen,) = [c for c in real.cheats if c.name == "frozen"]
    made = figures["aad"]
    assert 0.5 < made["M"] < 2.5
    assert made["FDtd"] < 0.7 * frozen.FDtd
    assert made["FDtd"] < 0.7 * figures["teacher"]["FDtd"]
    assert made["FDtd"] < 1.1 * figures["ode"]["FDtd"]


def test_the_packaged_model_moves_as_real_clips_do(
    real: RealStatistics, world: SpritesWorld
) -> None:
    """M within 0.6 to 1.4, FDtd at most half of the frozen frame's and below that of static videos
    with moving noise on them."""
    made = evaluate_videos(rollouts(Pipeline.from_pretrained("sprites"), world), real)
    check = motion_check(made, real, {})
    assert check.passed, check.failures


def test_a_static_video_with_moving_noise_fails_the_same_check(
    real: RealStatistics, world: SpritesWorld
) -> None:
    video, _ = world.heldout(CLIPS)
    still = video[:, :1].float().expand(video.shape)
    for kind in ("fresh", "drifting", "drifting_smooth"):
        noise = moving_noise(tuple(video.shape[:4]), kind)[..., None]
        for amplitude in (8.0, 16.0, 24.0):
            cheat = (still + amplitude * noise).round().clamp(0, 255).to(torch.uint8)
            assert not motion_check(evaluate_videos(cheat, real), real, {}).passed


def test_the_first_frame_is_kept(runs: Path, world: SpritesWorld) -> None:
    video = world.heldout(2 * CLIPS)[0][CLIPS:]
    assert torch.equal(rollouts(model(runs, "aad"), world)[:, 0], video[:, 0])


def test_each_stage_started_from_the_one_before_and_moved(runs: Path) -> None:
    facts = {
        s: json.loads((runs / f"sprites-tiny-{s}" / "final" / INDEX).read_text()) for s in STAGES
    }
    assert facts["teacher"]["parent"] is None
    for parent, child in pairwise(STAGES):
        assert facts[child]["parent"]["sha256"] == facts[parent]["sha256"]
        before = model(runs, parent).transformer.state_dict()
        after = model(runs, child).transformer.state_dict()
        moved = [k for k in before if not torch.equal(before[k], after[k])]
        assert len(moved) > 0.9 * len(before)
        assert facts[child]["updates"] > 0


def test_every_run_left_its_record(runs: Path) -> None:
    for stage in STAGES:
        folder = runs / f"sprites-tiny-{stage}"
        assert (folder / "config.yaml").is_file()
        lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
        assert {"train", "final"} <= {x["kind"] for x in lines}
        assert list(folder.glob("samples/*.png"))
    monitor = (runs / "sprites-tiny-dmd" / "log.jsonl").read_text()
    assert '"kind": "monitor"' in monitor
