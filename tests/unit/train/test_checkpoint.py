"""Checkpoints: whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aad1.errors import UserError
from aad1.train import checkpoint


def save(run: Path, update: int, keep: int = 1, turn: int = 0) -> Path:
    folder = checkpoint.step_folder(run, update, turn)
    tensors = {"w": torch.full((1000,), float(update)), "step": torch.tensor(float(update))}
    checkpoint.save(folder, tensors, {"stage": "dmd", "update": update}, keep=keep)
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros(shape) for name, shape in checkpoint.shapes(folder).items()}
    checkpoint.load(folder, tensors)
    return tensors


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    assert folder.name == "step-000012"
    assert checkpoint.steps(tmp_path) == [folder]
    tensors = load(folder)
    assert torch.equal(tensors["w"], torch.full((1000,), 12.0))
    assert tensors["step"] == 12 and tensors["step"].shape == ()
    assert checkpoint.read_meta(folder) == {"stage": "dmd", "update": 12}


def test_one_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 12)
    folder = checkpoint.step_folder(tmp_path, 12)
    checkpoint.save(folder, {"w": torch.ones(3)}, {"ended": "yes"})
    assert checkpoint.read_meta(folder) == {"ended": "yes"}
    assert torch.equal(load(folder)["w"], torch.ones(3))
    assert names(tmp_path) == ["step-000012"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_older_checkpoints_are_removed(tmp_path: Path, keep: int) -> None:
    for update in (5, 10, 100, 15):
        save(tmp_path, update, keep)
    found = [p.name for p in checkpoint.steps(tmp_path)]
    assert found == [f"step-{n:06d}" for n in (5, 10, 15, 100)[-keep:]]
    assert names(tmp_path) == found


def test_steps_of_an_update_come_after_it_and_before_the_next(tmp_path: Path) -> None:
    for update, turn in ((3, 0), (3, 2), (4, 0), (3, 11)):
        save(tmp_path, update, keep=9, turn=turn)
    assert [p.name for p in checkpoint.steps(tmp_path)] == [
        "step-000003", "step-000003-02", "step-000003-11", "step-000004",
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_shard_is_refused_by_name(tmp_path: Path, share: float) -> None:
    folder = save(tmp_path, 3)
    path = folder / "weights" / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"__0_0\.distcp is truncated: \d+ bytes of") as error:
        checkpoint.read_meta(folder)
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        checkpoint.read_meta(folder)


def test_other_tensors_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    for tensors, message in (
        ({"w": torch.zeros(999)}, r"w is \(1000,\) there, \(999,\) here"),
        ({"new": torch.zeros(2)}, r"new is missing there"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load(folder, tensors)


def test_checkpoints_of_an_older_version_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000003"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"update": 3}))
    with pytest.raises(UserError, match="older version"):
        checkpoint.read_meta(folder)


def test_half_written_ones_are_ignored(tmp_path: Path) -> None:
    whole = save(tmp_path, 3)
    for name in ("step-000010", "step-000011.tmp", ".step-000012.new"):
        (tmp_path / "checkpoints" / name / "weights").mkdir(parents=True)
    for name in ("step-000011.tmp", ".step-000012.new"):
        (tmp_path / "checkpoints" / name / "meta.json").write_text("{}")
    assert checkpoint.steps(tmp_path) == [whole]
    save(tmp_path, 12)  # over what an earlier attempt left
    assert load(checkpoint.step_folder(tmp_path, 12))["w"][0] == 12


def test_a_failed_save_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 3)

    def full(state: Any, checkpoint_id: Path, **_: object) -> None:
        checkpoint_id.mkdir()
        (checkpoint_id / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(UserError, match=r"step-000004 could not .*No space left.*000003 is kept"):
        save(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [old]
    assert names(tmp_path) == [old.name]
