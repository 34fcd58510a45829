"""Wan's teacher trajectories against Euler steps over diffusers' own transformer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.data.shards import ClipShards
from aad1.data.text_store import TextStore
from aad1.errors import UserError
from aad1.models.dit import WanTransformer
from aad1.models.umt5 import NEGATIVE_PROMPT
from aad1.train.config import TrajectoryConfig
from aad1.train.trajectories import write_trajectories
from aad1.train.wan_world import StoredConditioner, StoredText

SHAPE = (16, 3, 4, 6)
PROMPTS = ["one cat", "two dogs run"]
TWO = (1.0, 0.8333333333333334)


@pytest.fixture
def conditioner(tmp_path: Path, tiny_umt5: Any) -> StoredConditioner:
    store = TextStore.create(tmp_path / "text", length=12, dim=24, negative=NEGATIVE_PROMPT)
    store.add([NEGATIVE_PROMPT, *PROMPTS], tiny_umt5)
    text = StoredText([store], torch.device("cpu"), tmp_path)
    return StoredConditioner(text, ChunkGeometry(), NEGATIVE_PROMPT)


@pytest.fixture(scope="module")
def teacher(tiny_wan: Path) -> WanTransformer:
    return WanTransformer.from_pretrained(tiny_wan / "transformer")


def write(
    out: Path, teacher: WanTransformer, conditioner: StoredConditioner, **changes: Any
) -> bool:
    config = TrajectoryConfig(
        clips=changes.pop("clips", 5), steps=changes.pop("steps", 12), guidance_scale=6.0,
        batch=changes.pop("batch", 2),
    )  # fmt: skip
    settings: dict[str, Any] = dict(sigmas=TWO, made_by="teacher") | changes
    sigmas = settings.pop("sigmas")
    return write_trajectories(out, teacher, conditioner, PROMPTS, SHAPE, sigmas, config, **settings)


def test_states_are_diffusers_euler_path_in_double(
    tmp_path: Path, tiny_wan: Path, teacher: WanTransformer, conditioner: StoredConditioner
) -> None:
    diffusers = pytest.importorskip("diffusers")
    chunks = ChunkGeometry(chunk=2, window=5)
    conditioner.geometry = chunks
    assert write(tmp_path / "out", teacher, conditioner, steps=48, clips=1)
    shards = ClipShards(tmp_path / "out")
    assert shards.tensor == "states" and shards.clip_shape == (3, *SHAPE)
    assert shards.manifest["config"]["sigmas"] == list(TWO)
    states = shards.tensors([0])[0].double()
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tiny_wan / "transformer").double()
    good, bad = conditioner.encoder([PROMPTS[0], NEGATIVE_PROMPT]).double().split(1)
    x = states[:1].clone()  # what is stored first is the noise
    assert float(x.std()) == pytest.approx(1.0, abs=0.1)
    grid = [5 * (i / 48) / (1 + 4 * (i / 48)) for i in range(48, -1, -1)]
    with torch.no_grad():
        for i, (now, then) in enumerate(pairwise(grid)):
            if i == 24:
                assert now == pytest.approx(5 / 6, abs=1e-12)
                torch.testing.assert_close(states[1], x[0], atol=3e-3, rtol=3e-3)
            t = torch.tensor([1000 * now], dtype=torch.float64)
            cond = theirs(x, t, good, return_dict=False)[0]
            free = theirs(x, t, bad, return_dict=False)[0]
            x = x + (then - now) * (free + 6 * (cond - free))
    torch.testing.assert_close(states[2], x[0], atol=3e-3, rtol=3e-3)
    assert float((x[0] - states[1]).abs().mean()) > 0.1  # the middle state is another one


def test_parts_make_the_same_files_as_one_run(
    tmp_path: Path, teacher: WanTransformer, conditioner: StoredConditioner
) -> None:
    conditioner.geometry = ChunkGeometry(chunk=2, window=5)
    assert write(tmp_path / "one", teacher, conditioner)
    for i in range(3):
        done = write(tmp_path / "parts", teacher, conditioner, part=(i, 3))
        assert done == (i == 2)
    one, parts = ClipShards(tmp_path / "one"), ClipShards(tmp_path / "parts")
    assert len(one) == 5 and one.captions == [[PROMPTS[n % 2]] for n in range(5)]
    assert parts.captions == one.captions
    assert torch.equal(one.read_tensors(), parts.read_tensors())
    noise = one.read_tensors()[:, 0].flatten(1)
    assert len({tuple(row[:4].tolist()) for row in noise}) == 5
    # Noise belongs to the clip, not to how clips are batched.
    assert write(tmp_path / "batch", teacher, conditioner, batch=5)
    got = ClipShards(tmp_path / "batch").read_tensors()
    assert torch.equal(got[:, 0], one.read_tensors()[:, 0])
    torch.testing.assert_close(got, one.read_tensors(), atol=5e-3, rtol=5e-3)


def test_a_run_that_was_killed_goes_on(
    tmp_path: Path, teacher: WanTransformer, conditioner: StoredConditioner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    conditioner.geometry = ChunkGeometry(chunk=2, window=5)
    assert write(tmp_path, teacher, conditioner)
    want = ClipShards(tmp_path).read_tensors()
    (tmp_path / "manifest.json").unlink()
    damaged = tmp_path / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = teacher.register_forward_hook(count)
    assert write(tmp_path, teacher, conditioner)
    hook.remove()
    assert passes == 2 * 12  # one shard, each step with and without the prompt
    assert torch.equal(ClipShards(tmp_path).read_tensors(), want)


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, teacher: WanTransformer, conditioner: StoredConditioner
) -> None:
    conditioner.geometry = ChunkGeometry(chunk=2, window=5)
    write(tmp_path, teacher, conditioner, clips=1)
    for change, name in (
        (dict(steps=8), "steps 12, now it is 8"),
        (dict(made_by="other"), "made_by 'teacher'"),
        (dict(clips=3), "clips 1, now it is 3"),
        (dict(seed=1), "seed 0, now it is 1"),
        (dict(sigmas=(1.0,)), "sigmas"),
    ):
        with pytest.raises(UserError, match=f"was begun with {name}"):
            write(tmp_path, teacher, conditioner, **({"clips": 1} | change))  # type: ignore[operator]
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match="--part must be i/n"):
            write(tmp_path, teacher, conditioner, clips=1, part=part)
    with pytest.raises(UserError, match=r"sigma 0\.9 is not on the teacher's grid of 12 steps"):
        write(tmp_path / "off", teacher, conditioner, sigmas=(1.0, 0.9))
    assert not (tmp_path / "off").exists()
    facts = json.loads((tmp_path / "manifest.json").read_text())["config"]
    assert facts["shift"] == 5.0 and facts["guidance_scale"] == 6.0
