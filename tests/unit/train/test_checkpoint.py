"""Checkpoints: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.train import checkpoint


def save(run: Path, update: int, keep: int = 1) -> Path:
    state = {"weights": {"w": torch.full((1000,), float(update))}, "update": update}
    return checkpoint.save(run, update, state, {"stage": "dmd", "parent": "abc"}, keep)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    assert folder.name == "step-000012"
    assert checkpoint.steps(tmp_path) == [folder]
    state, meta = checkpoint.load(folder)
    assert torch.equal(state["weights"]["w"], torch.full((1000,), 12.0))
    assert state["update"] == 12
    assert meta == {"update": 12, "stage": "dmd", "parent": "abc"}


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_older_checkpoints_are_removed(tmp_path: Path, keep: int) -> None:
    for update in (5, 10, 100, 15):
        save(tmp_path, update, keep)
    names = [p.name for p in checkpoint.steps(tmp_path)]
    assert names == [f"step-{n:06d}" for n in (5, 10, 15, 100)[-keep:]]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_state_is_refused_by_name(tmp_path: Path, share: float) -> None:
    folder = save(tmp_path, 3)
    path = folder / checkpoint.STATE
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"state\.pt is truncated or not a checkpoint") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_something_else_than_tensors_is_not_loaded(tmp_path: Path) -> None:
    """Unpickling may run code, so a checkpoint is read as tensors only."""
    folder = save(tmp_path, 3)
    torch.save({"weights": Path("x")}, folder / checkpoint.STATE)
    with pytest.raises(UserError, match="not a checkpoint") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_half_written_ones_are_ignored(tmp_path: Path) -> None:
    whole = save(tmp_path, 3)
    for name, files in {
        "step-000009": (checkpoint.META,),
        "step-000010": (checkpoint.STATE,),
        "step-000011.tmp": (checkpoint.META, checkpoint.STATE),
        ".step-000012.x": (checkpoint.META, checkpoint.STATE),
    }.items():
        folder = tmp_path / "checkpoints" / name
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{}")
    assert checkpoint.steps(tmp_path) == [whole]


def test_an_interrupted_save_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 3)

    def interrupted(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [old]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [old.name]
